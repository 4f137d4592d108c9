"""The update that releases the next router, in plain torch: the specification of `release_router`.

When the routed experts' output r has landed:

    x' = y + (r + s)      the full stream
    v' = norm(x')         what the next router and experts read

each rounded to the storage dtype, r too: it is the sum of a token's expert rows, as `unpermute` would write it.

Legend: T tokens, K experts per token, R rows, H hidden size.
"""

from torch import Tensor

from farskip.triton_kernels.add_rms_norm_reference import norm_reference
from farskip.triton_kernels.unpermute_reference import unpermute_reference


def release_router_reference(
    y_TH: Tensor,
    s_TH: Tensor | None,
    routed: Tensor,
    dst_TK: Tensor | None,
    combine_TK: Tensor | None,
    weight_H: Tensor,
    eps: float,
    unit_offset: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """x', norm(x') and 1/rms of x'. `routed` is [R, H] with a map, [T, H] without."""
    r_TH = routed if dst_TK is None else unpermute_reference(routed, dst_TK, combine_TK)
    x_TH = y_TH + (r_TH if s_TH is None else r_TH + s_TH)
    normed_TH, rstd_T = norm_reference(x_TH, weight_H, eps, unit_offset)
    return x_TH, normed_TH, rstd_T
