"""One tiny config per model family, and variants: what tests/models/test_families.py runs on. A family passes by being
listed in `CASES`, under its own name.

Nothing in a tiny model hides an error: weights are large enough for every stream to differ, no norm weight is 1 and no
bias is 0.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from farskip.models.family import Family, families
from farskip.models.testing_models import VOCABULARY

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "qk_nope_head_dim": 8,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A tiny model.

    Attributes:
        family: `Family.name`.
        config: settings of its config besides `SMALL`.
        attention: the attention implementation.
        same_order: whether untouched transformers adds gradients of the MoE's input in our order. Where it runs the
            shared expert before the routed ones, the sum is the same but for its rounding.
    """

    family: str
    config: dict[str, Any] = field(default_factory=dict)
    attention: str = "sdpa"
    same_order: bool = True


_QWEN2_MOE = {
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [0],
}
_QWEN3_MOE = {
    "head_dim": 8,
    "moe_intermediate_size": 24,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}
_DEEPSEEK_V2 = {
    **LATENT,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
}
_DEEPSEEK_V3 = {**_DEEPSEEK_V2, "n_group": 4, "topk_group": 2}
_ERNIE4_5_MOE = {
    "moe_intermediate_size": 24,
    "moe_num_experts": 8,
    "moe_k": 2,
    "moe_num_shared_experts": 1,
    "moe_layer_start_index": 1,
    "tie_word_embeddings": True,
}
_GLM4_MOE = {
    "head_dim": 8,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
}
_GPT_OSS = {
    "head_dim": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": 4,
    "max_position_embeddings": 128,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 8.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 16,
    },
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 16,
}
_INSTELLA_MOE = {
    **_DEEPSEEK_V2,
    "q_lora_rank": None,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 0,
    "farskip": True,
    "gated_attention": True,
    "max_position_embeddings": 64,
    "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
}
_LLAMA4_TEXT = {
    "head_dim": 8,
    "intermediate_size_mlp": 40,
    "num_local_experts": 8,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 2,
    "no_rope_layer_interval": 2,
    "attention_chunk_size": 8,
    "floor_scale": 4,
}

CASES: dict[str, Case] = {
    "deepseek_v2": Case(family="deepseek_v2", config=_DEEPSEEK_V2),
    "deepseek_v2-groups": Case(
        family="deepseek_v2",
        config={
            **_DEEPSEEK_V2,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "q_lora_rank": None,
            "first_k_dense_replace": 0,
        },
    ),
    "deepseek_v2-yarn-tied": Case(
        family="deepseek_v2",
        config={
            **_DEEPSEEK_V2,
            "tie_word_embeddings": True,
            "max_position_embeddings": 64,
            "rope_parameters": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        },
    ),
    "deepseek_v3": Case(family="deepseek_v3", config=_DEEPSEEK_V3),
    "ernie4_5_moe": Case(family="ernie4_5_moe", config=_ERNIE4_5_MOE, same_order=False),
    "ernie4_5_moe-no-shared-untied": Case(
        family="ernie4_5_moe",
        config={**_ERNIE4_5_MOE, "moe_num_shared_experts": 0, "use_bias": True, "tie_word_embeddings": False},
    ),
    "ernie4_5_moe-interleaved": Case(
        family="ernie4_5_moe",
        config={**_ERNIE4_5_MOE, "moe_layer_start_index": 0, "moe_layer_end_index": 2, "moe_layer_interval": 2},
        same_order=False,
    ),
    "glm4_moe": Case(family="glm4_moe", config=_GLM4_MOE),
    "glm4_moe-groups-tied": Case(
        family="glm4_moe",
        config={
            **_GLM4_MOE,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 0,
            "use_qk_norm": True,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "gpt_oss": Case(family="gpt_oss", config=_GPT_OSS, attention="eager"),
    "gpt_oss-full-tied": Case(
        family="gpt_oss",
        config={**_GPT_OSS, "layer_types": ["full_attention"] * 4, "tie_word_embeddings": True, "swiglu_limit": 0.3},
        attention="eager",
    ),
    "instella_moe": Case(family="instella_moe", config=_INSTELLA_MOE),
    "instella_moe-no-dense-tied": Case(
        family="instella_moe",
        config={**_INSTELLA_MOE, "first_k_dense_replace": 0, "tie_word_embeddings": True, "farskip": False},
    ),
    "instella_moe-ungated": Case(family="instella_moe", config={**_INSTELLA_MOE, "gated_attention": False}),
    "llama": Case(family="llama"),
    "llama-biased-tied": Case(
        family="llama", config={"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
    ),
    "llama4_text": Case(family="llama4_text", config=_LLAMA4_TEXT),
    "llama4_text-all-moe-two-experts-tied": Case(
        family="llama4_text",
        config={
            **_LLAMA4_TEXT,
            "interleave_moe_layer_step": 1,
            "num_experts_per_tok": 2,
            "use_qk_norm": False,
            "attention_chunk_size": 64,
            "tie_word_embeddings": True,
        },
    ),
    "mixtral": Case(family="mixtral", config={"num_local_experts": 8}),
    "mixtral-window-tied": Case(
        family="mixtral", config={"num_local_experts": 8, "sliding_window": 4, "tie_word_embeddings": True}
    ),
    "olmoe": Case(family="olmoe", config={"num_experts": 8, "num_experts_per_tok": 2}),
    "olmoe-clipped-normed": Case(
        family="olmoe", config={"num_experts": 8, "num_experts_per_tok": 3, "clip_qkv": 0.5, "norm_topk_prob": True}
    ),
    "qwen2_moe": Case(family="qwen2_moe", config=_QWEN2_MOE, same_order=False),
    "qwen2_moe-no-dense-tied": Case(
        family="qwen2_moe",
        config={**_QWEN2_MOE, "mlp_only_layers": [], "norm_topk_prob": True, "tie_word_embeddings": True},
        same_order=False,
    ),
    "qwen2_moe-interleaved-window": Case(
        family="qwen2_moe",
        config={
            **_QWEN2_MOE,
            "mlp_only_layers": [],
            "decoder_sparse_step": 2,
            "use_sliding_window": True,
            "sliding_window": 4,
        },
        same_order=False,
    ),
    "qwen3": Case(family="qwen3", config={"head_dim": 8}),
    "qwen3-window-tied": Case(
        family="qwen3",
        config={
            "head_dim": 8,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 2,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3_moe": Case(family="qwen3_moe", config={**_QWEN3_MOE, "mlp_only_layers": [0]}),
}
FAMILIES = tuple(name for name in CASES if name == CASES[name].family)
"""Every family once, in its plainest form."""


def family_of(case: Case) -> Family:
    """The adapter."""
    return next(family for family in families() if family.name == case.family)


def is_dense(case: Case) -> bool:
    """Whether no layer has experts."""
    return case.family in ("llama", "qwen3")


def build(case: Case, **changes: Any) -> Any:
    """The untouched model, in training mode; equal for equal arguments."""
    from transformers import AutoConfig

    family = family_of(case)
    config = AutoConfig.for_model(family.model_type, **{**SMALL, **case.config, **changes})
    torch.manual_seed(0)
    model = family.model_class()._from_config(config, attn_implementation=case.attention)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("bias"):
                tensor.add_(0.1 * torch.randn_like(tensor))
            elif tensor.dim() == 1 and "inv_freq" not in name:
                tensor.add_(0.3 * torch.randn_like(tensor))
    return model.train()
