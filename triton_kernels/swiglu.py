"""SwiGLU of an expert's packed gate and up projection, with the routing weight of each row if wanted.

Decides: where the routing weight acts here, the combine only sums, no expert output needs to be kept for the weights'
gradient, and the gradient is an inner product as wide as the expert instead of the stream. The formula is specified in
`swiglu_reference.py`.

Legend: R rows, I expert's intermediate size.
"""

from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor

from farskip.triton_kernels.backend import choose_backend
from farskip.triton_kernels.swiglu_reference import SwigluRule, swiglu_backward_reference, swiglu_reference


def swiglu(
    h: Tensor,
    *,
    weights: Tensor | None = None,
    interleaved: bool = False,
    limit: float | None = None,
    alpha: float = 1.0,
    up_offset: float = 0.0,
    num_rows: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """g * sigmoid(alpha * g) * (u + up_offset), times the row's weight if there are weights; rounded once.

    Args:
        h: Gate and up, [R, 2 I].
        weights: [R], fp32 advised; from `permute_weights`. None for none.
        interleaved: Whether gate and up alternate; else gate is the first half.
        limit: Cut of g from above and of u on both sides (GPT-OSS); None for none.
        alpha: Slope inside the sigmoid.
        up_offset: Added to u.
        num_rows: One integer on the device; rows from it on count as absent and give zero. None: all count.
        backend: "reference", "triton", or None to choose by device.

    Returns:
        [R, I] in the dtype of `h`.

    Raises:
        ValueError: Shapes or settings do not fit.

    Note:
        No host synchronization. Deterministic. Keeps `h` and `weights` for the backward.
    """
    if h.ndim != 2 or h.shape[1] % 2 or not h.is_floating_point():
        raise ValueError(f"h must be a floating-point [rows, 2 * size] matrix, got {h.dtype} {list(h.shape)}")
    if weights is not None and weights.shape != h.shape[:1]:
        raise ValueError(f"weights must be [{len(h)}], one per row of h, got {list(weights.shape)}")
    if limit is not None and limit <= 0:
        raise ValueError(f"limit {limit} must be above 0; None means no limit")
    if num_rows is not None and (num_rows.numel() != 1 or num_rows.is_floating_point()):
        raise ValueError(f"num_rows must be one integer on the device, got {num_rows.dtype} {list(num_rows.shape)}")
    backend = choose_backend(backend, h)
    weights = None if weights is None else weights.contiguous()
    num_rows = None if num_rows is None else num_rows.reshape(1)
    return _swiglu(h.contiguous(), weights, num_rows, interleaved, limit, alpha, up_offset, backend)


@torch.library.custom_op("farskip::swiglu", mutates_args=())
def _swiglu(
    h: Tensor,
    weights: Tensor | None,
    num_rows: Tensor | None,
    interleaved: bool,
    limit: float | None,
    alpha: float,
    up_offset: float,
    backend: str,
) -> Tensor:
    rule = SwigluRule(interleaved=interleaved, limit=limit, alpha=alpha, up_offset=up_offset)
    if backend == "triton":
        from farskip.triton_kernels.swiglu_triton import swiglu_triton

        return swiglu_triton(h, weights, num_rows, rule)
    return swiglu_reference(h, weights, num_rows, rule)


@_swiglu.register_fake
def _(h: Tensor, *_rest: Any) -> Tensor:
    return h.new_empty(h.shape[0], h.shape[1] // 2)


@torch.library.custom_op("farskip::swiglu_backward", mutates_args=())
def _swiglu_backward(
    grad: Tensor,
    h: Tensor,
    weights: Tensor | None,
    num_rows: Tensor | None,
    interleaved: bool,
    limit: float | None,
    alpha: float,
    up_offset: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    rule = SwigluRule(interleaved=interleaved, limit=limit, alpha=alpha, up_offset=up_offset)
    if backend == "triton":
        from farskip.triton_kernels.swiglu_triton import swiglu_backward_triton

        return swiglu_backward_triton(grad, h, weights, num_rows, rule)
    return swiglu_backward_reference(grad, h, weights, num_rows, rule)


@_swiglu_backward.register_fake
def _(grad: Tensor, h: Tensor, weights: Tensor | None, *_rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(h), (h.new_empty(0) if weights is None else torch.empty_like(weights))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    h, weights, num_rows, interleaved, limit, alpha, up_offset, ctx.backend = inputs
    ctx.rule = SwigluRule(interleaved=interleaved, limit=limit, alpha=alpha, up_offset=up_offset)
    ctx.save_for_backward(h, weights, num_rows)


def _backward(ctx: Any, grad: Tensor) -> Any:
    h, weights, num_rows = ctx.saved_tensors
    grad_h, grad_weights = _swiglu_backward(grad.contiguous(), h, weights, num_rows, *astuple(ctx.rule), ctx.backend)
    return grad_h, (None if weights is None else grad_weights), *[None] * 6


_swiglu.register_autograd(_backward, setup_context=_save)
