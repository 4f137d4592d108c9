"""OLMoE: all layers MoE, softmax router, no shared expert; its attention may clip queries, keys and values."""

from farskip.models.family import Family
from farskip.models.hf_layer import HFSubBlocks

FAMILY = Family(model_type="olmoe", architecture="OlmoeForCausalLM", score="softmax", sub_blocks=HFSubBlocks)
