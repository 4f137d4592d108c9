"""The two-stream update that releases the next router, when the routed output has landed.

Decides: r comes as expert rows with their map, combined on the fly, or dense, after a collective that added it up
already. What is kept for the backward: x', which is an output anyway, 1/rms, and the expert rows only where combine
weights want a gradient from here. The bracketing is specified in `release_router_reference.py`.

The backward from the readers of norm(x') on is one op too, `release_router_backward`: the sum of their gradients, that
of expert rows among them, norm and residual. Autograd sums the gradients of a tensor before it asks whoever made it, so
`release_router` itself gets one dense sum; `release_router_by_use.py` brings autograd and this op together.

Legend: T tokens, K experts per token, R rows, H hidden size.
"""

from typing import Any

import torch
from torch import Tensor

from farskip.triton_kernels.add_rms_norm import as_rows, check_streams, new_rstd, through_norm
from farskip.triton_kernels.backend import choose_backend
from farskip.triton_kernels.dispatch_map import DispatchMap
from farskip.triton_kernels.release_router_reference import (
    release_router_backward_reference,
    release_router_reference,
)
from farskip.triton_kernels.unpermute import check_rows, check_weights, unpermute_gradients


def release_router(
    y: Tensor,
    s: Tensor | None,
    routed: Tensor,
    weight: Tensor,
    eps: float,
    *,
    dispatch: DispatchMap | None = None,
    combine_weights: Tensor | None = None,
    unit_offset: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """x' = y + (r + s) and its norm, each rounded to the storage dtype; r is rounded before it is added.

    Args:
        y: x + a, from `release_attention`, [..., H].
        s: The shared experts' output, as `y`, or None.
        routed: The routed output: expert rows [R, H] with `dispatch`, in the dtype of `y` or a narrower one, or as `y`
            without.
        weight: [H], of the next layer's norm before router and experts.
        eps: Added to the mean square.
        dispatch: The map that placed the rows, or None.
        combine_weights: [T, K], fp32 advised, only with `dispatch`; None for a plain sum.
        unit_offset: Whether the gain is 1 + weight (Gemma).
        backend: "reference", "triton", or None to choose by device.

    Returns:
        x' and its norm, both as `y`.

    Raises:
        ValueError: Shapes or dtypes do not fit.

    Note:
        No host synchronization. Deterministic. y, s and a dense r receive one and the same gradient tensor.
    """
    backend = choose_backend(backend, y)
    check_routed(y, s, routed, dispatch, combine_weights, weight)
    x, normed, _ = apply_release_router(
        as_rows(y),
        None if s is None else as_rows(s),
        as_rows(routed),
        None if dispatch is None else dispatch.dst,
        None if dispatch is None else dispatch.src,
        None if combine_weights is None else combine_weights.contiguous(),
        weight.contiguous(),
        eps,
        unit_offset,
        backend,
    )
    return x.view(y.shape), normed.view(y.shape)


def check_routed(
    y: Tensor,
    s: Tensor | None,
    routed: Tensor,
    dispatch: DispatchMap | None,
    combine_weights: Tensor | None,
    *weights: Tensor,
) -> None:
    """Raise one line unless the streams, the routed output and its map fit together."""
    check_streams({"y": y, "s": s, "routed": None if dispatch is not None else routed}, *weights)
    if dispatch is None:
        if combine_weights is not None:
            raise ValueError("combine_weights need the dispatch map of the rows they weigh; pass dispatch=")
        return
    check_rows("routed", routed, dispatch)
    check_weights(combine_weights, dispatch)
    check_fits("routed rows", routed, dispatch, "the stream", y)


def check_fits(name: str, rows: Tensor, dispatch: DispatchMap, stream_name: str, stream: Tensor) -> None:
    """Raise one line unless the rows have the stream's hidden size and its dtype or a narrower one, and the map its
    tokens."""
    hidden, fits = stream.shape[-1], torch.promote_types(rows.dtype, stream.dtype) == stream.dtype
    if not fits or rows.shape[1] != hidden or len(dispatch.dst) * hidden != stream.numel():
        raise ValueError(
            f"{name} {rows.dtype} {list(rows.shape)} of {len(dispatch.dst)} tokens do not fit {stream_name} "
            f"{stream.dtype} {list(stream.shape)}"
        )


def release_router_backward(
    grad_x: Tensor | None,
    before: Tensor | None,
    rows: Tensor | None,
    after: Tensor | None,
    x: Tensor,
    rstd: Tensor,
    weight: Tensor,
    *,
    dispatch: DispatchMap | None = None,
    unit_offset: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradient of x' and of the norm's weight: for those who call backwards themselves.

    Args:
        grad_x: Gradient of x' that does not come through its norm, [..., H], or None.
        before: Gradient of norm(x') that its sum starts with, as the router's, as `x`, or None.
        rows: The next one: of expert rows, [R, H] with `dispatch`, in the dtype of `x` or a narrower one, summed per
            token here; or as `x` without; or None.
        after: The last one, as the shared experts', as `x`, or None.
        x: x', [..., H].
        rstd: 1/rms of its rows, [T], fp32 (fp64 for fp64): (mean of squares + eps)^(-1/2).
        weight: [H].
        dispatch: The map by which norm(x') was copied to rows.
        unit_offset: As for `release_router`.
        backend: As for `release_router`.

    Returns:
        Gradient of x' as `x`, which is that of y, s and r too; gradient of the weight, [H].

    Raises:
        ValueError: Shapes or dtypes do not fit, or no gradient of norm(x') is given.

    Note:
        No host synchronization. Deterministic. Every sum is rounded, as separate ops would do it.
    """
    backend = choose_backend(backend, x)
    dense = {"x": x, "grad_x": grad_x, "before": before, "after": after}
    check_streams(dense | ({"rows": rows} if dispatch is None else {}), weight)
    if before is None and rows is None and after is None:
        raise ValueError("no gradient of norm(x') is given; pass before, rows or after")
    if rstd.shape != (x.numel() // x.shape[-1],):
        raise ValueError(f"rstd must be [{x.numel() // x.shape[-1]}], one per row of x, got {list(rstd.shape)}")
    if rows is not None and dispatch is not None:
        check_rows("rows", rows, dispatch)
        check_fits("rows", rows, dispatch, "x", x)
    grad, grad_weight = apply_release_router_backward(
        *(None if each is None else as_rows(each) for each in (grad_x, before, rows)),
        None if dispatch is None else dispatch.dst,
        None if after is None else as_rows(after),
        as_rows(x),
        rstd.contiguous(),
        weight.contiguous(),
        unit_offset,
        backend,
    )
    return grad.view(x.shape), grad_weight


@torch.library.custom_op("farskip::release_router", mutates_args=())
def apply_release_router(
    y: Tensor,
    s: Tensor | None,
    routed: Tensor,
    dst: Tensor | None,
    src: Tensor | None,
    combine: Tensor | None,
    weight: Tensor,
    eps: float,
    unit_offset: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "triton":
        from farskip.triton_kernels.release_router_triton import release_router_triton

        return release_router_triton(y, s, routed, dst, combine, weight, eps, unit_offset)
    return release_router_reference(y, s, routed, dst, combine, weight, eps, unit_offset)


@apply_release_router.register_fake
def _(y: Tensor, *_rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(y), torch.empty_like(y), new_rstd(y)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _y, s, routed, dst, src, combine, weight, _eps, ctx.unit_offset, ctx.backend = inputs
    x, _normed, rstd = output
    ctx.has_shared, ctx.rows_dtype = s is not None, routed.dtype
    kept = routed if combine is not None and ctx.needs_input_grad[5] else None
    ctx.save_for_backward(x, rstd, weight, kept, dst, src, combine)
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_x: Tensor | None, grad_normed: Tensor | None, _rstd: Any) -> Any:
    x, rstd, weight, routed, dst, src, combine = ctx.saved_tensors
    _, grad, grad_weight = through_norm(grad_normed, grad_x, x, rstd, weight, ctx.unit_offset, ctx.backend)
    grad_routed, grad_combine = routed_gradients(grad, routed, dst, src, combine, ctx.rows_dtype, ctx.backend)
    grad_s = grad if ctx.has_shared else None
    return grad, grad_s, grad_routed, None, None, grad_combine, grad_weight, None, None, None


def routed_gradients(
    grad: Tensor | None,
    routed: Tensor | None,
    dst: Tensor | None,
    src: Tensor | None,
    combine: Tensor | None,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor | None, Tensor | None]:
    """From the gradient of r, those of the routed rows of this dtype (or of the dense r) and of the combine weights."""
    if grad is None or dst is None or src is None:
        return grad, None
    return unpermute_gradients(grad.to(dtype).contiguous(), routed, dst, src, combine, backend)


apply_release_router.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("farskip::release_router_backward", mutates_args=())
def apply_release_router_backward(
    grad_x: Tensor | None,
    before: Tensor | None,
    rows: Tensor | None,
    dst: Tensor | None,
    after: Tensor | None,
    x: Tensor,
    rstd: Tensor,
    weight: Tensor,
    unit_offset: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    arguments = (grad_x, before, rows, dst, after, x, rstd, weight, unit_offset)
    if backend == "triton":
        from farskip.triton_kernels.release_router_triton import release_router_backward_triton

        return release_router_backward_triton(*arguments)
    return release_router_backward_reference(*arguments)


@apply_release_router_backward.register_fake
def _(
    grad_x: Tensor | None,
    before: Tensor | None,
    rows: Tensor | None,
    dst: Tensor | None,
    after: Tensor | None,
    x: Tensor,
    rstd: Tensor,
    weight: Tensor,
    unit_offset: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)
