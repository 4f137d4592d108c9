"""The update that releases the next attention, in plain torch: the specification of `release_attention`.

Two streams cross a layer boundary: x, the full one, and n, which leaves out the newest routed output. Once attention's
output a and the shared experts' output s are there, and while the routed experts' is still in flight:

    y  = x + a        the full stream as far as it goes, kept for `release_router`
    n' = y + s        what the next attention reads
    u' = norm(n')

each rounded to the storage dtype. This is the one bracketing of the project, in fused and in separate form.

Legend: T tokens, H hidden size.
"""

from torch import Tensor

from farskip.triton_kernels.add_rms_norm_reference import norm_reference


def release_attention_reference(
    x_TH: Tensor, a_TH: Tensor, s_TH: Tensor, weight_H: Tensor, eps: float, unit_offset: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, norm(n'), n' and 1/rms of n'."""
    y_TH = x_TH + a_TH
    n_TH = y_TH + s_TH
    normed_TH, rstd_T = norm_reference(n_TH, weight_H, eps, unit_offset)
    return y_TH, normed_TH, n_TH, rstd_T
