"""Combine: each token's expert rows summed, with or without weights; the inverse of `permute`.

Decides: what is kept for the backward. The rows are kept only where the weights want a gradient from here. Where the
weights already acted on the experts' activations (`swiglu(..., weights=)`), combine without weights: no expert output
is kept and the weights get their gradient inside the expert. `down_combine` does the same for weights that act here.

Legend: T tokens, K experts per token, R rows, H hidden size.
"""

from typing import Any

import torch
from torch import Tensor

from farskip.triton_kernels.backend import choose_backend
from farskip.triton_kernels.dispatch_map import DispatchMap
from farskip.triton_kernels.permute_reference import permute_reference
from farskip.triton_kernels.unpermute_reference import unpermute_backward_reference, unpermute_reference


def unpermute(
    rows: Tensor, dispatch: DispatchMap, weights: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """Sum each token's rows: o_t = sum over k of w_tk * rows[dst_tk], in fp32 from k = 0 on, rounded once.

    Args:
        rows: Rows of all experts, [R, H].
        dispatch: The map that placed them.
        weights: [T, K], fp32 advised, or None for a plain sum.
        backend: "reference", "triton", or None to choose by device.

    Returns:
        [T, H] in the dtype of `rows`.

    Raises:
        ValueError: Shapes do not fit the map.

    Note:
        No host synchronization. Deterministic. Keeps `rows` for the backward only if `weights` wants a gradient.
    """
    check_rows("rows", rows, dispatch)
    check_weights(weights, dispatch)
    backend = choose_backend(backend, rows)
    weights = None if weights is None else weights.contiguous()
    return apply_unpermute(rows.contiguous(), dispatch.dst, dispatch.src, weights, backend)


def check_rows(name: str, rows: Tensor, dispatch: DispatchMap) -> None:
    """Raise unless the rows are as many as the map's."""
    if rows.ndim != 2 or len(rows) != len(dispatch.src):
        raise ValueError(f"{name} must be [{len(dispatch.src)}, hidden], as the map has it, got {list(rows.shape)}")


def check_weights(weights: Tensor | None, dispatch: DispatchMap) -> None:
    """Raise unless the weights have the map's slots."""
    if weights is not None and weights.shape != dispatch.dst.shape:
        raise ValueError(
            f"weights must be {list(dispatch.dst.shape)}, one per slot of the map, got {list(weights.shape)}"
        )


@torch.library.custom_op("farskip::unpermute", mutates_args=())
def apply_unpermute(rows: Tensor, dst: Tensor, src: Tensor, weights: Tensor | None, backend: str) -> Tensor:
    """The op behind `unpermute`."""
    if backend == "triton":
        from farskip.triton_kernels.unpermute_triton import unpermute_triton

        return unpermute_triton(rows, dst, weights)
    return unpermute_reference(rows, dst, weights)


@apply_unpermute.register_fake
def _(rows: Tensor, dst: Tensor, src: Tensor, weights: Tensor | None, backend: str) -> Tensor:
    return rows.new_empty(dst.shape[0], rows.shape[1])


@torch.library.custom_op("farskip::permute", mutates_args=())
def apply_permute(x: Tensor, dst: Tensor, src: Tensor, weights: Tensor | None, backend: str) -> Tensor:
    """The op behind `permute`, and the gradient of `unpermute` for the rows; no gradient for its weights."""
    if backend == "triton":
        from farskip.triton_kernels.permute_triton import permute_triton

        return permute_triton(x, dst, src, weights)
    return permute_reference(x, dst, src, weights)


@apply_permute.register_fake
def _(x: Tensor, dst: Tensor, src: Tensor, weights: Tensor | None, backend: str) -> Tensor:
    return x.new_empty(src.shape[0], x.shape[1])


@torch.library.custom_op("farskip::unpermute_backward", mutates_args=())
def _unpermute_backward(
    grad: Tensor, rows: Tensor, dst: Tensor, src: Tensor, weights: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        from farskip.triton_kernels.unpermute_triton import unpermute_backward_triton

        return unpermute_backward_triton(grad, rows, dst, src, weights)
    grad_rows, grad_weights = unpermute_backward_reference(grad, rows, dst, src, weights)
    assert grad_weights is not None, "rows and weights were given"
    return grad_rows, grad_weights


@_unpermute_backward.register_fake
def _(grad: Tensor, rows: Tensor, dst: Tensor, src: Tensor, weights: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows), torch.empty_like(weights)


def _save_unpermute(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, dst, src, weights, ctx.backend = inputs
    ctx.weights_want_grad = weights is not None and ctx.needs_input_grad[3]
    ctx.save_for_backward(rows if ctx.weights_want_grad else None, dst, src, weights)


def unpermute_gradients(
    grad: Tensor, rows: Tensor | None, dst: Tensor, src: Tensor, weights: Tensor | None, backend: str
) -> tuple[Tensor, Tensor | None]:
    """Gradients of rows and weights; without `rows`, none for the weights. `grad` contiguous."""
    if rows is None or weights is None:
        return apply_permute(grad, dst, src, weights, backend), None
    grad_rows, grad_weights = _unpermute_backward(grad, rows, dst, src, weights, backend)
    return grad_rows, grad_weights


def _backward_unpermute(ctx: Any, grad: Tensor) -> Any:
    rows, dst, src, weights = ctx.saved_tensors
    grad_rows, grad_weights = unpermute_gradients(grad.contiguous(), rows, dst, src, weights, ctx.backend)
    return grad_rows, None, None, grad_weights, None


def _save_permute(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _x, dst, src, weights, ctx.backend = inputs
    assert weights is None, "permute with weights is a gradient and has none of its own"
    ctx.save_for_backward(dst, src)


def _backward_permute(ctx: Any, grad: Tensor) -> Any:
    dst, src = ctx.saved_tensors
    return apply_unpermute(grad.contiguous(), dst, src, None, ctx.backend), None, None, None, None


apply_unpermute.register_autograd(_backward_unpermute, setup_context=_save_unpermute)
apply_permute.register_autograd(_backward_permute, setup_context=_save_permute)
