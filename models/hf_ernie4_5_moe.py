"""ERNIE-4.5-MoE: softmax router with a selection bias kept in a module of its own, shared experts where asked for."""

import torch

from farskip.models.family import Family
from farskip.models.hf_layer import HFSubBlocks


class Ernie45MoeSubBlocks(HFSubBlocks):
    """The selection bias is a parameter [1, E] that never requires a gradient."""

    @property
    def selection_bias(self) -> torch.Tensor:
        """See `HFSubBlocks.selection_bias`; a view, so that it can be updated in place."""
        return self.gate.moe_statics.e_score_correction_bias.detach()[0]


FAMILY = Family(
    model_type="ernie4_5_moe",
    architecture="Ernie4_5_MoeForCausalLM",
    score="softmax",
    sub_blocks=Ernie45MoeSubBlocks,
    undeclared_config_keys=("head_dim",),
)
