"""Routing in plain torch: the specification of `route`, forward and backward, also in fp64.

Decides the selection score, the order among equals, what the weights are made of and the two auxiliary losses.

    s        softmax over all experts, or sigmoid, of the logits; fp32 (fp64 for fp64 logits)
    select   by s + bias; where neither bias nor groups enter, by the logit itself: the same order, since s grows with
             it, but free of ties that only rounding made, and equal on every device
    groups   a group's score is its best selection score, or the sum of its two best; only the best groups take part
    weights  sigmoid: scale * s, over the sum of the chosen s where renormalized; softmax: scale * s, or scale times
    the
             softmax over the chosen logits where renormalized (equal in exact arithmetic, and safe where all chosen s
             underflow)
    aux      E * aux_coeff / (K * T^2) * sum_e count_e * sum_t P_te, with the counts constant and P the softmax, or the
             sigmoids over their sum
    z        z_coeff * mean_t logsumexp(logits_t)^2

Equal selection scores go to the lowest index first. The bias takes part in nothing but the selection and gets no
gradient. A NaN logit is chosen last, as the smallest number; it, like +inf, makes all weights of its token NaN.

Legend: T tokens, E experts, K experts per token, G groups.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

EPS = 1e-20
HIGHEST = 3.4e38
LOWEST = -3.3e38
EXCLUDED = -3.39e38
"""Selection scores are clamped to [LOWEST, HIGHEST]; an expert of a group that was not kept gets EXCLUDED."""

SCORES = ("softmax", "sigmoid")
GROUP_SCORES = ("sum_top2", "max")


@dataclass(frozen=True, kw_only=True, slots=True)
class RouteRule:
    """The settings of `route`, by the same names."""

    top_k: int
    score: str = "softmax"
    num_groups: int = 1
    top_groups: int = 1
    group_score: str = "sum_top2"
    renormalize: bool = True
    scale: float = 1.0
    aux_coeff: float = 0.0
    z_coeff: float = 0.0


def select_reference(logits_TE: Tensor, bias_E: Tensor | None, rule: RouteRule) -> Tensor:
    """Chosen experts, [T, K] int64, by descending selection score, the lowest index first among equals."""
    logits_TE = logits_TE.detach()
    keys_TE = logits_TE
    if bias_E is not None or rule.num_groups > 1:
        keys_TE = torch.softmax(logits_TE, 1) if rule.score == "softmax" else torch.sigmoid(logits_TE)
        if bias_E is not None:
            keys_TE = keys_TE + bias_E.detach().to(keys_TE.dtype)
    keys_TE = _clamped(keys_TE)
    if rule.num_groups > 1:
        keys_TE = _only_best_groups(keys_TE, rule)
    return torch.sort(keys_TE, dim=1, descending=True, stable=True).indices[:, : rule.top_k].contiguous()


def _clamped(keys: Tensor) -> Tensor:
    return torch.nan_to_num(keys, nan=LOWEST, posinf=HIGHEST, neginf=LOWEST).clamp(LOWEST, HIGHEST)


def _only_best_groups(keys_TE: Tensor, rule: RouteRule) -> Tensor:
    """Exclude the experts of all but the best groups; equal groups: the lowest index first."""
    keys_TGS = keys_TE.unflatten(1, (rule.num_groups, -1))
    if rule.group_score == "max":
        score_TG = keys_TGS.amax(2)
    else:
        best_TG2 = keys_TGS.topk(2, dim=2).values
        score_TG = _clamped(best_TG2[..., 0] + best_TG2[..., 1])
    kept_TG = torch.sort(score_TG, dim=1, descending=True, stable=True).indices[:, : rule.top_groups]
    dropped_TG = torch.ones_like(score_TG, dtype=torch.bool).scatter(1, kept_TG, False)
    return keys_TGS.masked_fill(dropped_TG[..., None], EXCLUDED).flatten(1)


def count_reference(experts_TK: Tensor, num_experts: int) -> Tensor:
    """Slots per expert, [E] int32. Made of comparisons with sorted ids: bincount has no deterministic CUDA form."""
    ids = experts_TK.flatten().sort().values
    bounds = torch.arange(num_experts + 1, device=ids.device)
    return torch.searchsorted(ids, bounds).diff().to(torch.int32)


def route_reference(
    logits_TE: Tensor, bias_E: Tensor | None, rule: RouteRule
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Route, differentiable in the logits by autograd.

    Args:
        logits_TE: Router logits, [T, E], any floating dtype.
        bias_E: Selection bias, [E], or None.
        rule: The settings.

    Returns:
        Weights [T, K] fp32 (fp64 for fp64 logits), experts [T, K] int64, counts [E] int32, aux loss and z-loss, 0-d.
    """
    num_tokens, num_experts = logits_TE.shape
    logits_TE = logits_TE.to(torch.float64 if logits_TE.dtype == torch.float64 else torch.float32)
    experts_TK = select_reference(logits_TE, bias_E, rule)
    counts_E = count_reference(experts_TK, num_experts)
    chosen_TK = logits_TE.gather(1, experts_TK)
    if rule.score == "sigmoid":
        weights_TK = torch.sigmoid(chosen_TK)
        if rule.renormalize:
            weights_TK = weights_TK / (weights_TK.sum(1, keepdim=True) + EPS)
    elif rule.renormalize:
        weights_TK = torch.softmax(chosen_TK, 1)
    else:
        weights_TK = torch.softmax(logits_TE, 1).gather(1, experts_TK)
    bad_T1 = ~(logits_TE < torch.inf).all(1, keepdim=True)
    weights_TK = (weights_TK * rule.scale).masked_fill(bad_T1, torch.nan)
    aux_loss = z_loss = logits_TE.new_zeros(())
    if rule.aux_coeff and num_tokens:
        share_TE = _share(logits_TE, rule)
        aux_loss = _aux_factor(rule, num_tokens, num_experts) * (counts_E * share_TE.sum(0)).sum()
    if rule.z_coeff and num_tokens:
        z_loss = rule.z_coeff * logits_TE.logsumexp(1).square().mean()
    return weights_TK, experts_TK, counts_E, aux_loss, z_loss


