"""Sizes of a model, read off its config.json alone: no torch, no transformers, no tensors.

Decides, per architecture, which layers have experts and how wide their parts are. tests/models/test_model_shape.py
holds it to the weights of every family's own model. A key that is needed and not there is named, not guessed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farskip.models.config_file import read_config
from farskip.stage_costs import ModelShape
from farskip.wiring import DENSE, MOE, MOE_SHARED

Config = Mapping[str, Any]

_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
_TOP_K = ("num_experts_per_tok", "moe_k")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rule:
    """How one architecture says its sizes.

    Attributes:
        model_type: that goes with it.
        latent: latent attention instead of heads that share keys and values.
        gated: latent attention has a gate of its own, unless the config says otherwise.
        is_moe: whether a layer has routed experts.
        expert: key of the width of a routed expert.
        dense: key of the width of a dense MLP.
        shared: width of the shared expert; 0: none.
    """

    model_type: str
    latent: bool = False
    gated: bool = False
    is_moe: Callable[[Config, int], bool] = lambda config, layer: True
    expert: str = "intermediate_size"
    dense: str = "intermediate_size"
    shared: Callable[[Config], int] = lambda config: 0


def _after_the_first(config: Config, layer: int) -> bool:
    return layer >= (config.get("first_k_dense_replace") or 0)


def _sparse_step(config: Config, layer: int) -> bool:
    is_step = (layer + 1) % _step(config, "decoder_sparse_step") == 0
    return is_step and layer not in (config.get("mlp_only_layers") or ())


def _llama4(config: Config, layer: int) -> bool:
    listed = config.get("moe_layers")
    return layer in listed if listed is not None else (layer + 1) % _step(config, "interleave_moe_layer_step") == 0


def _ernie(config: Config, layer: int) -> bool:
    end = config.get("moe_layer_end_index", -1)
    last = _number(config, "num_hidden_layers") - 1 if end == -1 else end
    inside = config.get("moe_layer_start_index", 1) <= layer <= last
    return inside and (layer + 1) % _step(config, "moe_layer_interval") == 0


def _step(config: Config, key: str) -> int:
    return _number(config, key) if key in config else 1


def _multiple(key: str) -> Callable[[Config], int]:
    return lambda config: (config.get(key) or 0) * _number(config, "moe_intermediate_size")


def _never(config: Config, layer: int) -> bool:
    return False


_FIRST_DENSE: dict[str, Any] = {
    "is_moe": _after_the_first,
    "expert": "moe_intermediate_size",
    "shared": _multiple("n_shared_experts"),
}
_RULES: Mapping[str, _Rule] = {
    "DeepseekV2ForCausalLM": _Rule(model_type="deepseek_v2", latent=True, **_FIRST_DENSE),
    "DeepseekV3ForCausalLM": _Rule(model_type="deepseek_v3", latent=True, **_FIRST_DENSE),
    "Ernie4_5_MoeForCausalLM": _Rule(
        model_type="ernie4_5_moe",
        is_moe=_ernie,
        expert="moe_intermediate_size",
        shared=_multiple("moe_num_shared_experts"),
    ),
    "Glm4MoeForCausalLM": _Rule(model_type="glm4_moe", **_FIRST_DENSE),
    "GptOssForCausalLM": _Rule(model_type="gpt_oss"),
    "InstellaMoEForCausalLM": _Rule(model_type="deepseek_v3", latent=True, gated=True, **_FIRST_DENSE),
    "Llama4ForCausalLM": _Rule(
        model_type="llama4_text",
        is_moe=_llama4,
        dense="intermediate_size_mlp",
        shared=lambda config: _number(config, "intermediate_size"),
    ),
    "LlamaForCausalLM": _Rule(model_type="llama", is_moe=_never),
    "MixtralForCausalLM": _Rule(model_type="mixtral"),
    "OlmoeForCausalLM": _Rule(model_type="olmoe"),
    "Qwen2MoeForCausalLM": _Rule(
        model_type="qwen2_moe",
        is_moe=_sparse_step,
        expert="moe_intermediate_size",
        shared=lambda config: _number(config, "shared_expert_intermediate_size"),
    ),
    "Qwen3ForCausalLM": _Rule(model_type="qwen3", is_moe=_never),
    "Qwen3MoeForCausalLM": _Rule(model_type="qwen3_moe", is_moe=_sparse_step, expert="moe_intermediate_size"),
}


def read_shape(folder: Path) -> tuple[str, ModelShape]:
    """The architecture of a checkpoint, rewired or not, and its sizes.

    Raises:
        ValueError: no config.json, an unknown architecture, a model_type that lies, or a size that is not there.
    """
    config = read_config(folder)
    record = config.get("farskip")
    architectures, model_type = config.get("architectures"), config.get("model_type")
    if isinstance(record, dict):  # a rewired checkpoint: see farskip.models.export
        architectures = [record["architecture"]] if "architecture" in record else architectures
        model_type = record.get("base_model_type")
    architecture = str(architectures[0]) if isinstance(architectures, list) and architectures else None
    if architecture is None or architecture not in _RULES:
        raise ValueError(f"{folder}: model architecture {architecture!r} is not supported; known: {', '.join(_RULES)}")
    rule = _RULES[architecture]
    if model_type != rule.model_type:
        raise ValueError(
            f"{folder}: architecture {architecture} goes with model_type {rule.model_type!r}, but config.json says "
            f"{model_type!r}; correct whichever is wrong"
        )
    try:
        return architecture, _shape(rule, config)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder}: config.json: {error}") from None


def _shape(rule: _Rule, config: Config) -> ModelShape:
    hidden, layers = _number(config, "hidden_size"), range(_number(config, "num_hidden_layers"))
    is_moe = [rule.is_moe(config, layer) for layer in layers]
    shared = rule.shared(config) if any(is_moe) else 0
    moe = MOE_SHARED if shared else MOE
    attention = _latent(config, hidden, rule.gated) if rule.latent else _grouped(config, hidden)
    return ModelShape(
        blocks=tuple(moe if here else DENSE for here in is_moe),
        hidden=hidden,
        num_experts=_number(config, *_EXPERTS) if any(is_moe) else 0,
        top_k=_number(config, *_TOP_K) if any(is_moe) else 0,
        **attention,
        mlp=0 if all(is_moe) else 3 * hidden * _number(config, rule.dense),
        shared=3 * hidden * shared,
        expert=3 * hidden * _number(config, rule.expert) if any(is_moe) else 0,
    )


def _grouped(config: Config, hidden: int) -> dict[str, int]:
    heads = _number(config, "num_attention_heads")
    shared_heads = heads if config.get("num_key_value_heads") is None else _number(config, "num_key_value_heads")
    head = hidden // heads if config.get("head_dim") is None else _number(config, "head_dim")
    return {
        "attention_in": hidden * (heads + 2 * shared_heads) * head,
        "attention_out": heads * head * hidden,
        "attention_width": 2 * heads * head,
    }


def _latent(config: Config, hidden: int, gated: bool) -> dict[str, int]:
    heads, latent = _number(config, "num_attention_heads"), _number(config, "kv_lora_rank")
    plain, rotary, value = (_number(config, key) for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    if "q_lora_rank" not in config:
        raise ValueError("q_lora_rank is not there; add it, null where queries are not compressed")
    query = 0 if config["q_lora_rank"] is None else _number(config, "q_lora_rank")
    gate = hidden * heads * value if gated and config.get("gated_attention", True) else 0
    return {
        "attention_in": (query or hidden) * heads * (plain + rotary) + latent * heads * (plain + value) + gate,
        "attention_whole": hidden * (query + latent + rotary),
        "attention_out": heads * value * hidden,
        "attention_width": heads * (plain + rotary + value),
    }


def _number(config: Config, *keys: str) -> int:
    """The size under the first of several names that is there."""
    key = next((key for key in keys if config.get(key) is not None), keys[0])
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{key}={value!r} is no size; it has to be a whole number of at least 1")
    return value
