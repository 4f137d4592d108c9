# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""The update that releases the next attention, in Triton: three reads, two writes, a third only for a backward.

Its backward is the shared norm backward, which writes both gradients in one pass.

Legend: T tokens, H hidden size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from farskip.triton_kernels.common_triton import norm_row, on_device, rounded, row_config, to_storage


@triton.jit
def release_attention_kernel(
    x_ptr,
    a_ptr,
    s_ptr,
    weight_ptr,
    y_ptr,
    normed_ptr,
    n_ptr,
    rstd_ptr,
    eps,
    NUM_COLS: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = x + a, n' = y + s and the norm of n', one row."""
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    mask = col < NUM_COLS
    at = token * NUM_COLS + col
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    a = tl.load(a_ptr + at, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(s_ptr + at, mask=mask, other=0.0).to(tl.float32)
    y = rounded(x + a, dtype)
    n = rounded(y + s, dtype)
    gain = tl.load(weight_ptr + col, mask=mask, other=0.0).to(tl.float32)
    normed, rstd = norm_row(n, gain, NUM_COLS, eps, UNIT_OFFSET, dtype)
    tl.store(y_ptr + at, to_storage(y, dtype), mask=mask)
    tl.store(normed_ptr + at, to_storage(normed, dtype), mask=mask)
    if KEEP:
        tl.store(n_ptr + at, to_storage(n, dtype), mask=mask)
    tl.store(rstd_ptr + token, rstd)


def release_attention_triton(
    x_TH: Tensor, a_TH: Tensor, s_TH: Tensor, weight_H: Tensor, eps: float, unit_offset: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `release_attention_reference`; n' is empty unless `keep`. All tensors contiguous."""
    num_tokens, num_cols = x_TH.shape
    y_TH, normed_TH = torch.empty_like(x_TH), torch.empty_like(x_TH)
    n_TH = torch.empty_like(x_TH) if keep else x_TH.new_empty(0)
    rstd_T = torch.empty(num_tokens, dtype=torch.float32, device=x_TH.device)
    if num_tokens:
        block, num_warps = row_config(num_cols)
        with on_device(x_TH):
            release_attention_kernel[(num_tokens,)](
                x_TH,
                a_TH,
                s_TH,
                weight_H,
                y_TH,
                normed_TH,
                n_TH,
                rstd_T,
                eps,
                NUM_COLS=num_cols,
                UNIT_OFFSET=unit_offset,
                KEEP=keep,
                BLOCK=block,
                num_warps=num_warps,
                enable_fp_fusion=False,
            )
    return y_TH, normed_TH, n_TH, rstd_T
