"""Routing: score, select, weigh, count, and the two auxiliary losses, in one op.

Decides: the checks, the registration with torch (fake and autograd), and that one backward serves the gradients of the
weights and of both losses. Refuses: a rule that cannot fill K slots, and, while torch's anomaly detection is on, a NaN
logit. The rule itself is specified in `route_reference.py`.

Legend: T tokens, E experts, K experts per token.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from farskip.triton_kernels.backend import choose_backend
from farskip.triton_kernels.route_reference import (
    GROUP_SCORES,
    SCORES,
    RouteRule,
    route_backward_reference,
    route_reference,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """What the router decided.

    Attributes:
        weights: [T, K] fp32 (fp64 for fp64 logits), in the order of `experts`; differentiable.
        experts: [T, K] int64, by descending selection score, the lowest index first among equals.
        counts: [E] int32, slots per expert.
        aux_loss: 0-d, its coefficient included; differentiable; zero without one.
        z_loss: 0-d, its coefficient included; differentiable; zero without one.
    """

    weights: Tensor
    experts: Tensor
    counts: Tensor
    aux_loss: Tensor
    z_loss: Tensor


def route(
    logits: Tensor,
    top_k: int,
    *,
    score: str = "softmax",
    bias: Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    group_score: str = "sum_top2",
    renormalize: bool = True,
    scale: float = 1.0,
    aux_coeff: float = 0.0,
    z_coeff: float = 0.0,
    backend: str | None = None,
) -> Routing:
    """Choose the experts of each token and weigh them.

    Args:
        logits: Router logits, [T, E]; fp32 advised, any floating dtype taken. The arithmetic is fp32.
        top_k: Experts per token, 1 to the number of experts that the kept groups hold.
        score: "softmax" over all experts, or "sigmoid".
        bias: [E], added to the score for the selection alone; gets no gradient.
        num_groups: Number of equal groups of consecutive experts; 1 for none.
        top_groups: Number of groups that take part.
        group_score: "sum_top2", the sum of a group's two best selection scores, or "max".
        renormalize: Whether the weights of a token add up to `scale`.
        scale: Factor on the weights.
        aux_coeff: Coefficient of the load-balancing loss; 0 for none.
        z_coeff: Coefficient of the z-loss; 0 for none.
        backend: "reference", "triton", or None to choose by device.

    Returns:
        The `Routing`.

    Raises:
        ValueError: A setting is out of bounds, or, under `torch.autograd.detect_anomaly()`, a logit is NaN.

    Note:
        No host synchronization, except the NaN check under anomaly detection. Deterministic. Without anomaly
        detection a NaN logit is chosen last and makes its token's weights NaN; indices stay in range whatever the
        logits are.
    """
    rule = RouteRule(
        top_k=top_k,
        score=score,
        num_groups=num_groups,
        top_groups=top_groups,
        group_score=group_score,
        renormalize=renormalize,
        scale=float(scale),
        aux_coeff=float(aux_coeff),
        z_coeff=float(z_coeff),
    )
    _check(logits, bias, rule)
    backend = choose_backend(backend, logits)
    settings = [getattr(rule, each) for each in _SETTINGS]
    weights, experts, counts, aux_loss, z_loss = _route(
        logits.contiguous(), None if bias is None else bias.detach().contiguous(), *settings, backend
    )
    return Routing(weights=weights, experts=experts, counts=counts, aux_loss=aux_loss, z_loss=z_loss)


def _check(logits: Tensor, bias: Tensor | None, rule: RouteRule) -> None:
    """Raise one line for the first setting that is out of bounds."""
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ValueError(f"logits must be a floating-point [tokens, experts] matrix, got {_shape(logits)}")
    num_experts = logits.shape[1]
    if rule.score not in SCORES:
        raise ValueError(f"score {rule.score!r} is unknown; choose one of {', '.join(SCORES)}")
    if rule.group_score not in GROUP_SCORES:
        raise ValueError(f"group_score {rule.group_score!r} is unknown; choose one of {', '.join(GROUP_SCORES)}")
    if rule.num_groups < 1 or num_experts % rule.num_groups:
        raise ValueError(f"num_groups {rule.num_groups} must be at least 1 and divide the {num_experts} experts")
    if not 1 <= rule.top_groups <= rule.num_groups:
        raise ValueError(f"top_groups {rule.top_groups} must lie in 1..{rule.num_groups}, the number of groups")
    group_size = num_experts // rule.num_groups
    if rule.num_groups > 1 and rule.group_score == "sum_top2" and group_size < 2:
        raise ValueError(f"group_score 'sum_top2' needs groups of 2 or more, got groups of {group_size}; use 'max'")
    if not 1 <= rule.top_k <= group_size * rule.top_groups:
        raise ValueError(
            f"top_k {rule.top_k} must lie in 1..{group_size * rule.top_groups}, the experts that "
            f"{rule.top_groups} of {rule.num_groups} groups hold"
        )
    if bias is not None and (bias.shape != (num_experts,) or not bias.is_floating_point()):
        raise ValueError(f"bias must be a floating-point vector of {num_experts} experts, got {_shape(bias)}")


def _shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


# Once, at import: torch.compile of torch 2.11 cannot trace the question.
_SETTINGS = tuple(field.name for field in fields(RouteRule))


@torch.library.custom_op("farskip::route", mutates_args=())
def _route(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    score: str,
    num_groups: int,
    top_groups: int,
    group_score: str,
    renormalize: bool,
    scale: float,
    aux_coeff: float,
    z_coeff: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rule = RouteRule(
        top_k=top_k,
        score=score,
        num_groups=num_groups,
        top_groups=top_groups,
        group_score=group_score,
        renormalize=renormalize,
        scale=scale,
        aux_coeff=aux_coeff,
        z_coeff=z_coeff,
    )
    if torch.is_anomaly_enabled() and torch.is_anomaly_check_nan_enabled():
        bad = logits.isnan().any(1).nonzero().flatten()
        if len(bad):
            raise ValueError(
                f"router logits hold NaN in {len(bad)} of {len(logits)} tokens, first in token {int(bad[0])}; "
                "look for the NaN in the layers before this router"
            )
    if backend == "triton":
        from farskip.triton_kernels.route_triton import route_triton

        return route_triton(logits, bias, rule)
    weights, experts, counts, aux_loss, z_loss = route_reference(logits, bias, rule)
    return weights, experts, counts, aux_loss.clone(), z_loss.clone()  # two zeros may be one tensor, outputs may not


@_route.register_fake
def _(logits: Tensor, bias: Tensor | None, top_k: int, *_rule: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    num_tokens, num_experts = logits.shape
    return (
        logits.new_empty(num_tokens, top_k, dtype=dtype),
        logits.new_empty(num_tokens, top_k, dtype=torch.int64),
        logits.new_empty(num_experts, dtype=torch.int32),
        logits.new_empty((), dtype=dtype),
        logits.new_empty((), dtype=dtype),
    )


@torch.library.custom_op("farskip::route_backward", mutates_args=())
def _route_backward(
    grad_weights: Tensor,
    grad_aux: Tensor,
    grad_z: Tensor,
    logits: Tensor,
    experts: Tensor,
    counts: Tensor,
    score: str,
    renormalize: bool,
    scale: float,
    aux_coeff: float,
    z_coeff: float,
    backend: str,
) -> Tensor:
    rule = RouteRule(
        top_k=experts.shape[1],
        score=score,
        renormalize=renormalize,
        scale=scale,
        aux_coeff=aux_coeff,
        z_coeff=z_coeff,
    )
    if backend == "triton":
        from farskip.triton_kernels.route_triton import route_backward_triton

        return route_backward_triton(grad_weights, grad_aux, grad_z, logits, experts, counts, rule)
    return route_backward_reference(grad_weights, grad_aux, grad_z, logits, experts, counts, rule)


@_route_backward.register_fake
def _(grad_weights: Tensor, grad_aux: Tensor, grad_z: Tensor, logits: Tensor, *_rest: Any) -> Tensor:
    return torch.empty_like(logits)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], output[1], output[2])
    _logits, _bias, _top_k, score, _groups, _top, _group_score, *rest = inputs
    ctx.rule = (score, *rest)  # renormalize, scale, aux_coeff, z_coeff, backend
    ctx.mark_non_differentiable(output[1], output[2])


def _backward(ctx: Any, grad_weights: Tensor, _experts: Any, _counts: Any, grad_aux: Tensor, grad_z: Tensor) -> Any:
    logits, experts, counts = ctx.saved_tensors
    # `.sum().backward()` hands in an expanded gradient with strides of zero
    grad = _route_backward(grad_weights.contiguous(), grad_aux, grad_z, logits, experts, counts, *ctx.rule)
    return grad, *[None] * 11


_route.register_autograd(_backward, setup_context=_save)
