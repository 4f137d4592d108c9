"""The update that releases the next router, in plain torch: the specification of `release_router`.

When the routed experts' output r has landed:

    x' = y + (r + s)      the full stream
    v' = norm(x')         what the next router and experts read

each rounded to the storage dtype, r too: it is the sum of a token's expert rows, as `unpermute` would write it. Where
their dtype is narrower than the streams', it is rounded to theirs.

Backward, v' has up to three readers (router, expert rows, shared experts), and x' has others still:

    dv' = (before + sum over k of rows[dst_k]) + after
    dx' = grad + norm_backward(dv')

again each rounded, the sum of the rows too, in their dtype: it is what the backward of `permute` would write.

Legend: T tokens, K experts per token, R rows, H hidden size.
"""

from torch import Tensor

from farskip.triton_kernels.add_rms_norm_reference import norm_backward_reference, norm_reference
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
    r_TH = routed if dst_TK is None else unpermute_reference(routed, dst_TK, combine_TK).to(y_TH.dtype)
    x_TH = y_TH + (r_TH if s_TH is None else r_TH + s_TH)
    normed_TH, rstd_T = norm_reference(x_TH, weight_H, eps, unit_offset)
    return x_TH, normed_TH, rstd_T


def release_router_backward_reference(
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
    """Gradient of x' and of the weight.

    Args:
        grad_TH: Gradient of x' that does not come through the norm, or None.
        before_TH: Gradient of norm(x'), the first of its sum, or None.
        rows: The second: that of expert rows, [R, H], with `dst_TK`, or [T, H] without; or None.
        dst_TK: Row of each slot, or None.
        after_TH: The third, or None. At least one of the three is there.
        x_TH: x'.
        rstd_T: 1/rms of x'.
        weight_H: Of the norm.
        unit_offset: As in the forward.
    """
    summed = rows if rows is None or dst_TK is None else unpermute_reference(rows, dst_TK, None).to(x_TH.dtype)
    first_TH, *others = (each_TH for each_TH in (before_TH, summed, after_TH) if each_TH is not None)
    for other_TH in others:
        first_TH = first_TH + other_TH
    grad_x_TH, grad_weight_H = norm_backward_reference(first_TH, x_TH, rstd_T, weight_H, unit_offset)
    return (grad_x_TH if grad_TH is None else grad_TH + grad_x_TH), grad_weight_H
