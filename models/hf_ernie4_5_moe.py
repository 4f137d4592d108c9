"""ERNIE-4.5-MoE: softmax router with a selection bias kept in a module of its own, shared experts where asked for."""

from typing import Any

import torch

from farskip.models.family import Family
from farskip.models.hf_layer import HFSubBlocks
from farskip.models.router_rule import RouterRule


class Ernie45MoeSubBlocks(HFSubBlocks):
    """The selection bias is a parameter [1, E] that never requires a gradient."""

    @property
    def selection_bias(self) -> torch.Tensor:
        """See `HFSubBlocks.selection_bias`; a view, so that it can be updated in place."""
        return self.gate.moe_statics.e_score_correction_bias.detach()[0]


def router_rule(router: Any) -> RouterRule:
    """Softmax, a bias that only selects, renormalized."""
    bias_E = router.moe_statics.e_score_correction_bias.detach()[0]
    return RouterRule(top_k=router.top_k, score="softmax", fp32_logits=True, bias=bias_E)


FAMILY = Family(
    model_type="ernie4_5_moe",
    architecture="Ernie4_5_MoeForCausalLM",
    score="softmax",
    sub_blocks=Ernie45MoeSubBlocks,
    undeclared_config_keys=("head_dim",),
    router=router_rule,
)
