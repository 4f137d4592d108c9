"""Sum each token's rows, in plain torch: the specification of `unpermute`, forward and backward.

Legend: T tokens, K experts per token, R rows, H hidden size.
"""

import torch
from torch import Tensor

from farskip.triton_kernels.permute_reference import permute_reference


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """fp64 for fp64, else fp32: what sums are kept in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def unpermute_reference(rows_RH: Tensor, dst_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    """o_t = sum over k of w_tk * rows[dst_tk], from k = 0 on; a slot without a row adds nothing.

    Args:
        rows_RH: Rows of all experts, [R, H].
        dst_TK: Row of each slot, [T, K].
        weights_TK: [T, K], or None for a plain sum.

    Returns:
        [T, H] in the dtype of the rows, rounded once; the sum is kept in fp32 (fp64 for fp64 rows).
    """
    wide = wide_dtype(rows_RH)
    num_tokens, top_k = dst_TK.shape
    total_TH = torch.zeros(num_tokens, rows_RH.shape[1], dtype=wide, device=rows_RH.device)
    if len(rows_RH) == 0:
        return total_TH.to(rows_RH.dtype)
    for k in range(top_k):
        row_T = dst_TK[:, k].to(torch.int64)
        value_TH = rows_RH.index_select(0, row_T.clamp(min=0)).to(wide)
        if weights_TK is not None:
            value_TH = value_TH * weights_TK[:, k, None].to(wide)
        total_TH = total_TH + value_TH.masked_fill_(row_T[:, None] < 0, 0)
    return total_TH.to(rows_RH.dtype)


def unpermute_backward_reference(
    grad_TH: Tensor, rows_RH: Tensor | None, dst_TK: Tensor, src_R: Tensor, weights_TK: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the rows and of the weights.

    Args:
        grad_TH: Gradient of the sum, [T, H].
        rows_RH: The rows; None if the gradient of the weights is not wanted.
        dst_TK: As in the forward.
        src_R: Slot of each row, [R].
        weights_TK: As in the forward.

    Returns:
        Gradient of the rows, [R, H]: weight times `grad_TH`, zero for padding. Gradient of the weights, [T, K]: the
        inner product of row and `grad_TH`, zero for a slot without a row; None without `rows_RH`.
    """
    grad_rows_RH = permute_reference(grad_TH, dst_TK, src_R, weights_TK)
    if rows_RH is None or weights_TK is None:
        return grad_rows_RH, None
    wide = wide_dtype(grad_TH)
    grad_weights_TK = torch.zeros(dst_TK.shape, dtype=wide, device=grad_TH.device)
    if len(rows_RH):
        for k in range(dst_TK.shape[1]):
            row_T = dst_TK[:, k].to(torch.int64)
            dot_T = (rows_RH[row_T.clamp(min=0)].to(wide) * grad_TH.to(wide)).sum(1)
            grad_weights_TK[:, k] = dot_T.masked_fill(row_T < 0, 0)
    return grad_rows_RH, grad_weights_TK.to(weights_TK.dtype)
