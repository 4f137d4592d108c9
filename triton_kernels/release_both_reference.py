"""Both two-stream updates at once, in plain torch: the specification of `release_both`, forward and backward.

For the serial case, where nothing is in flight: the same bracketing as `release_attention` and `release_router` one
after the other, forward and backward, with y never leaving the op.

Legend: T tokens, K experts per token, R rows, H hidden size.
"""

from torch import Tensor

from farskip.triton_kernels.add_rms_norm_reference import norm_backward_reference
from farskip.triton_kernels.release_attention_reference import release_attention_reference
from farskip.triton_kernels.release_router_reference import release_router_reference


def release_both_reference(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x', norm(n'), norm(x'), n', 1/rms of n' and of x'."""
    y_TH, u_TH, n_TH, rstd_n_T = release_attention_reference(x_TH, a_TH, s_TH, weight_n_H, eps, unit_offset)
    full_TH, v_TH, rstd_x_T = release_router_reference(
        y_TH, s_TH, routed, dst_TK, combine_TK, weight_x_H, eps, unit_offset
    )
    return full_TH, u_TH, v_TH, n_TH, rstd_n_T, rstd_x_T


def release_both_backward_reference(
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
    """Gradients of r, of the prompt terms (x, a and s share one), and of both weights."""
    grad_TH, grad_weight_x_H = norm_backward_reference(grad_v_TH, x_TH, rstd_x_T, weight_x_H, unit_offset)
    late_TH = grad_x_TH + grad_TH
    grad_TH, grad_weight_n_H = norm_backward_reference(grad_u_TH, n_TH, rstd_n_T, weight_n_H, unit_offset)
    return late_TH, late_TH + grad_TH, grad_weight_x_H, grad_weight_n_H
