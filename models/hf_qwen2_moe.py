"""Qwen2-MoE: softmax router, a shared expert whose output a sigmoid gate of its own scales."""

import torch
from torch import nn

from farskip.models.family import Family
from farskip.models.hf_layer import HFSubBlocks
from farskip.models.router_rule import softmax_router


class Qwen2MoeSubBlocks(HFSubBlocks):
    """The shared expert's gate belongs to the shared expert."""

    SHARED = "shared_expert"

    def shared(self, normed_BSD: torch.Tensor) -> torch.Tensor:
        """See `SubBlocks.shared`."""
        gate: nn.Module = self.mlp_module.shared_expert_gate
        return gate(normed_BSD).sigmoid() * super().shared(normed_BSD)


FAMILY = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    score="softmax",
    sub_blocks=Qwen2MoeSubBlocks,
    undeclared_config_keys=("head_dim",),
    tensor_plan={
        "layers.*.mlp.shared_expert.gate_proj": "colwise",
        "layers.*.mlp.shared_expert.up_proj": "colwise",
        "layers.*.mlp.shared_expert.down_proj": "rowwise",
    },
    router=softmax_router,
)
