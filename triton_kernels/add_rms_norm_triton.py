# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""RMSNorm, alone and behind an add, in Triton; and the norm backward that all ops with one norm share.

Decides: one row per program, held whole. The backward gives each program a run of rows and one partial sum of the
weight's gradient; the partial sums are added afterwards in a fixed order. The compiler may not fuse multiplies and adds
on its own account: a rounding that comes and goes with the surroundings would tell fused from separate ops.

Legend: T tokens, H hidden size, N programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from farskip.triton_kernels.common_triton import (
    norm_row,
    norm_row_backward,
    on_device,
    rounded,
    row_config,
    to_storage,
)

MAX_BACKWARD_PROGRAMS = 264
"""Two for each multiprocessor of an H200; a constant, so that sums do not depend on the machine."""


@triton.jit
def add_rms_norm_kernel(
    x_ptr,
    a_ptr,
    weight_ptr,
    y_ptr,
    normed_ptr,
    rstd_ptr,
    eps,
    NUM_COLS: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    HAS_ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = x + a and its norm, one row."""
    dtype: tl.constexpr = normed_ptr.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    mask = col < NUM_COLS
    at = token * NUM_COLS + col
    y = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_ADD:
        y = rounded(y + tl.load(a_ptr + at, mask=mask, other=0.0).to(tl.float32), dtype)
        tl.store(y_ptr + at, to_storage(y, dtype), mask=mask)
    gain = tl.load(weight_ptr + col, mask=mask, other=0.0).to(tl.float32)
    normed, rstd = norm_row(y, gain, NUM_COLS, eps, UNIT_OFFSET, dtype)
    tl.store(normed_ptr + at, to_storage(normed, dtype), mask=mask)
    tl.store(rstd_ptr + token, rstd)


@triton.jit
def norm_backward_kernel(
    grad_normed_ptr,
    grad_stream_ptr,
    z_ptr,
    rstd_ptr,
    weight_ptr,
    grad_z_ptr,
    grad_sum_ptr,
    grad_gain_ptr,
    num_tokens,
    program_rows,
    NUM_COLS: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    STORE_Z: tl.constexpr,
    HAS_STREAM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient through the norm, rounded; that plus the stream's own gradient, rounded; a share of the weight's."""
    dtype: tl.constexpr = z_ptr.dtype.element_ty
    program = tl.program_id(0)
    col = tl.arange(0, BLOCK)
    mask = col < NUM_COLS
    gain = tl.load(weight_ptr + col, mask=mask, other=0.0).to(tl.float32)
    grad_gain = tl.zeros([BLOCK], tl.float32)
    last = tl.minimum((program + 1) * program_rows, num_tokens)
    for token in range(program * program_rows, last):
        at = tl.cast(token, tl.int64) * NUM_COLS + col
        z = tl.load(z_ptr + at, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_normed_ptr + at, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + token)
        grad_z, grad_gain_row = norm_row_backward(z, gain, grad, rstd, NUM_COLS, UNIT_OFFSET, dtype)
        grad_gain += grad_gain_row
        grad_z = rounded(grad_z, dtype)
        if STORE_Z:
            tl.store(grad_z_ptr + at, to_storage(grad_z, dtype), mask=mask)
        if HAS_STREAM:
            stream = tl.load(grad_stream_ptr + at, mask=mask, other=0.0).to(tl.float32)
            tl.store(grad_sum_ptr + at, to_storage(stream + grad_z, dtype), mask=mask)
    tl.store(grad_gain_ptr + tl.cast(program, tl.int64) * NUM_COLS + col, grad_gain, mask=mask)


def backward_programs(num_tokens: int) -> tuple[int, int]:
    """Number of programs of a norm backward, and rows for each."""
    rows = triton.cdiv(num_tokens, MAX_BACKWARD_PROGRAMS)
    return triton.cdiv(num_tokens, max(1, rows)), rows


def add_norm_triton(
    x_TH: Tensor, a_TH: Tensor | None, weight_H: Tensor, eps: float, unit_offset: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `add_norm_reference`. All tensors contiguous."""
    num_tokens, num_cols = x_TH.shape
    y_TH = x_TH.new_empty(0) if a_TH is None else torch.empty_like(x_TH)
    normed_TH = torch.empty_like(x_TH)
    rstd_T = torch.empty(num_tokens, dtype=torch.float32, device=x_TH.device)
    if num_tokens:
        block, num_warps = row_config(num_cols)
        with on_device(x_TH):
            add_rms_norm_kernel[(num_tokens,)](
                x_TH,
                a_TH,
                weight_H,
                y_TH,
                normed_TH,
                rstd_T,
                eps,
                NUM_COLS=num_cols,
                UNIT_OFFSET=unit_offset,
                HAS_ADD=a_TH is not None,
                BLOCK=block,
                num_warps=num_warps,
                enable_fp_fusion=False,
            )
    return y_TH, normed_TH, rstd_T


def norm_backward_triton(
    grad_normed_TH: Tensor,
    grad_stream_TH: Tensor | None,
    z_TH: Tensor,
    rstd_T: Tensor,
    weight_H: Tensor,
    unit_offset: bool,
    keep_z: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `norm_backward` in `add_rms_norm.py`. All tensors contiguous."""
    num_tokens, num_cols = z_TH.shape
    empty = z_TH.new_empty(0)
    grad_z_TH = torch.empty_like(z_TH) if keep_z else empty
    grad_sum_TH = z_TH.new_empty(0) if grad_stream_TH is None else torch.empty_like(z_TH)
    programs, program_rows = backward_programs(num_tokens)
    grad_gain_NH = torch.empty(programs, num_cols, dtype=torch.float32, device=z_TH.device)
    if num_tokens:
        block, num_warps = row_config(num_cols)
        with on_device(z_TH):
            norm_backward_kernel[(programs,)](
                grad_normed_TH,
                grad_stream_TH,
                z_TH,
                rstd_T,
                weight_H,
                grad_z_TH,
                grad_sum_TH,
                grad_gain_NH,
                num_tokens,
                program_rows,
                NUM_COLS=num_cols,
                UNIT_OFFSET=unit_offset,
                STORE_Z=keep_z,
                HAS_STREAM=grad_stream_TH is not None,
                BLOCK=block,
                num_warps=num_warps,
                enable_fp_fusion=False,
            )
    return grad_z_TH, grad_sum_TH, grad_gain_NH.sum(0).to(weight_H.dtype)
