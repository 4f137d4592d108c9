"""Copy tokens to their rows, in plain torch: the specification of `permute`.

Legend: T tokens, K experts per token, R rows, H hidden size.
"""

import torch
from torch import Tensor


def permute_reference(x_TH: Tensor, dst_TK: Tensor, src_R: Tensor, weights_TK: Tensor | None = None) -> Tensor:
    """Row r is the token of slot src[r], times its weight if there are weights; a row without a slot is zero.

    Args:
        x_TH: Tokens, [T, H].
        dst_TK: Row of each slot, [T, K].
        src_R: Slot of each row, [R].
        weights_TK: [T, K], or None.

    Returns:
        [R, H] in the dtype of `x_TH`; the product is computed in fp32 (fp64 for fp64 tokens).
    """
    num_tokens, top_k = dst_TK.shape
    if num_tokens == 0:
        return x_TH.new_zeros(len(src_R), x_TH.shape[1])
    slot_R = src_R.clamp(min=0).to(torch.int64)
    rows_RH = x_TH.index_select(0, slot_R // top_k)
    if weights_TK is not None:
        wide = torch.float64 if x_TH.dtype == torch.float64 else torch.float32
        rows_RH = (rows_RH.to(wide) * weights_TK.flatten()[slot_R, None].to(wide)).to(x_TH.dtype)
    return rows_RH.masked_fill_(src_R[:, None] < 0, 0)
