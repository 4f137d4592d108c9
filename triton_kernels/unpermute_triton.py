# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Sum each token's rows in Triton, and its backward.

Decides: one token's rows are gathered and added in order of k, forward and backward, so there is no scatter-add and no
atomic. The backward reads the gradient once and writes all rows of the token.

Legend: T tokens, K experts per token, R rows, H hidden size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from farskip.triton_kernels.common_triton import (
    combine_rows,
    copy_config,
    on_device,
    to_storage,
    zero_padding_rows,
)
from farskip.triton_kernels.permute_triton import ZERO_ROWS


@triton.jit
def unpermute_kernel(
    rows_ptr,
    dst_ptr,
    weights_ptr,
    out_ptr,
    num_tokens,
    num_cols,
    K: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Combine the rows of ROWS tokens, one block of columns."""
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    live = token < num_tokens
    mask = live & (col < num_cols)
    like = tl.zeros([ROWS, BLOCK], tl.float32)
    total = combine_rows(rows_ptr, dst_ptr, weights_ptr, token, live, col, mask, num_cols, K, HAS_WEIGHTS, like)
    tl.store(out_ptr + token * num_cols + col, to_storage(total, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def unpermute_backward_kernel(
    grad_ptr,
    rows_ptr,
    dst_ptr,
    src_ptr,
    weights_ptr,
    grad_rows_ptr,
    grad_weights_ptr,
    num_tokens,
    num_rows,
    num_cols,
    num_token_programs,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    ZERO_STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of the rows and of the weights of ROWS tokens; the programs behind them zero the padding."""
    program = tl.program_id(0)
    if program >= num_token_programs:
        first_row = (program - num_token_programs) * ROWS * ZERO_STEPS
        zero_padding_rows(grad_rows_ptr, src_ptr, first_row, num_rows, num_cols, ROWS, ZERO_STEPS, BLOCK)
        return
    dtype: tl.constexpr = grad_rows_ptr.dtype.element_ty
    token = (program * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    slot = tl.arange(0, BLOCK_K)[None, :]
    live = token < num_tokens
    dots = tl.zeros([ROWS, BLOCK_K], tl.float32)
    for start in range(0, num_cols, BLOCK):
        col = start + tl.arange(0, BLOCK)[None, :]
        inside = col < num_cols
        grad = tl.load(grad_ptr + token * num_cols + col, mask=live & inside, other=0.0).to(tl.float32)
        for k in tl.static_range(K):
            row = tl.load(dst_ptr + token * K + k, mask=live, other=-1).to(tl.int64)
            weight = tl.load(weights_ptr + token * K + k, mask=live, other=0.0).to(tl.float32)
            mask = (row >= 0) & inside
            value = tl.load(rows_ptr + row * num_cols + col, mask=mask, other=0.0).to(tl.float32)
            tl.store(grad_rows_ptr + row * num_cols + col, to_storage(grad * weight, dtype), mask=mask)
            dots += tl.where(slot == k, tl.sum(grad * value, axis=1)[:, None], 0.0)
    grad_weight = to_storage(dots, grad_weights_ptr.dtype.element_ty)
    tl.store(grad_weights_ptr + token * K + slot, grad_weight, mask=live & (slot < K))


def unpermute_triton(rows_RH: Tensor, dst_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    """See `unpermute_reference`. All tensors contiguous."""
    num_tokens, top_k = dst_TK.shape
    num_cols = rows_RH.shape[1]
    out_TH = torch.empty(num_tokens, num_cols, dtype=rows_RH.dtype, device=rows_RH.device)
    if num_tokens == 0:
        return out_TH
    rows, block, num_warps = copy_config(num_tokens, num_cols)
    with on_device(rows_RH):
        unpermute_kernel[(triton.cdiv(num_tokens, rows), triton.cdiv(num_cols, block))](
            rows_RH,
            dst_TK,
            weights_TK,
            out_TH,
            num_tokens,
            num_cols,
            K=top_k,
            HAS_WEIGHTS=weights_TK is not None,
            ROWS=rows,
            BLOCK=block,
            num_warps=num_warps,
        )
    return out_TH


def unpermute_backward_triton(
    grad_TH: Tensor, rows_RH: Tensor, dst_TK: Tensor, src_R: Tensor, weights_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """See `unpermute_backward_reference`, for weights that want a gradient. All tensors contiguous."""
    num_tokens, num_cols = grad_TH.shape
    num_rows, top_k = len(src_R), dst_TK.shape[1]
    grad_rows_RH = torch.empty(num_rows, num_cols, dtype=grad_TH.dtype, device=grad_TH.device)
    grad_weights_TK = torch.empty_like(weights_TK)
    rows, block, num_warps = copy_config(num_tokens, num_cols)
    zero_steps = max(1, ZERO_ROWS // rows)
    token_programs = triton.cdiv(num_tokens, rows)
    num_programs = token_programs + triton.cdiv(num_rows, rows * zero_steps)
    if num_programs == 0:
        return grad_rows_RH, grad_weights_TK
    with on_device(grad_TH):
        unpermute_backward_kernel[(num_programs,)](
            grad_TH,
            rows_RH,
            dst_TK,
            src_R,
            weights_TK,
            grad_rows_RH,
            grad_weights_TK,
            num_tokens,
            num_rows,
            num_cols,
            token_programs,
            K=top_k,
            BLOCK_K=triton.next_power_of_2(top_k),
            ROWS=rows,
            ZERO_STEPS=zero_steps,
            BLOCK=block,
            num_warps=num_warps,
        )
    return grad_rows_RH, grad_weights_TK
