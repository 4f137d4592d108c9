"""Model families that farskip can rewire: one short `hf_*.py` per family, collected here.

A family says where in a decoder layer of its transformers model the sub-modules are. It holds no modelling code. What a
family does differently from `HFSubBlocks` is a subclass of it in the family's own file.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from farskip.models.hf_layer import HFSubBlocks


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One transformers model family.

    Attributes:
        model_type: what its config calls itself.
        architecture: class name of its causal language model, the key that selects it.
        score: the router's score function, ``softmax`` or ``sigmoid``.
        sub_blocks: takes one decoder layer apart.
        undeclared_config_keys: settings that its modelling code reads though its config class does not declare them.
    """

    model_type: str
    architecture: str
    score: str
    sub_blocks: Callable[[nn.Module], HFSubBlocks]
    undeclared_config_keys: tuple[str, ...] = ()


def families() -> tuple[Family, ...]:
    """All families, in alphabetical order."""
    from farskip.models import hf_deepseek_v3, hf_qwen3_moe

    return (hf_deepseek_v3.FAMILY, hf_qwen3_moe.FAMILY)


def family_of_architecture(architecture: str | None) -> Family:
    """The family whose causal language model has this class name.

    Raises:
        ValueError: no such family; names the closest one.
    """
    known = {family.architecture: family for family in families()}
    if architecture in known:
        return known[architecture]
    near = difflib.get_close_matches(architecture or "", known, n=1, cutoff=0.4)
    hint = f"; closest: {near[0]}" if near else ""
    raise ValueError(f"model architecture {architecture!r} is not supported{hint}; known: {', '.join(known)}")


def family_of_model(model: nn.Module) -> Family:
    """The family of a loaded transformers model, chosen by its class, never by what its config claims.

    Raises:
        ValueError: not a known causal language model.
    """
    return family_of_architecture(type(model).__name__)


def backbone_of(model: Any) -> nn.Module:
    """The part of a causal language model in front of its head."""
    return model.base_model
