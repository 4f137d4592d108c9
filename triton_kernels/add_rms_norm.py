"""RMSNorm, alone (`rms_norm`) and behind a residual add (`add_rms_norm`).

Decides: the checks, what is kept for the backward (the normed sum, which is an output anyway, and 1/rms), and the
rounding of the stream's gradient: the norm's share is rounded first, then added, as separate ops would do it.

Legend: T tokens, H hidden size.
"""

from typing import Any

import torch
from torch import Tensor

from farskip.triton_kernels.add_rms_norm_reference import add_norm_reference, norm_backward_reference
from farskip.triton_kernels.backend import choose_backend


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, unit_offset: bool = False, backend: str | None = None) -> Tensor:
    """RMSNorm over the last dimension.

    Args:
        x: [..., H].
        weight: [H].
        eps: Added to the mean square.
        unit_offset: Whether the gain is 1 + weight, computed in fp32 throughout (Gemma).
        backend: "reference", "triton", or None to choose by device.

    Returns:
        As `x`.

    Raises:
        ValueError: Shapes or dtypes do not fit.
    """
    check_streams({"x": x}, weight)
    backend = choose_backend(backend, x)
    _, normed, _ = _add_norm(as_rows(x), None, weight.contiguous(), eps, unit_offset, backend)
    return normed.view(x.shape)


def add_rms_norm(
    x: Tensor, a: Tensor, weight: Tensor, eps: float, *, unit_offset: bool = False, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """y = x + a, rounded to the storage dtype, and the RMSNorm of y.

    Args:
        x: The stream, [..., H].
        a: What is added, as `x`.
        weight: [H].
        eps: Added to the mean square.
        unit_offset: As for `rms_norm`.
        backend: As for `rms_norm`.

    Returns:
        y and its norm, both as `x`.

    Raises:
        ValueError: Shapes or dtypes do not fit.

    Note:
        x and a receive one and the same gradient tensor.
    """
    check_streams({"x": x, "a": a}, weight)
    backend = choose_backend(backend, x)
    y, normed, _ = _add_norm(as_rows(x), as_rows(a), weight.contiguous(), eps, unit_offset, backend)
    return y.view(x.shape), normed.view(x.shape)


def as_rows(x: Tensor) -> Tensor:
    """[..., H] as contiguous [T, H]."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def check_streams(streams: dict[str, Tensor | None], *weights: Tensor) -> None:
    """Raise one line unless all streams have one shape and dtype, and all weights their last dimension."""
    (first, x), *others = [(name, tensor) for name, tensor in streams.items() if tensor is not None]
    if x.ndim < 1 or not x.is_floating_point():
        raise ValueError(f"{first} must be a floating-point [..., hidden] tensor, got {x.dtype} {list(x.shape)}")
    for name, other in others:
        if other.shape != x.shape or other.dtype != x.dtype:
            raise ValueError(
                f"{name} is {other.dtype} {list(other.shape)}, but {first} is {x.dtype} {list(x.shape)}; "
                "make them agree"
            )
    for weight in weights:
        if weight.shape != x.shape[-1:]:
            raise ValueError(f"weight must be [{x.shape[-1]}], the hidden size of {first}, got {list(weight.shape)}")


@torch.library.custom_op("farskip::add_rms_norm", mutates_args=())
def _add_norm(
    x: Tensor, a: Tensor | None, weight: Tensor, eps: float, unit_offset: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "triton":
        from farskip.triton_kernels.add_rms_norm_triton import add_norm_triton

        return add_norm_triton(x, a, weight, eps, unit_offset)
    return add_norm_reference(x, a, weight, eps, unit_offset)


@_add_norm.register_fake
def _(
    x: Tensor, a: Tensor | None, weight: Tensor, eps: float, unit_offset: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    y = x.new_empty(0) if a is None else torch.empty_like(x)
    return y, torch.empty_like(x), new_rstd(x)


def new_rstd(x: Tensor) -> Tensor:
    """An empty 1/rms per row."""
    return x.new_empty(x.shape[0], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


@torch.library.custom_op("farskip::norm_backward", mutates_args=())
def norm_backward(
    grad_normed: Tensor,
    grad_stream: Tensor | None,
    z: Tensor,
    rstd: Tensor,
    weight: Tensor,
    unit_offset: bool,
    keep_z: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of z through its norm, rounded (empty unless `keep_z`); `grad_stream` plus that, rounded (empty without
    `grad_stream`); gradient of the weight."""
    if backend == "triton":
        from farskip.triton_kernels.add_rms_norm_triton import norm_backward_triton

        return norm_backward_triton(grad_normed, grad_stream, z, rstd, weight, unit_offset, keep_z)
    grad_z, grad_weight = norm_backward_reference(grad_normed, z, rstd, weight, unit_offset)
    grad_sum = z.new_empty(0) if grad_stream is None else grad_stream + grad_z
    return (grad_z if keep_z else z.new_empty(0)), grad_sum, grad_weight


@norm_backward.register_fake
def _(
    grad_normed: Tensor,
    grad_stream: Tensor | None,
    z: Tensor,
    rstd: Tensor,
    weight: Tensor,
    unit_offset: bool,
    keep_z: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_z = torch.empty_like(z) if keep_z else z.new_empty(0)
    grad_sum = z.new_empty(0) if grad_stream is None else torch.empty_like(z)
    return grad_z, grad_sum, torch.empty_like(weight)


def through_norm(
    grad_normed: Tensor | None,
    grad_stream: Tensor | None,
    z: Tensor,
    rstd: Tensor,
    weight: Tensor,
    unit_offset: bool,
    backend: str,
    *,
    split: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients where either one may be missing.

    Returns:
        Gradient of what was normed through the norm alone (None unless `split`), the total of it and the stream's own
        gradient, and the gradient of the weight.
    """
    if grad_normed is None:
        return None, grad_stream, None
    grad_normed = grad_normed.contiguous()
    if grad_stream is None:
        grad_z, _, grad_weight = norm_backward(grad_normed, None, z, rstd, weight, unit_offset, True, backend)
        return grad_z, grad_z, grad_weight
    grad_z, grad_sum, grad_weight = norm_backward(
        grad_normed, grad_stream.contiguous(), z, rstd, weight, unit_offset, split, backend
    )
    return (grad_z if split else None), grad_sum, grad_weight


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, a, weight, _eps, ctx.unit_offset, ctx.backend = inputs
    y, _normed, rstd = output
    ctx.added = a is not None
    ctx.save_for_backward(y if ctx.added else x, rstd, weight)
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Tensor | None, grad_normed: Tensor | None, _rstd: Any) -> Any:
    z, rstd, weight = ctx.saved_tensors
    stream = grad_y if ctx.added else None
    _, grad, grad_weight = through_norm(grad_normed, stream, z, rstd, weight, ctx.unit_offset, ctx.backend)
    return grad, (grad if ctx.added else None), grad_weight, None, None, None


_add_norm.register_autograd(_backward, setup_context=_save)
