"""OLMoE: all layers MoE, softmax router, no shared expert; its attention may clip queries, keys and values."""

from farskip.models.family import Family
from farskip.models.hf_layer import HFSubBlocks
from farskip.models.router_rule import softmax_router

FAMILY = Family(
    model_type="olmoe", architecture="OlmoeForCausalLM", score="softmax", sub_blocks=HFSubBlocks, router=softmax_router
)
