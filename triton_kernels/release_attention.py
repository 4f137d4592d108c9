"""The two-stream update that releases the next attention while routed outputs are in flight.

Decides: n' is written to memory only where a backward will want it. Without shared experts the update is a plain
`add_rms_norm`, and is run as one. The bracketing is specified in `release_attention_reference.py`.

Legend: T tokens, H hidden size.
"""

from typing import Any

import torch
from torch import Tensor

from farskip.triton_kernels.add_rms_norm import add_rms_norm, as_rows, check_streams, new_rstd, through_norm
from farskip.triton_kernels.backend import choose_backend, needs_gradient
from farskip.triton_kernels.release_attention_reference import release_attention_reference


def release_attention(
    x: Tensor,
    a: Tensor,
    s: Tensor | None,
    weight: Tensor,
    eps: float,
    *,
    unit_offset: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """y = x + a and the norm of n' = y + s, each rounded to the storage dtype.

    Args:
        x: The full stream at the layer's entry, [..., H].
        a: Attention's output, as `x`.
        s: The shared experts' output, as `x`; None where there are none, or where s is in flight too: n' is then y.
        weight: [H], of the next layer's input norm.
        eps: Added to the mean square.
        unit_offset: Whether the gain is 1 + weight (Gemma).
        backend: "reference", "triton", or None to choose by device.

    Returns:
        y, for `release_router`, and the norm of n', for the next attention; both as `x`.

    Raises:
        ValueError: Shapes or dtypes do not fit.

    Note:
        No host synchronization. Deterministic. For a backward it keeps n' and 1/rms; x and a receive one and the same
        gradient tensor.
    """
    if s is None:
        return add_rms_norm(x, a, weight, eps, unit_offset=unit_offset, backend=backend)
    check_streams({"x": x, "a": a, "s": s}, weight)
    backend = choose_backend(backend, x)
    keep = needs_gradient(x, a, s, weight)
    y, normed, _, _ = _release_attention(
        as_rows(x), as_rows(a), as_rows(s), weight.contiguous(), eps, unit_offset, keep, backend
    )
    return y.view(x.shape), normed.view(x.shape)


@torch.library.custom_op("farskip::release_attention", mutates_args=())
def _release_attention(
    x: Tensor, a: Tensor, s: Tensor, weight: Tensor, eps: float, unit_offset: bool, keep: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if backend == "triton":
        from farskip.triton_kernels.release_attention_triton import release_attention_triton

        return release_attention_triton(x, a, s, weight, eps, unit_offset, keep)
    y, normed, n, rstd = release_attention_reference(x, a, s, weight, eps, unit_offset)
    return y, normed, (n if keep else x.new_empty(0)), rstd


@_release_attention.register_fake
def _(
    x: Tensor, a: Tensor, s: Tensor, weight: Tensor, eps: float, unit_offset: bool, keep: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = torch.empty_like(x) if keep else x.new_empty(0)
    return torch.empty_like(x), torch.empty_like(x), n, new_rstd(x)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _x, _a, _s, weight, _eps, ctx.unit_offset, _keep, ctx.backend = inputs
    _y, _normed, n, rstd = output
    ctx.save_for_backward(n, rstd, weight)
    ctx.mark_non_differentiable(n, rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Tensor | None, grad_normed: Tensor | None, _n: Any, _rstd: Any) -> Any:
    n, rstd, weight = ctx.saved_tensors
    grad_n, grad, grad_weight = through_norm(
        grad_normed, grad_y, n, rstd, weight, ctx.unit_offset, ctx.backend, split=True
    )
    return grad, grad, grad_n, grad_weight, None, None, None, None


_release_attention.register_autograd(_backward, setup_context=_save)
