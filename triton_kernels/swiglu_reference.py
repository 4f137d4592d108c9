"""SwiGLU in plain torch: the specification of `swiglu`, forward and backward.

    out = g * sigmoid(alpha * g) * (u + up_offset) [* weight of the row]

with g and u the halves of a row, or its even and odd columns; with a limit, g is cut at limit from above and u at
-limit and limit (GPT-OSS: limit 7, alpha 1.702, up_offset 1). Computed in fp32 (fp64 for fp64), rounded once. Rows from
`num_rows` on count as absent: their output and gradients are zero, whatever they hold.

Legend: R rows, I expert's intermediate size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from farskip.triton_kernels.unpermute_reference import wide_dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class SwigluRule:
    """The settings of `swiglu`, by the same names."""

    interleaved: bool = False
    limit: float | None = None
    alpha: float = 1.0
    up_offset: float = 0.0


def _split(h: Tensor, rule: SwigluRule) -> tuple[Tensor, Tensor]:
    """Gate and up, as they stand in the row."""
    if rule.interleaved:
        return h[:, ::2], h[:, 1::2]
    gate, up = h.chunk(2, 1)
    return gate, up


def _live(h: Tensor, num_rows: Tensor | None) -> Tensor | None:
    """Which rows count, [R, 1]; None for all."""
    return None if num_rows is None else (torch.arange(len(h), device=h.device) < num_rows)[:, None]


def _parts(h: Tensor, rule: SwigluRule, num_rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gate and up after the cut, and sigmoid(alpha * gate), wide; absent rows as zeros."""
    live = _live(h, num_rows)
    wide = h.to(wide_dtype(h))
    gate, up = _split(wide if live is None else torch.where(live, wide, 0), rule)
    if rule.limit is not None:
        gate, up = gate.clamp(max=rule.limit), up.clamp(-rule.limit, rule.limit)
    return gate, up, torch.sigmoid(rule.alpha * gate)


def swiglu_reference(h: Tensor, weights: Tensor | None, num_rows: Tensor | None, rule: SwigluRule) -> Tensor:
    """[R, 2 I] to [R, I]; weights [R] or None; num_rows one integer on the device, or None."""
    gate, up, sig = _parts(h, rule, num_rows)
    out = gate * sig * (up + rule.up_offset)
    if weights is not None:
        live = _live(h, num_rows)
        column = weights[:, None].to(out.dtype)
        out = out * (column if live is None else torch.where(live, column, 0))
    return out.to(h.dtype)


def swiglu_backward_reference(
    grad: Tensor, h: Tensor, weights: Tensor | None, num_rows: Tensor | None, rule: SwigluRule
) -> tuple[Tensor, Tensor]:
    """Gradients of h, [R, 2 I], and of the weights, [R] (empty without weights), in closed form."""
    gate, up, sig = _parts(h, rule, num_rows)
    live = _live(h, num_rows)
    grad = grad.to(gate.dtype)
    if live is not None:
        grad = torch.where(live, grad, 0)
    grad_weights = h.new_empty(0)
    if weights is not None:
        grad_weights = (grad * gate * sig * (up + rule.up_offset)).sum(1).to(weights.dtype)
        column = weights[:, None].to(gate.dtype)
        grad = grad * (column if live is None else torch.where(live, column, 0))
    grad_gate = grad * (up + rule.up_offset) * sig * (1 + rule.alpha * gate * (1 - sig))
    grad_up = grad * gate * sig
    if rule.limit is not None:
        raw_gate, raw_up = _split(h, rule)
        grad_gate = torch.where(raw_gate <= rule.limit, grad_gate, 0)
        grad_up = torch.where(raw_up.abs() <= rule.limit, grad_up, 0)
    joined = torch.stack([grad_gate, grad_up], 2).flatten(1) if rule.interleaved else torch.cat([grad_gate, grad_up], 1)
    return joined.to(h.dtype), grad_weights
