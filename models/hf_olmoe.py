"""OLMoE: all layers MoE, softmax router, no shared expert; its attention may clip queries, keys and values.

Query and key are normed over all heads together, for which transformers' plan gathers them; here each rank keeps its
heads and the norms sum over the ranks.
"""

from farskip.models.family import Family
from farskip.models.hf_layer import HFSubBlocks
from farskip.models.router_rule import softmax_router

FAMILY = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    score="softmax",
    sub_blocks=HFSubBlocks,
    router=softmax_router,
    tensor_plan={
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.self_attn.q_norm": "head_norm",
        "layers.*.self_attn.k_norm": "head_norm",
    },
)
