"""GPT-OSS: biases everywhere, attention sinks (eager or flash attention only), a sliding window in every second layer.

transformers hides the documents of a packed batch from each other where its model hands the position ids to its masks.
GPT-OSS does not, so its masks are made here.
"""

from typing import Any

import torch

from farskip.models.family import Family
from farskip.models.hf_layer import HFSubBlocks


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


FAMILY = Family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    score="softmax",
    sub_blocks=GptOssSubBlocks,
    packed_masks=packed_masks,
)
