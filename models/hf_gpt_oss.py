"""GPT-OSS: biases everywhere, attention sinks (eager or flash attention only), a sliding window in every second layer.

transformers hides the documents of a packed batch from each other where its model hands the position ids to its masks.
GPT-OSS does not, so its masks are made here.
"""

from typing import Any

import torch

from farskip.models.family import Family
from farskip.models.hf_layer import HFSubBlocks
from farskip.models.router_rule import RouterRule


class GptOssSubBlocks(HFSubBlocks):
    """The router has another name."""

    GATE = "router"


def packed_masks(config: Any, embedded_BSD: torch.Tensor, position_ids_BS: torch.Tensor) -> dict[str, Any]:
    """One mask per kind of layer, cut where position ids restart. See `Family.packed_masks`."""
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

    arguments = {
        "config": config,
        "inputs_embeds": embedded_BSD,
        "attention_mask": None,
        "past_key_values": None,
        "position_ids": position_ids_BS,
    }
    return {
        "full_attention": create_causal_mask(**arguments),
        "sliding_attention": create_sliding_window_causal_mask(**arguments),
    }


def router_rule(router: Any) -> RouterRule:
    """Softmax over the chosen logits alone: the renormalized softmax over all."""
    return RouterRule(top_k=router.top_k, score="softmax", fp32_logits=False)


def clamped_gate(experts: Any) -> dict[str, Any]:
    """Gate and up alternate, both are cut, and 1 is added to up."""
    return {"interleaved": True, "limit": experts.limit, "alpha": experts.alpha, "up_offset": 1.0}


FAMILY = Family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    score="softmax",
    sub_blocks=GptOssSubBlocks,
    packed_masks=packed_masks,
    tensor_plan={
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.self_attn.sinks": "heads",
    },
    router=router_rule,
    swiglu=clamped_gate,
)
