"""DeepSeek-V3 (Moonlight and Kimi-K2 use it): latent attention, sigmoid router with groups and a selection bias."""

from farskip.models.family import Family
from farskip.models.hf_layer import HFSubBlocks

FAMILY = Family(model_type="deepseek_v3", architecture="DeepseekV3ForCausalLM", score="sigmoid", sub_blocks=HFSubBlocks)
