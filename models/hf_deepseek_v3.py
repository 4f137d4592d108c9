"""DeepSeek-V3 (Moonlight and Kimi-K2 use it): latent attention, sigmoid router with groups and a selection bias."""

from farskip.models.family import Family
from farskip.models.hf_layer import HFSubBlocks
from farskip.models.router_rule import grouped_sigmoid_router

LATENT_ATTENTION_PLAN = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.q_b_proj": "colwise",
    "layers.*.self_attn.kv_b_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
}
"""transformers' plan has none for this attention: heads are cut, the latents stay whole."""

FAMILY = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    score="sigmoid",
    other_model_types=("kimi_k2",),
    sub_blocks=HFSubBlocks,
    router=grouped_sigmoid_router,
    tensor_plan=LATENT_ATTENTION_PLAN,
)
