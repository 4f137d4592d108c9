"""Llama (1 to 3): dense, grouped-query attention. With no expert anywhere, farskip is the parallel block."""

from farskip.models.family import Family
from farskip.models.hf_layer import HFSubBlocks

FAMILY = Family(model_type="llama", architecture="LlamaForCausalLM", score="softmax", sub_blocks=HFSubBlocks)
