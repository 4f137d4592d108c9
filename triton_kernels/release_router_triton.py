# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""The update that releases the next router, in Triton: combine, shared expert, residual and norm in one pass.

Legend: T tokens, K experts per token, R rows, H hidden size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from farskip.triton_kernels.common_triton import (
    combine_rows,
    norm_row,
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
    num_cols,
    K: tl.constexpr,
    HAS_MAP: tl.constexpr,
    HAS_COMBINE: tl.constexpr,
    dtype: tl.constexpr,
):
    """The routed output of one token, rounded as `unpermute` would have stored it; K 0 without a map."""
    if HAS_MAP:
        like = col.to(tl.float32)
        r = combine_rows(routed_ptr, dst_ptr, combine_ptr, token, None, col, mask, num_cols, K, HAS_COMBINE, like)
        return rounded(r, dtype)
    return tl.load(routed_ptr + token * num_cols + col, mask=mask, other=0.0).to(tl.float32)


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
    num_cols,
    eps,
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
    col = tl.arange(0, BLOCK)
    mask = col < num_cols
    at = token * num_cols + col
    r = load_routed(routed_ptr, dst_ptr, combine_ptr, token, col, mask, num_cols, K, HAS_MAP, HAS_COMBINE, dtype)
    if HAS_SHARED:
        r = rounded(r + tl.load(s_ptr + at, mask=mask, other=0.0).to(tl.float32), dtype)
    x = rounded(tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32) + r, dtype)
    gain = tl.load(weight_ptr + col, mask=mask, other=0.0).to(tl.float32)
    normed, rstd = norm_row(x, gain, num_cols, eps, UNIT_OFFSET, dtype)
    tl.store(x_ptr + at, to_storage(x, dtype), mask=mask)
    tl.store(normed_ptr + at, to_storage(normed, dtype), mask=mask)
    tl.store(rstd_ptr + token, rstd)


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
                num_cols,
                eps,
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
