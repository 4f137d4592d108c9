"""The two-stream update that releases the next router, when the routed output has landed.

Decides: r comes as expert rows with their map, combined on the fly, or dense, after a collective that added it up
already. What is kept for the backward: x', which is an output anyway, 1/rms, and the expert rows only where combine
weights want a gradient from here. The bracketing is specified in `release_router_reference.py`.

Legend: T tokens, K experts per token, R rows, H hidden size.
"""

from typing import Any

import torch
from torch import Tensor

from farskip.triton_kernels.add_rms_norm import as_rows, check_streams, new_rstd, through_norm
from farskip.triton_kernels.backend import choose_backend
from farskip.triton_kernels.dispatch_map import DispatchMap
from farskip.triton_kernels.release_router_reference import release_router_reference
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
        routed: The routed output: expert rows [R, H] with `dispatch`, or as `y` without.
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
    x, normed, _ = _release_router(
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
    if routed.dtype != y.dtype or routed.shape[1] != y.shape[-1] or len(dispatch.dst) * y.shape[-1] != y.numel():
        raise ValueError(
            f"routed rows {routed.dtype} {list(routed.shape)} of {len(dispatch.dst)} tokens do not fit the stream "
            f"{y.dtype} {list(y.shape)}"
        )


@torch.library.custom_op("farskip::release_router", mutates_args=())
def _release_router(
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


@_release_router.register_fake
def _(y: Tensor, *_rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(y), torch.empty_like(y), new_rstd(y)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _y, s, routed, dst, src, combine, weight, _eps, ctx.unit_offset, ctx.backend = inputs
    x, _normed, rstd = output
    ctx.has_shared = s is not None
    kept = routed if combine is not None and ctx.needs_input_grad[5] else None
    ctx.save_for_backward(x, rstd, weight, kept, dst, src, combine)
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_x: Tensor | None, grad_normed: Tensor | None, _rstd: Any) -> Any:
    x, rstd, weight, routed, dst, src, combine = ctx.saved_tensors
    _, grad, grad_weight = through_norm(grad_normed, grad_x, x, rstd, weight, ctx.unit_offset, ctx.backend)
    grad_routed, grad_combine = routed_gradients(grad, routed, dst, src, combine, ctx.backend)
    grad_s = grad if ctx.has_shared else None
    return grad, grad_s, grad_routed, None, None, grad_combine, grad_weight, None, None, None


def routed_gradients(
    grad: Tensor | None,
    routed: Tensor | None,
    dst: Tensor | None,
    src: Tensor | None,
    combine: Tensor | None,
    backend: str,
) -> tuple[Tensor | None, Tensor | None]:
    """From the gradient of r, those of the routed rows (or of the dense r) and of the combine weights."""
    if grad is None or dst is None or src is None:
        return grad, None
    return unpermute_gradients(grad.contiguous(), routed, dst, src, combine, backend)


_release_router.register_autograd(_backward, setup_context=_save)
