"""Qwen3 dense: grouped-query attention with normed queries and keys, a sliding window in later layers on request."""

from farskip.models.family import Family
from farskip.models.hf_layer import HFSubBlocks

FAMILY = Family(model_type="qwen3", architecture="Qwen3ForCausalLM", score="softmax", sub_blocks=HFSubBlocks)
