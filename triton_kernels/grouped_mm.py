"""Grouped matmul: each expert's rows times that expert's matrix.

Decides: torch's grouped matmul on a GPU, a plain loop on CPU (there it is several times faster than torch's) and for
what torch's cannot do: fp64, and sizes whose rows are no multiple of 16 bytes. The wrapper repairs three things: rows
behind the last segment are zero instead of uninitialized, gradients are made contiguous, and an empty problem is none.

Legend: R rows, E experts, D and N the matrices' sizes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from farskip.triton_kernels.backend import triton_installed
from farskip.triton_kernels.grouped_mm_reference import grouped_mm_reference, grouped_outer_reference

GROUPED_BACKENDS = ("reference", "torch")


def choose_grouped_backend(backend: str | None, a: Tensor, b: Tensor) -> str:
    """Name the implementation that will run.

    Args:
        backend: "reference" (a loop that asks the device for the offsets), "torch", or None for the choice by device,
            dtype and sizes.
        a: [R, D].
        b: [E, D, N].

    Returns:
        "reference" or "torch".

    Raises:
        ValueError: The name is unknown, or torch's cannot do it.
    """
    if backend is not None and backend not in GROUPED_BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; choose one of {', '.join(GROUPED_BACKENDS)} or None")
    obstacle = _obstacle(a, b)
    if backend is None:
        return "torch" if a.is_cuda and obstacle is None else "reference"
    if backend == "torch" and obstacle is not None:
        raise ValueError(f"backend 'torch' of grouped_mm cannot take {obstacle}; use backend='reference'")
    return backend


def _obstacle(a: Tensor, b: Tensor) -> str | None:
    """What torch's grouped matmul cannot take, in words."""
    if a.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{a.dtype}"
    if a.is_cuda and a.dtype != torch.bfloat16:
        return f"{a.dtype} on CUDA"
    for size in b.shape[1:]:
        if size * a.element_size() % 16:
            return f"rows of {size} x {a.element_size()} bytes, no multiple of 16"
    return None


def grouped_mm(a: Tensor, b: Tensor, offsets: Tensor, *, backend: str | None = None) -> Tensor:
    """The rows of segment e, from offsets[e - 1] to offsets[e], times b[e].

    Args:
        a: [R, D], rows by expert.
        b: [E, D, N], one matrix per expert; a transposed view is taken as it is.
        offsets: [E] int32, end of each expert's segment: `padded_offsets` of the dispatch map.
        backend: "reference", "torch", or None to choose by device, see `choose_grouped_backend`.

    Returns:
        [R, N]; rows behind the last segment are zero, and so are their gradients.

    Raises:
        ValueError: Shapes or dtypes do not fit.

    Note:
        No host synchronization with "torch"; "reference" reads the offsets on the host. Keeps a and b.
    """
    if a.ndim != 2 or b.ndim != 3 or a.shape[1] != b.shape[1] or a.dtype != b.dtype:
        raise ValueError(
            f"a must be [rows, D] and b [experts, D, N] of one dtype, got {a.dtype} {list(a.shape)} and "
            f"{b.dtype} {list(b.shape)}"
        )
    if offsets.shape != b.shape[:1] or offsets.dtype != torch.int32:
        raise ValueError(f"offsets must be int32 [{len(b)}], one per expert, got {offsets.dtype} {list(offsets.shape)}")
    return _grouped_mm(a.contiguous(), b, offsets.contiguous(), choose_grouped_backend(backend, a, b))


def product(a: Tensor, b: Tensor, offsets: Tensor, backend: str) -> Tensor:
    """[R, N], rows behind the last segment zero."""
    if backend == "reference":
        return grouped_mm_reference(a, b, offsets)
    if len(a) == 0:
        return a.new_zeros(0, b.shape[2])
    out = F.grouped_mm(a, _aligned(b), offs=offsets)
    _zero_tail(out, offsets)
    return out


def outer(a: Tensor, grad: Tensor, offsets: Tensor, backend: str) -> Tensor:
    """[E, D, N], gradient of the matrices."""
    if backend == "reference":
        return grouped_outer_reference(a, grad, offsets)
    if len(a) == 0:
        return a.new_zeros(len(offsets), a.shape[1], grad.shape[1])
    return F.grouped_mm(a.T, grad, offs=offsets)


def _aligned(b: Tensor) -> Tensor:
    """torch's takes each matrix by rows or by columns, nothing in between."""
    rows_of_columns = b.stride(2) == 1 and b.stride(1) >= b.shape[2]
    columns_of_rows = b.stride(1) == 1 and b.stride(2) >= b.shape[1]
    whole = all(stride * b.element_size() % 16 == 0 for stride in b.stride() if stride != 1)
    return b if (rows_of_columns or columns_of_rows) and whole and b.data_ptr() % 16 == 0 else b.contiguous()


def _zero_tail(out: Tensor, offsets: Tensor) -> None:
    if out.is_cuda and triton_installed():
        from farskip.triton_kernels.grouped_mm_triton import zero_tail_triton

        zero_tail_triton(out, offsets)
    else:
        out.masked_fill_((torch.arange(len(out), device=out.device) >= offsets[-1])[:, None], 0)


@torch.library.custom_op("farskip::grouped_mm", mutates_args=())
def _grouped_mm(a: Tensor, b: Tensor, offsets: Tensor, backend: str) -> Tensor:
    return product(a, b, offsets, backend)


@_grouped_mm.register_fake
def _(a: Tensor, b: Tensor, offsets: Tensor, backend: str) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[2])


@torch.library.custom_op("farskip::grouped_outer", mutates_args=())
def _grouped_outer(a: Tensor, grad: Tensor, offsets: Tensor, backend: str) -> Tensor:
    return outer(a, grad, offsets, backend)


@_grouped_outer.register_fake
def _(a: Tensor, grad: Tensor, offsets: Tensor, backend: str) -> Tensor:
    return a.new_empty(offsets.shape[0], a.shape[1], grad.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, offsets, ctx.backend = inputs
    wants_a, wants_b, *_ = ctx.needs_input_grad
    ctx.save_for_backward(a if wants_b else None, b if wants_a else None, offsets)


def _backward(ctx: Any, grad: Tensor) -> Any:
    a, b, offsets = ctx.saved_tensors
    grad = grad.contiguous()  # torch's refuses an expanded gradient
    grad_a = None if b is None else _grouped_mm(grad, b.transpose(1, 2), offsets, ctx.backend)
    grad_b = None if a is None else _grouped_outer(a, grad, offsets, ctx.backend)
    return grad_a, grad_b, None, None


_grouped_mm.register_autograd(_backward, setup_context=_save)
