# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Both two-stream updates at once, in Triton, and their backward with both norms in one pass.

Legend: T tokens, K experts per token, R rows, H hidden size, N programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from farskip.triton_kernels.add_rms_norm_triton import backward_programs
from farskip.triton_kernels.common_triton import (
    columns,
    norm_row,
    norm_row_backward,
    on_device,
    rounded,
    row_config,
    to_storage,
)
from farskip.triton_kernels.release_router_triton import load_routed


@triton.jit
def release_both_kernel(
    x_ptr,
    a_ptr,
    s_ptr,
    routed_ptr,
    dst_ptr,
    combine_ptr,
    weight_n_ptr,
    weight_x_ptr,
    full_ptr,
    u_ptr,
    v_ptr,
    n_ptr,
    rstd_n_ptr,
    rstd_x_ptr,
    eps,
    NUM_COLS: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    KEEP: tl.constexpr,
    HAS_MAP: tl.constexpr,
    HAS_COMBINE: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """n' = (x + a) + s, x' = (x + a) + (r + s) and both norms, one row."""
    dtype: tl.constexpr = full_ptr.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    col = columns(routed_ptr, full_ptr, BLOCK)
    mask = col < NUM_COLS
    at = token * NUM_COLS + col
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    a = tl.load(a_ptr + at, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(s_ptr + at, mask=mask, other=0.0).to(tl.float32)
    y = rounded(x + a, dtype)
    n = rounded(y + s, dtype)
    gain = tl.load(weight_n_ptr + col, mask=mask, other=0.0).to(tl.float32)
    u, rstd_n = norm_row(n, gain, NUM_COLS, eps, UNIT_OFFSET, dtype)
    tl.store(u_ptr + at, to_storage(u, dtype), mask=mask)
    if KEEP:
        tl.store(n_ptr + at, to_storage(n, dtype), mask=mask)
    r = load_routed(routed_ptr, dst_ptr, combine_ptr, token, col, mask, NUM_COLS, K, HAS_MAP, HAS_COMBINE)
    full = rounded(y + rounded(r + s, dtype), dtype)
    gain = tl.load(weight_x_ptr + col, mask=mask, other=0.0).to(tl.float32)
    v, rstd_x = norm_row(full, gain, NUM_COLS, eps, UNIT_OFFSET, dtype)
    tl.store(full_ptr + at, to_storage(full, dtype), mask=mask)
    tl.store(v_ptr + at, to_storage(v, dtype), mask=mask)
    tl.store(rstd_n_ptr + token, rstd_n)
    tl.store(rstd_x_ptr + token, rstd_x)


@triton.jit
def release_both_backward_kernel(
    grad_full_ptr,
    grad_u_ptr,
    grad_v_ptr,
    full_ptr,
    n_ptr,
    rstd_x_ptr,
    rstd_n_ptr,
    weight_x_ptr,
    weight_n_ptr,
    late_ptr,
    prompt_ptr,
    grad_gain_x_ptr,
    grad_gain_n_ptr,
    num_tokens,
    program_rows,
    NUM_COLS: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of r and of the prompt terms, and shares of both weights', a run of rows."""
    dtype: tl.constexpr = full_ptr.dtype.element_ty
    program = tl.program_id(0)
    col = tl.arange(0, BLOCK)
    mask = col < NUM_COLS
    grad_gain_x = tl.zeros([BLOCK], tl.float32)
    grad_gain_n = tl.zeros([BLOCK], tl.float32)
    last = tl.minimum((program + 1) * program_rows, num_tokens)
    for token in range(program * program_rows, last):
        at = tl.cast(token, tl.int64) * NUM_COLS + col
        full = tl.load(full_ptr + at, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_v_ptr + at, mask=mask, other=0.0).to(tl.float32)
        gain = tl.load(weight_x_ptr + col, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_x_ptr + token)
        grad_z, grad_gain = norm_row_backward(full, gain, grad, rstd, NUM_COLS, UNIT_OFFSET, dtype)
        grad_gain_x += grad_gain
        late = tl.load(grad_full_ptr + at, mask=mask, other=0.0).to(tl.float32)
        late = rounded(late + rounded(grad_z, dtype), dtype)
        tl.store(late_ptr + at, to_storage(late, dtype), mask=mask)
        n = tl.load(n_ptr + at, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_u_ptr + at, mask=mask, other=0.0).to(tl.float32)
        gain = tl.load(weight_n_ptr + col, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_n_ptr + token)
        grad_z, grad_gain = norm_row_backward(n, gain, grad, rstd, NUM_COLS, UNIT_OFFSET, dtype)
        grad_gain_n += grad_gain
        tl.store(prompt_ptr + at, to_storage(late + rounded(grad_z, dtype), dtype), mask=mask)
    gain_at = tl.cast(program, tl.int64) * NUM_COLS + col
    tl.store(grad_gain_x_ptr + gain_at, grad_gain_x, mask=mask)
    tl.store(grad_gain_n_ptr + gain_at, grad_gain_n, mask=mask)


def release_both_triton(
    x_TH: Tensor,
    a_TH: Tensor,
    s_TH: Tensor,
    routed: Tensor,
    dst_TK: Tensor | None,
    combine_TK: Tensor | None,
    weight_n_H: Tensor,
    weight_x_H: Tensor,
    eps: float,
    unit_offset: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `release_both_reference`; n' is empty unless `keep`. All tensors contiguous."""
    num_tokens, num_cols = x_TH.shape
    full_TH, u_TH, v_TH = (torch.empty_like(x_TH) for _ in range(3))
    n_TH = torch.empty_like(x_TH) if keep else x_TH.new_empty(0)
    rstd_n_T, rstd_x_T = (torch.empty(num_tokens, dtype=torch.float32, device=x_TH.device) for _ in range(2))
    if num_tokens:
        block, num_warps = row_config(num_cols)
        with on_device(x_TH):
            release_both_kernel[(num_tokens,)](
                x_TH,
                a_TH,
                s_TH,
                routed,
                dst_TK,
                combine_TK,
                weight_n_H,
                weight_x_H,
                full_TH,
                u_TH,
                v_TH,
                n_TH,
                rstd_n_T,
                rstd_x_T,
                eps,
                NUM_COLS=num_cols,
                UNIT_OFFSET=unit_offset,
                KEEP=keep,
                HAS_MAP=dst_TK is not None,
                HAS_COMBINE=combine_TK is not None,
                K=0 if dst_TK is None else dst_TK.shape[1],
                BLOCK=block,
                num_warps=num_warps,
                enable_fp_fusion=False,
            )
    return full_TH, u_TH, v_TH, n_TH, rstd_n_T, rstd_x_T


def release_both_backward_triton(
    grad_x_TH: Tensor,
    grad_u_TH: Tensor,
    grad_v_TH: Tensor,
    x_TH: Tensor,
    n_TH: Tensor,
    rstd_x_T: Tensor,
    rstd_n_T: Tensor,
    weight_x_H: Tensor,
    weight_n_H: Tensor,
    unit_offset: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `release_both_backward_reference`. All tensors contiguous."""
    num_tokens, num_cols = x_TH.shape
    late_TH, prompt_TH = torch.empty_like(x_TH), torch.empty_like(x_TH)
    programs, program_rows = backward_programs(num_tokens)
    grad_gain_x_NH, grad_gain_n_NH = (
        torch.empty(programs, num_cols, dtype=torch.float32, device=x_TH.device) for _ in range(2)
    )
    if num_tokens:
        block, num_warps = row_config(num_cols)
        with on_device(x_TH):
            release_both_backward_kernel[(programs,)](
                grad_x_TH,
                grad_u_TH,
                grad_v_TH,
                x_TH,
                n_TH,
                rstd_x_T,
                rstd_n_T,
                weight_x_H,
                weight_n_H,
                late_TH,
                prompt_TH,
                grad_gain_x_NH,
                grad_gain_n_NH,
                num_tokens,
                program_rows,
                NUM_COLS=num_cols,
                UNIT_OFFSET=unit_offset,
                BLOCK=block,
                num_warps=num_warps,
                enable_fp_fusion=False,
            )
    return (
        late_TH,
        prompt_TH,
        grad_gain_x_NH.sum(0).to(weight_x_H.dtype),
        grad_gain_n_NH.sum(0).to(weight_n_H.dtype),
    )
