"""RMSNorm, alone and behind an add, in plain torch: the specification of `rms_norm` and `add_rms_norm`.

Decides the rounding points: the sum is rounded to the storage dtype before it is normed; without a unit offset the
normalized value is rounded before the gain (as Llama's norm does it), with one nothing is rounded before the end and
the gain is 1 + weight (as Gemma's does it). Statistics are fp32 (fp64 for fp64).

Legend: T tokens, H hidden size.
"""

import torch
from torch import Tensor

from farskip.triton_kernels.unpermute_reference import wide_dtype


def norm_reference(z_TH: Tensor, weight_H: Tensor, eps: float, unit_offset: bool) -> tuple[Tensor, Tensor]:
    """RMSNorm of rows.

    Args:
        z_TH: [T, H].
        weight_H: [H].
        eps: Added to the mean square.
        unit_offset: Whether the gain is 1 + weight, all in fp32.

    Returns:
        The normed rows in the dtype of `z_TH`, and 1/rms, [T], fp32 (fp64 for fp64).
    """
    wide = wide_dtype(z_TH)
    wide_TH, gain_H = z_TH.to(wide), weight_H.to(wide)
    rstd_T1 = torch.rsqrt(wide_TH.square().mean(1, keepdim=True) + eps)
    unit_TH = wide_TH * rstd_T1
    if unit_offset:
        normed_TH = unit_TH * (1 + gain_H)
    else:
        normed_TH = unit_TH.to(z_TH.dtype).to(wide) * gain_H
    return normed_TH.to(z_TH.dtype), rstd_T1.squeeze(1)


def norm_backward_reference(
    grad_TH: Tensor, z_TH: Tensor, rstd_T: Tensor, weight_H: Tensor, unit_offset: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the normed rows, rounded to their dtype, and of the weight, in closed form.

    Args:
        grad_TH: Gradient of the normed rows.
        z_TH: What was normed.
        rstd_T: 1/rms, as the forward returned it.
        weight_H: [H].
        unit_offset: As in the forward.

    Returns:
        Gradient of `z_TH` in its dtype; gradient of `weight_H` in its dtype.
    """
    wide = rstd_T.dtype
    wide_grad_TH, gain_H = grad_TH.to(wide), weight_H.to(wide)
    unit_TH = z_TH.to(wide) * rstd_T[:, None]
    scaled_TH = wide_grad_TH * (1 + gain_H if unit_offset else gain_H)
    seen_TH = unit_TH if unit_offset else unit_TH.to(z_TH.dtype).to(wide)
    mean_T1 = (scaled_TH * unit_TH).mean(1, keepdim=True)
    grad_z_TH = rstd_T[:, None] * (scaled_TH - unit_TH * mean_T1)
    return grad_z_TH.to(z_TH.dtype), (wide_grad_TH * seen_TH).sum(0).to(weight_H.dtype)


def add_norm_reference(
    x_TH: Tensor, a_TH: Tensor | None, weight_H: Tensor, eps: float, unit_offset: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y = x + a, its norm and 1/rms; without `a_TH` the norm of x, and an empty y."""
    y_TH = x_TH if a_TH is None else x_TH + a_TH
    normed_TH, rstd_T = norm_reference(y_TH, weight_H, eps, unit_offset)
    return (x_TH.new_empty(0) if a_TH is None else y_TH), normed_TH, rstd_T
