"""Down projection and weighted combine as one op, whose backward needs no stored expert output.

Decides: the weights act at the combine, as in the model's own definition, yet their gradient is taken inside the
expert: with dA' the gradient of the weighted rows brought back through the projection, dw = <A, dA'>, dA = w dA' and
dW = (w A)^T do. So the expert outputs, R x H, the largest tensor of an MoE layer, live only during the forward.

Legend: T tokens, K experts per token, R rows, E experts, I expert's intermediate size, H hidden size.
"""

from typing import Any

import torch
from torch import Tensor

from farskip.triton_kernels.backend import choose_backend
from farskip.triton_kernels.dispatch_map import DispatchMap
from farskip.triton_kernels.grouped_mm import choose_grouped_backend, outer, product
from farskip.triton_kernels.unpermute import apply_permute, apply_unpermute, check_rows, check_weights
from farskip.triton_kernels.unpermute_reference import wide_dtype


def down_combine(
    activations: Tensor,
    down: Tensor,
    dispatch: DispatchMap,
    weights: Tensor,
    *,
    backend: str | None = None,
    mm_backend: str | None = None,
) -> Tensor:
    """unpermute(grouped_mm(activations, down), weights), keeping the activations instead of the outputs.

    Args:
        activations: [R, I], from `swiglu` without weights.
        down: [E, I, H].
        dispatch: The map that placed the rows.
        weights: [T, K], fp32 advised.
        backend: Of the combine: "reference", "triton", or None to choose by device.
        mm_backend: Of the products, see `choose_grouped_backend`.

    Returns:
        [T, H] in the dtype of `activations`.

    Raises:
        ValueError: Shapes or dtypes do not fit.
    """
    check_rows("activations", activations, dispatch)
    check_weights(weights, dispatch)
    if down.ndim != 3 or down.shape[1] != activations.shape[1] or down.dtype != activations.dtype:
        raise ValueError(
            f"down must be [experts, {activations.shape[1]}, hidden] of {activations.dtype}, got {down.dtype} "
            f"{list(down.shape)}"
        )
    return _down_combine(
        activations.contiguous(),
        down,
        dispatch.dst,
        dispatch.src,
        dispatch.padded_offsets,
        weights.contiguous(),
        choose_backend(backend, activations),
        choose_grouped_backend(mm_backend, activations, down),
    )


@torch.library.custom_op("farskip::down_combine", mutates_args=())
def _down_combine(
    activations: Tensor,
    down: Tensor,
    dst: Tensor,
    src: Tensor,
    offsets: Tensor,
    weights: Tensor,
    backend: str,
    mm_backend: str,
) -> Tensor:
    return apply_unpermute(product(activations, down, offsets, mm_backend), dst, src, weights, backend)


@_down_combine.register_fake
def _(activations: Tensor, down: Tensor, dst: Tensor, *_rest: Any) -> Tensor:
    return activations.new_empty(dst.shape[0], down.shape[2])


@torch.library.custom_op("farskip::down_combine_backward", mutates_args=())
def _down_combine_backward(
    grad: Tensor,
    activations: Tensor,
    down: Tensor,
    dst: Tensor,
    src: Tensor,
    offsets: Tensor,
    weights: Tensor,
    backend: str,
    mm_backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = wide_dtype(activations)
    slots, rows_of_slots = weights.reshape(-1, 1), dst.reshape(-1, 1)
    weight_of_row = apply_permute(slots, rows_of_slots, src, None, backend).to(wide)
    grad_rows = apply_permute(grad, dst, src, None, backend)
    back = product(grad_rows, down.transpose(1, 2), offsets, mm_backend).to(wide)
    dot_of_row = (back * activations.to(wide)).sum(1, keepdim=True)
    grad_weights = apply_unpermute(dot_of_row, rows_of_slots, src, None, backend).view_as(weights)
    grad_activations = (back * weight_of_row).to(activations.dtype)
    weighted = (activations.to(wide) * weight_of_row).to(activations.dtype)
    grad_down = outer(weighted, grad_rows, offsets, mm_backend)
    return grad_activations, grad_down, grad_weights.to(weights.dtype)


@_down_combine_backward.register_fake
def _(
    grad: Tensor,
    activations: Tensor,
    down: Tensor,
    dst: Tensor,
    src: Tensor,
    offsets: Tensor,
    weights: Tensor,
    backend: str,
    mm_backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(activations), down.new_empty(down.shape), torch.empty_like(weights)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.backend, ctx.mm_backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> Any:
    grads = _down_combine_backward(grad.contiguous(), *ctx.saved_tensors, ctx.backend, ctx.mm_backend)
    grad_activations, grad_down, grad_weights = grads
    return grad_activations, grad_down, None, None, None, grad_weights, None, None


_down_combine.register_autograd(_backward, setup_context=_save)