def _share(logits_TE: Tensor, rule: RouteRule) -> Tensor:
    """P of the auxiliary loss: each token's probability mass over the experts."""
    if rule.score == "softmax":
        return torch.softmax(logits_TE, 1)
    score_TE = torch.sigmoid(logits_TE)
    return score_TE / (score_TE.sum(1, keepdim=True) + EPS)


def _aux_factor(rule: RouteRule, num_tokens: int, num_experts: int) -> float:
    return num_experts * rule.aux_coeff / (rule.top_k * num_tokens**2) if num_tokens else 0.0


def route_backward_reference(
    grad_weights_TK: Tensor,
    grad_aux: Tensor,
    grad_z: Tensor,
    logits_TE: Tensor,
    experts_TK: Tensor,
    counts_E: Tensor,
    rule: RouteRule,
) -> Tensor:
    """Gradient of the logits from all three differentiable results at once, in closed form.

    Args:
        grad_weights_TK: Gradient of the weights, [T, K].
        grad_aux: Gradient of the aux loss, 0-d.
        grad_z: Gradient of the z-loss, 0-d.
        logits_TE: As given to the forward.
        experts_TK: As returned by it.
        counts_E: As returned by it.
        rule: The settings.

    Returns:
        [T, E] in the dtype of the logits.
    """
    dtype = logits_TE.dtype
    num_tokens, num_experts = logits_TE.shape
    logits_TE = logits_TE.to(torch.float64 if dtype == torch.float64 else torch.float32)
    grad_TK = grad_weights_TK.to(logits_TE.dtype) * rule.scale
    chosen_TK = logits_TE.gather(1, experts_TK)
    grad_TE = torch.zeros_like(logits_TE)
    if rule.score == "sigmoid":
        score_TK = torch.sigmoid(chosen_TK)
        if rule.renormalize:
            total_T1 = score_TK.sum(1, keepdim=True) + EPS
            grad_TK = (grad_TK - (grad_TK * score_TK / total_T1).sum(1, keepdim=True)) / total_T1
        grad_TE.scatter_(1, experts_TK, grad_TK * score_TK * (1 - score_TK))
    elif rule.renormalize:
        share_TK = torch.softmax(chosen_TK, 1)
        grad_TE.scatter_(1, experts_TK, share_TK * (grad_TK - (grad_TK * share_TK).sum(1, keepdim=True)))
    else:
        prob_TE = torch.softmax(logits_TE, 1)
        grad_TE.scatter_(1, experts_TK, grad_TK)
        grad_TE = prob_TE * (grad_TE - (grad_TE * prob_TE).sum(1, keepdim=True))
    if rule.aux_coeff:
        share_TE = _share(logits_TE, rule)
        counts_E = counts_E.to(logits_TE.dtype)
        inner_TE = share_TE * (counts_E - (share_TE * counts_E).sum(1, keepdim=True))
        if rule.score == "sigmoid":
            inner_TE = inner_TE * (1 - torch.sigmoid(logits_TE))
        grad_TE = grad_TE + grad_aux * _aux_factor(rule, num_tokens, num_experts) * inner_TE
    if rule.z_coeff and num_tokens:
        lse_T1 = logits_TE.logsumexp(1, keepdim=True)
        grad_TE = grad_TE + grad_z * (2 * rule.z_coeff / num_tokens) * lse_T1 * torch.softmax(logits_TE, 1)
    return grad_TE.to(dtype)
