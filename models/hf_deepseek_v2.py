"""DeepSeek-V2: latent attention, softmax router, greedy or limited to groups, shared experts fused into one."""

from typing import Any

from farskip.models.family import Family
from farskip.models.hf_layer import HFSubBlocks
from farskip.models.router_rule import RouterRule


def router_rule(router: Any) -> RouterRule:
    """Softmax, never renormalized; with ``group_limited_greedy``, groups by their best expert."""
    limited = router.topk_method == "group_limited_greedy"
    return RouterRule(
        top_k=router.top_k,
        score="softmax",
        fp32_logits=True,
        num_groups=router.num_group if limited else 1,
        top_groups=router.topk_group if limited else 1,
        group_score="max",
        renormalize=False,
        scale=router.routed_scaling_factor,
    )


FAMILY = Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    score="softmax",
    sub_blocks=HFSubBlocks,
    router=router_rule,
)
