# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Copy tokens to their rows in Triton.

Decides: token by token, not row by row. A token is read once and written K times; by rows it would be read K times, far
apart, from memory. Further programs look for rows without a slot and write zeros there.

Legend: T tokens, K experts per token, R rows, H hidden size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from farskip.triton_kernels.common_triton import copy_config, on_device, to_storage, zero_padding_rows

ZERO_ROWS = 64
"""Rows that one program looks through for padding."""


@triton.jit
def permute_kernel(
    x_ptr,
    dst_ptr,
    src_ptr,
    weights_ptr,
    rows_ptr,
    num_tokens,
    num_rows,
    num_cols,
    num_token_programs,
    K: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    ROWS: tl.constexpr,
    ZERO_STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy ROWS tokens to all their rows; the programs behind the tokens' zero the padding."""
    program = tl.program_id(0)
    if program >= num_token_programs:
        first_row = (program - num_token_programs) * ROWS * ZERO_STEPS
        zero_padding_rows(rows_ptr, src_ptr, first_row, num_rows, num_cols, ROWS, ZERO_STEPS, BLOCK)
        return
    dtype: tl.constexpr = rows_ptr.dtype.element_ty
    token = (program * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    live = token < num_tokens
    for start in range(0, num_cols, BLOCK):
        col = start + tl.arange(0, BLOCK)[None, :]
        inside = col < num_cols
        x = tl.load(x_ptr + token * num_cols + col, mask=live & inside, other=0.0)
        for k in tl.static_range(K):
            row = tl.load(dst_ptr + token * K + k, mask=live, other=-1).to(tl.int64)
            value = x
            if HAS_WEIGHTS:
                weight = tl.load(weights_ptr + token * K + k, mask=live, other=0.0).to(tl.float32)
                value = to_storage(x.to(tl.float32) * weight, dtype)
            tl.store(rows_ptr + row * num_cols + col, value, mask=(row >= 0) & inside)


def permute_triton(x_TH: Tensor, dst_TK: Tensor, src_R: Tensor, weights_TK: Tensor | None = None) -> Tensor:
    """See `permute_reference`. All tensors contiguous."""
    num_tokens, num_cols = x_TH.shape
    num_rows = len(src_R)
    rows_RH = torch.empty(num_rows, num_cols, dtype=x_TH.dtype, device=x_TH.device)
    if num_rows == 0:
        return rows_RH
    rows, block, num_warps = copy_config(num_tokens, num_cols)
    zero_steps = max(1, ZERO_ROWS // rows)
    token_programs = triton.cdiv(num_tokens, rows)
    with on_device(x_TH):
        permute_kernel[(token_programs + triton.cdiv(num_rows, rows * zero_steps),)](
            x_TH,
            dst_TK,
            src_R,
            weights_TK,
            rows_RH,
            num_tokens,
            num_rows,
            num_cols,
            token_programs,
            K=dst_TK.shape[1],
            HAS_WEIGHTS=weights_TK is not None,
            ROWS=rows,
            ZERO_STEPS=zero_steps,
            BLOCK=block,
            num_warps=num_warps,
        )
    return rows_RH
