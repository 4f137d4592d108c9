# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""The update that releases the next router, in Triton: combine, shared expert, residual and norm in one pass.

Its backward is one pass too: the rows that were copied from the norm summed per token, the other readers' gradients,
norm and residual. It runs as `norm_backward_kernel` does, a run of rows per program, so that it has the same bits.

Legend: T tokens, K experts per token, R rows, H hidden size, N programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from farskip.triton_kernels.add_rms_norm_triton import backward_programs
from farskip.triton_kernels.common_triton import (
    columns,
    combine_rows,
    norm_row,
    norm_row_backward,
    on_device,
    rounded,
    row_config,
    to_storage,
)


@triton.jit
def load_routed(
    routed_ptr,
    dst_ptr,
    combine_ptr,
    token,
    col,
    mask,
    NUM_COLS: tl.constexpr,
    K: tl.constexpr,
    HAS_MAP: tl.constexpr,
    HAS_COMBINE: tl.constexpr,
):
    """The routed output of one token, rounded as `unpermute` would have stored it, in the rows' dtype; K 0 without a
    map."""
    if HAS_MAP:
        like = col.to(tl.float32)
        r = combine_rows(routed_ptr, dst_ptr, combine_ptr, token, None, col, mask, NUM_COLS, K, HAS_COMBINE, like)
        return rounded(r, routed_ptr.dtype.element_ty)
    return tl.load(routed_ptr + token * NUM_COLS + col, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def release_router_kernel(
    y_ptr,
    s_ptr,
    routed_ptr,
    dst_ptr,
    combine_ptr,
    weight_ptr,
    x_ptr,
    normed_ptr,
    rstd_ptr,
    eps,
    NUM_COLS: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    HAS_MAP: tl.constexpr,
    HAS_COMBINE: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x' = y + (r + s) and its norm, one row."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    col = columns(routed_ptr, x_ptr, BLOCK)
    mask = col < NUM_COLS
    at = token * NUM_COLS + col
    r = load_routed(routed_ptr, dst_ptr, combine_ptr, token, col, mask, NUM_COLS, K, HAS_MAP, HAS_COMBINE)
    if HAS_SHARED:
        r = rounded(r + tl.load(s_ptr + at, mask=mask, other=0.0).to(tl.float32), dtype)
    x = rounded(tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32) + r, dtype)
    gain = tl.load(weight_ptr + col, mask=mask, other=0.0).to(tl.float32)
    normed, rstd = norm_row(x, gain, NUM_COLS, eps, UNIT_OFFSET, dtype)
    tl.store(x_ptr + at, to_storage(x, dtype), mask=mask)
    tl.store(normed_ptr + at, to_storage(normed, dtype), mask=mask)
    tl.store(rstd_ptr + token, rstd)


@triton.jit
def release_router_backward_kernel(
    grad_ptr,
    before_ptr,
    rows_ptr,
    dst_ptr,
    after_ptr,
    x_ptr,
    rstd_ptr,
    weight_ptr,
    grad_x_ptr,
    grad_gain_ptr,
    num_tokens,
    program_rows,
    NUM_COLS: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    HAS_STREAM: tl.constexpr,
    HAS_BEFORE: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_MAP: tl.constexpr,
    HAS_AFTER: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient of x' and a share of the weight's, a run of rows."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    program = tl.program_id(0)
    if HAS_ROWS:
        col = columns(rows_ptr, x_ptr, BLOCK)
    else:
        col = tl.arange(0, BLOCK)
    mask = col < NUM_COLS
    gain = tl.load(weight_ptr + col, mask=mask, other=0.0).to(tl.float32)
    grad_gain = tl.zeros([BLOCK], tl.float32)
    last = tl.minimum((program + 1) * program_rows, num_tokens)
    for index in range(program * program_rows, last):
        token = tl.cast(index, tl.int64)
        at = token * NUM_COLS + col
        if HAS_BEFORE:
            grad = tl.load(before_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if HAS_ROWS:
            rows = load_routed(rows_ptr, dst_ptr, None, token, col, mask, NUM_COLS, K, HAS_MAP, False)
            if HAS_BEFORE:
                grad = rounded(grad + rows, dtype)
            else:
                grad = rows
        if HAS_AFTER:
            after = tl.load(after_ptr + at, mask=mask, other=0.0).to(tl.float32)
            if HAS_BEFORE or HAS_ROWS:
                grad = rounded(grad + after, dtype)
            else:
                grad = after
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + token)
        grad_x, grad_gain_row = norm_row_backward(x, gain, grad, rstd, NUM_COLS, UNIT_OFFSET, dtype)
        grad_gain += grad_gain_row
        grad_x = rounded(grad_x, dtype)
        if HAS_STREAM:
            grad_x += tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + at, to_storage(grad_x, dtype), mask=mask)
    tl.store(grad_gain_ptr + tl.cast(program, tl.int64) * NUM_COLS + col, grad_gain, mask=mask)


def release_router_triton(
    y_TH: Tensor,
    s_TH: Tensor | None,
    routed: Tensor,
    dst_TK: Tensor | None,
    combine_TK: Tensor | None,
    weight_H: Tensor,
    eps: float,
    unit_offset: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `release_router_reference`. All tensors contiguous."""
    num_tokens, num_cols = y_TH.shape
    x_TH, normed_TH = torch.empty_like(y_TH), torch.empty_like(y_TH)
    rstd_T = torch.empty(num_tokens, dtype=torch.float32, device=y_TH.device)
    if num_tokens:
        block, num_warps = row_config(num_cols)
        with on_device(y_TH):
            release_router_kernel[(num_tokens,)](
                y_TH,
                s_TH,
                routed,
                dst_TK,
                combine_TK,
                weight_H,
                x_TH,
                normed_TH,
                rstd_T,
                eps,
                NUM_COLS=num_cols,
                UNIT_OFFSET=unit_offset,
                HAS_SHARED=s_TH is not None,
                HAS_MAP=dst_TK is not None,
                HAS_COMBINE=combine_TK is not None,
                K=0 if dst_TK is None else dst_TK.shape[1],
                BLOCK=block,
                num_warps=num_warps,
                enable_fp_fusion=False,
            )
    return x_TH, normed_TH, rstd_T


def release_router_backward_triton(
    grad_TH: Tensor | None,
    before_TH: Tensor | None,
    rows: Tensor | None,
    dst_TK: Tensor | None,
    after_TH: Tensor | None,
    x_TH: Tensor,
    rstd_T: Tensor,
    weight_H: Tensor,
    unit_offset: bool,
) -> tuple[Tensor, Tensor]:
    """See `release_router_backward_reference`. All tensors contiguous."""
    num_tokens, num_cols = x_TH.shape
    grad_x_TH = torch.empty_like(x_TH)
    programs, program_rows = backward_programs(num_tokens)
    grad_gain_NH = torch.empty(programs, num_cols, dtype=torch.float32, device=x_TH.device)
    if num_tokens:
        block, num_warps = row_config(num_cols)
        with on_device(x_TH):
            release_router_backward_kernel[(programs,)](
                grad_TH,
                before_TH,
                rows,
                dst_TK,
                after_TH,
                x_TH,
                rstd_T,
                weight_H,
                grad_x_TH,
                grad_gain_NH,
                num_tokens,
                program_rows,
                NUM_COLS=num_cols,
                UNIT_OFFSET=unit_offset,
                HAS_STREAM=grad_TH is not None,
                HAS_BEFORE=before_TH is not None,
                HAS_ROWS=rows is not None,
                HAS_MAP=dst_TK is not None,
                HAS_AFTER=after_TH is not None,
                K=0 if dst_TK is None else dst_TK.shape[1],
                BLOCK=block,
                num_warps=num_warps,
                enable_fp_fusion=False,
            )
    return grad_x_TH, grad_gain_NH.sum(0).to(weight_H.dtype)
