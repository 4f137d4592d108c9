"""What a family's router and its experts' gate compute, said as data, so that fused kernels can compute the same.

Legend: E experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterRule:
    """What a router computes, in the terms of `farskip.triton_kernels.route.route`.

    Attributes:
        top_k: experts per token.
        score: ``softmax`` or ``sigmoid``.
        fp32_logits: whether the logits are computed in fp32, instead of in the dtype of the weights.
        bias: the selection bias [E]; None if there is none.
        num_groups: groups of experts.
        top_groups: groups that take part.
        group_score: ``sum_top2`` or ``max``.
        renormalize: whether the weights of a token add up to `scale`.
        scale: factor of the weights.
    """

    top_k: int
    score: str
    fp32_logits: bool
    bias: torch.Tensor | None = None
    num_groups: int = 1
    top_groups: int = 1
    group_score: str = "sum_top2"
    renormalize: bool = True
    scale: float = 1.0


def softmax_router(router: Any) -> RouterRule:
    """Softmax over all experts, the best `top_k`, renormalized where the config says so (Qwen, OLMoE, Mixtral)."""
    return RouterRule(
        top_k=router.top_k,
        score="softmax",
        fp32_logits=False,
        renormalize=bool(getattr(router, "norm_topk_prob", True)),
    )


def grouped_sigmoid_router(router: Any) -> RouterRule:
    """Sigmoid, groups by the sum of their two best, a bias that only selects (DeepSeek-V3, GLM-4-MoE)."""
    return RouterRule(
        top_k=router.top_k,
        score="sigmoid",
        fp32_logits=True,
        bias=router.e_score_correction_bias,
        num_groups=router.num_group,
        top_groups=router.topk_group,
        renormalize=router.norm_topk_prob,
        scale=router.routed_scaling_factor,
    )


def silu_gate(experts: Any) -> Mapping[str, Any] | None:
    """The plain SwiGLU of packed halves; None where the experts' activation is another one."""
    from transformers.activations import SiLUActivation

    return {} if isinstance(getattr(experts, "act_fn", None), SiLUActivation | nn.SiLU) else None
