"""GLM-4-MoE: grouped-query attention, rotary on half of each head, sigmoid router with groups and a selection bias."""

from farskip.models.family import Family
from farskip.models.hf_layer import HFSubBlocks
from farskip.models.router_rule import grouped_sigmoid_router

FAMILY = Family(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    score="sigmoid",
    sub_blocks=HFSubBlocks,
    undeclared_config_keys=("head_dim", "partial_rotary_factor"),
    router=grouped_sigmoid_router,
)
