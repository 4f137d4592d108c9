"""Qwen3-MoE: grouped-query attention, softmax router, no shared expert."""

from farskip.models.family import Family
from farskip.models.hf_layer import HFSubBlocks
from farskip.models.router_rule import softmax_router

FAMILY = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    score="softmax",
    sub_blocks=HFSubBlocks,
    undeclared_config_keys=("head_dim",),
    router=softmax_router,
)
