"""Both two-stream updates at once, for the serial case: everything has landed, y never leaves the op.

Decides: same bits as `release_attention` followed by `release_router`, values and gradients; fewer trips to memory.

Legend: T tokens, K experts per token, R rows, H hidden size.
"""

from typing import Any

import torch
from torch import Tensor

from farskip.triton_kernels.add_rms_norm import as_rows, new_rstd
from farskip.triton_kernels.backend import choose_backend, needs_gradient
from farskip.triton_kernels.dispatch_map import DispatchMap
from farskip.triton_kernels.release_both_reference import release_both_backward_reference, release_both_reference
from farskip.triton_kernels.release_router import check_routed, routed_gradients


def release_both(
    x: Tensor,
    a: Tensor,
    s: Tensor,
    routed: Tensor,
    weight_n: Tensor,
    weight_x: Tensor,
    eps: float,
    *,
    dispatch: DispatchMap | None = None,
    combine_weights: Tensor | None = None,
    unit_offset: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y = x + a; n' = y + s; x' = y + (r + s): the norm of n', x' and its norm.

    Args:
        x: The full stream at the layer's entry, [..., H].
        a: Attention's output, as `x`.
        s: The shared experts' output, as `x`. Without shared experts use the two separate updates.
        routed: As for `release_router`.
        weight_n: [H], of the next layer's input norm.
        weight_x: [H], of the next layer's norm before router and experts.
        eps: Added to the mean square, in both norms.
        dispatch: As for `release_router`.
        combine_weights: As for `release_router`.
        unit_offset: Whether the gains are 1 + weight (Gemma).
        backend: "reference", "triton", or None to choose by device.

    Returns:
        x', the norm of n', the norm of x', all as `x`.

    Raises:
        ValueError: Shapes or dtypes do not fit.

    Note:
        No host synchronization. Deterministic. For a backward it keeps n', x' and both 1/rms; x, a and s receive one
        and the same gradient tensor.
    """
    backend = choose_backend(backend, x)
    check_routed(x, a, routed, dispatch, combine_weights, weight_n, weight_x)
    check_routed(x, s, routed, dispatch, combine_weights, weight_n, weight_x)
    tensors = (x, a, s, routed, combine_weights, weight_n, weight_x)
    full, u, v, *_ = _release_both(
        as_rows(x),
        as_rows(a),
        as_rows(s),
        as_rows(routed),
        None if dispatch is None else dispatch.dst,
        None if dispatch is None else dispatch.src,
        None if combine_weights is None else combine_weights.contiguous(),
        weight_n.contiguous(),
        weight_x.contiguous(),
        eps,
        unit_offset,
        needs_gradient(*tensors),
        backend,
    )
    return full.view(x.shape), u.view(x.shape), v.view(x.shape)


@torch.library.custom_op("farskip::release_both", mutates_args=())
def _release_both(
    x: Tensor,
    a: Tensor,
    s: Tensor,
    routed: Tensor,
    dst: Tensor | None,
    src: Tensor | None,
    combine: Tensor | None,
    weight_n: Tensor,
    weight_x: Tensor,
    eps: float,
    unit_offset: bool,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if backend == "triton":
        from farskip.triton_kernels.release_both_triton import release_both_triton

        return release_both_triton(x, a, s, routed, dst, combine, weight_n, weight_x, eps, unit_offset, keep)
    full, u, v, n, rstd_n, rstd_x = release_both_reference(
        x, a, s, routed, dst, combine, weight_n, weight_x, eps, unit_offset
    )
    return full, u, v, (n if keep else x.new_empty(0)), rstd_n, rstd_x


@_release_both.register_fake
def _(
    x: Tensor,
    a: Tensor,
    s: Tensor,
    routed: Tensor,
    dst: Tensor | None,
    src: Tensor | None,
    combine: Tensor | None,
    weight_n: Tensor,
    weight_x: Tensor,
    eps: float,
    unit_offset: bool,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    n = torch.empty_like(x) if keep else x.new_empty(0)
    return torch.empty_like(x), torch.empty_like(x), torch.empty_like(x), n, new_rstd(x), new_rstd(x)


@torch.library.custom_op("farskip::release_both_backward", mutates_args=())
def _release_both_backward(
    grad_full: Tensor,
    grad_u: Tensor,
    grad_v: Tensor,
    full: Tensor,
    n: Tensor,
    rstd_x: Tensor,
    rstd_n: Tensor,
    weight_x: Tensor,
    weight_n: Tensor,
    unit_offset: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arguments = (grad_full, grad_u, grad_v, full, n, rstd_x, rstd_n, weight_x, weight_n, unit_offset)
    if backend == "triton":
        from farskip.triton_kernels.release_both_triton import release_both_backward_triton

        return release_both_backward_triton(*arguments)
    return release_both_backward_reference(*arguments)


@_release_both_backward.register_fake
def _(
    grad_full: Tensor,
    grad_u: Tensor,
    grad_v: Tensor,
    full: Tensor,
    n: Tensor,
    rstd_x: Tensor,
    rstd_n: Tensor,
    weight_x: Tensor,
    weight_n: Tensor,
    unit_offset: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(full), torch.empty_like(full), torch.empty_like(weight_x), torch.empty_like(weight_n)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _x, _a, _s, routed, dst, src, combine, weight_n, weight_x, _eps, ctx.unit_offset, _keep, ctx.backend = inputs
    full, _u, _v, n, rstd_n, rstd_x = output
    kept = routed if combine is not None and ctx.needs_input_grad[6] else None
    ctx.rows_dtype = routed.dtype
    ctx.save_for_backward(full, n, rstd_x, rstd_n, weight_x, weight_n, kept, dst, src, combine)
    ctx.mark_non_differentiable(n, rstd_n, rstd_x)


def _backward(ctx: Any, grad_full: Tensor, grad_u: Tensor, grad_v: Tensor, *_rest: Any) -> Any:
    *saved, routed, dst, src, combine = ctx.saved_tensors
    grads = (grad_full.contiguous(), grad_u.contiguous(), grad_v.contiguous())
    late, prompt, grad_weight_x, grad_weight_n = _release_both_backward(*grads, *saved, ctx.unit_offset, ctx.backend)
    grad_routed, grad_combine = routed_gradients(late, routed, dst, src, combine, ctx.rows_dtype, ctx.backend)
    return prompt, prompt, prompt, grad_routed, None, None, grad_combine, grad_weight_n, grad_weight_x, *[None] * 4


_release_both.register_autograd(_backward, setup_context=_save)
