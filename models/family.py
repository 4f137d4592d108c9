"""Model families that farskip can rewire: one short `hf_*.py` per family, collected here.

A family says where in a decoder layer of its transformers model the sub-modules are. It holds no modelling code. What a
family does differently from `HFSubBlocks` is a subclass of it in the family's own file; what its checkpoints or its
masks do differently is a field of `Family`. docs/adding_a_family.md has the recipe.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from farskip.models.hf_layer import HFSubBlocks
from farskip.models.router_rule import RouterRule, silu_gate
from farskip.wiring import Wiring


class WiringKeys(Protocol):
    """How the config.json of a family that is born rewired says its wiring, in keys of its own.

    Attributes:
        names: the keys.
    """

    names: tuple[str, ...]

    def read(self, config: dict[str, Any]) -> Wiring:
        """The wiring that a checkpoint's config asks for.

        Raises:
            ValueError: the keys contradict each other.
        """
        ...

    def write(self, wiring: Wiring) -> dict[str, Any] | None:
        """The keys that say this wiring; None if they cannot say it."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One transformers model family.

    Attributes:
        model_type: what its config calls itself. Several families can share one: `name` tells them apart.
        architecture: class name of its causal language model, the key that selects it.
        score: the router's score function, ``softmax`` or ``sigmoid``.
        sub_blocks: takes one decoder layer apart.
        other_model_types: further names that configs of its checkpoints call themselves, of models that are no other
            family; they become `model_type` where a config is read.
        undeclared_config_keys: settings that its modelling code reads though its config class does not declare them.
        own_name: what the family is called where `model_type` is already another family's.
        own_class: makes the class `architecture`, where transformers has none.
        wiring_keys: the keys by which its own checkpoints say their wiring; None: they are ordinary.
        router: what its router computes, from the router's module; None: the fused kernel cannot say it.
        swiglu: what `farskip.triton_kernels.swiglu.swiglu` has to be given besides the rows to compute the gate of its
            experts, from the experts' module; None, or returning None: it is another gate.
        packed_masks: makes the attention masks of a packed batch from (config, embeddings [B, S, D], position ids
            [B, S]), where the family's own forward does not cut attention at the documents' ends; None: it does.
        tensor_plan: what the config's tensor-parallel plan leaves out or does otherwise
            (`farskip.models.tensor_parallel`).
    """

    model_type: str
    architecture: str
    score: str
    sub_blocks: Callable[[nn.Module], HFSubBlocks]
    other_model_types: tuple[str, ...] = ()
    undeclared_config_keys: tuple[str, ...] = ()
    own_name: str | None = None
    own_class: Callable[[], Any] | None = None
    wiring_keys: WiringKeys | None = None
    router: Callable[[Any], RouterRule] | None = None
    swiglu: Callable[[Any], Mapping[str, Any] | None] | None = silu_gate
    packed_masks: Callable[[Any, torch.Tensor, torch.Tensor], Any] | None = None
    tensor_plan: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What users call the family."""
        return self.own_name or self.model_type

    def model_class(self) -> Any:
        """The class of its causal language model."""
        if self.own_class is not None:
            return self.own_class()
        import transformers

        return getattr(transformers, self.architecture)


def families() -> tuple[Family, ...]:
    """All families, in alphabetical order."""
    from farskip.models import (
        hf_deepseek_v2,
        hf_deepseek_v3,
        hf_ernie4_5_moe,
        hf_glm4_moe,
        hf_gpt_oss,
        hf_instella_moe,
        hf_llama,
        hf_llama4,
        hf_mixtral,
        hf_olmoe,
        hf_qwen2_moe,
        hf_qwen3,
        hf_qwen3_moe,
    )

    return (
        hf_deepseek_v2.FAMILY,
        hf_deepseek_v3.FAMILY,
        hf_ernie4_5_moe.FAMILY,
        hf_glm4_moe.FAMILY,
        hf_gpt_oss.FAMILY,
        hf_instella_moe.FAMILY,
        hf_llama.FAMILY,
        hf_llama4.FAMILY,
        hf_mixtral.FAMILY,
        hf_olmoe.FAMILY,
        hf_qwen2_moe.FAMILY,
        hf_qwen3.FAMILY,
        hf_qwen3_moe.FAMILY,
    )


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
    if type(model).__name__ == "FarSkipForCausalLM":
        raise ValueError(
            "the model was loaded by transformers from a rewired checkpoint, with the code that stands beside it; load "
            "the folder with farskip.load to rewire or parallelize it"
        )
    return family_of_architecture(type(model).__name__)


def backbone_of(model: Any) -> nn.Module:
    """The part of a causal language model in front of its head. (`base_model` is the model itself for Llama-4.)"""
    return model.model
