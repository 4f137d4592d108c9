"""DeepSeek-V2: latent attention, softmax router, greedy or limited to groups, shared experts fused into one."""

from farskip.models.family import Family
from farskip.models.hf_layer import HFSubBlocks

FAMILY = Family(model_type="deepseek_v2", architecture="DeepseekV2ForCausalLM", score="softmax", sub_blocks=HFSubBlocks)
