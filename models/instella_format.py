"""A model in Instella-MoE's checkpoint format: what can be said in it, and what changes on the way there and back.

The tensors' names are DeepSeek-V3's, every expert's matrices alone, plus one gate per attention. Only DeepSeek-V3 and
Instella-MoE itself can be said in it, and of the former only what Instella-MoE's own code is known to compute.

Legend: E experts, F width of an expert, D hidden.
"""

import re
from collections.abc import Mapping
from typing import Any

from farskip.models.checkpoint_files import StoredCheckpoint
from farskip.models.family import Family, family_of_architecture
from farskip.wiring import Wiring

INSTELLA, DEEPSEEK = "InstellaMoEForCausalLM", "DeepseekV3ForCausalLM"

LIES = (
    "config.json says model_type deepseek_v3, as Instella-MoE's does, and it is not: a load that goes by it drops the "
    "gates and the wiring and computes an ordinary DeepSeek-V3; use farskip.load, or trust_remote_code=True"
)

Part = tuple[str, str, tuple[int, ...], int, int]
"""A tensor of a new file: name, dtype, shape, first byte in the old file, number of bytes."""

_COMPUTES = {
    "q_lora_rank": None,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "attention_bias": False,
    "rope_interleave": True,
    "tie_word_embeddings": False,
}
"""Settings of DeepSeek-V3 that Instella-MoE fixes (its report); with others its code may compute something else."""

_STACKED = re.compile(r"(?P<experts>.*\.mlp\.experts)\.(?P<weight>gate_up_proj|down_proj)")
_GATE = "model.layers.{layer}.self_attn.gate_proj.weight"


def to_instella(family: Family, config: dict[str, Any], settings: Any, wiring: Wiring) -> tuple[Family, dict[str, Any]]:
    """Say a model in Instella-MoE's config.

    Args:
        family: of the model.
        config: its ordinary config.json.
        settings: the same as transformers' config, with all defaults.
        wiring: of the model.

    Returns:
        Family and config.json, without the wiring.

    Raises:
        ValueError: its format cannot say the model or the wiring.
    """
    instella = family_of_architecture(INSTELLA)
    if family.architecture not in (DEEPSEEK, INSTELLA):
        raise ValueError(
            f"{family.name} cannot be said in Instella-MoE's format; only deepseek_v3 and instella_moe can"
        )
    if family.architecture == DEEPSEEK:
        for key, value in _COMPUTES.items():
            found = getattr(settings, key, value)
            if found != value and not (value == 1 and found is None):
                raise ValueError(f"{key}={found!r} cannot be said in Instella-MoE's format, where it is {value!r}")
        config = {**config, "architectures": [INSTELLA], "gated_attention": False}
    assert instella.wiring_keys is not None
    if instella.wiring_keys.write(wiring) is None:
        raise ValueError(
            f"Instella-MoE's format cannot say the wiring {wiring}; it says ordinary, farskip, attn_only or mlp_only, "
            "on one stretch of layers"
        )
    return instella, config


def from_instella(family: Family, config: dict[str, Any]) -> tuple[Family, dict[str, Any]]:
    """Family and config.json without its own keys. Without gates the model is a DeepSeek-V3."""
    assert family.wiring_keys is not None
    config = {key: value for key, value in config.items() if key not in family.wiring_keys.names}
    if not config.get("gated_attention", True):
        del config["gated_attention"]
        config["architectures"] = [DEEPSEEK]
        return family_of_architecture(DEEPSEEK), config
    return family, config


def refuse_wrong_gates(stored: StoredCheckpoint, config: Mapping[str, Any], num_layers: int) -> None:
    """The gates are what a plain DeepSeek-V3 does not have, and what a careless copy loses.

    Raises:
        ValueError: one is missing, or is there though the config says otherwise.
    """
    tensors, is_gated = stored.tensors, bool(config.get("gated_attention", True))
    for layer in range(num_layers):
        name = _GATE.format(layer=layer)
        if (name in tensors) != is_gated:
            what = "missing" if is_gated else "unexpected"
            raise ValueError(f"{what} tensors: {name}; config.json says gated_attention {str(is_gated).lower()}")


def experts_one_by_one(stored: StoredCheckpoint) -> dict[str, tuple[Part, ...]]:
    """New parts of the files, by name, that hold experts stacked: gate_up_proj [E, 2F, D] and down_proj [E, D, F].

    Each matrix is one stretch of bytes, and they follow each other as before: only the header changes.
    """
    cut = {}
    for file in stored.files:
        parts: list[Part] = []
        for tensor in file.tensors:
            match = _STACKED.fullmatch(tensor.name)
            if match is None or len(tensor.shape) != 3:
                parts.append((tensor.name, tensor.dtype, tensor.shape, tensor.start, tensor.num_bytes))
                continue
            matrices = ("gate_proj", "up_proj") if match["weight"] == "gate_up_proj" else ("down_proj",)
            num_experts, rows, columns = tensor.shape
            num_bytes, start = tensor.num_bytes // (num_experts * len(matrices)), tensor.start
            for expert in range(num_experts):
                for matrix in matrices:
                    name = f"{match['experts']}.{expert}.{matrix}.weight"
                    parts.append((name, tensor.dtype, (rows // len(matrices), columns), start, num_bytes))
                    start += num_bytes
        if len(parts) != len(file.tensors):
            cut[file.path.name] = tuple(parts)
    return cut
