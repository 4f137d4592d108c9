"""Cut the dense sub-blocks of a transformers model to one rank's slice, by the model's own tensor-parallel plan.

The plan is the config's ``base_model_tp_plan``, and what the family adds to it (`Family.tensor_plan`): names of modules
below the backbone with ``*`` for a layer number, and what they are:

    colwise      a linear map of which each rank keeps a slice of the outputs
    rowwise      a linear map of which each rank keeps a slice of the inputs; its output is partial
    heads        a parameter with one entry per attention head
    head_norm    an RMSNorm over all heads together, in front of which each rank has its slice of them
                 (`farskip.models.sliced_norm`)

Everything else of the plan, and all that it does not name, stays whole: routed experts (each rank takes its share of
the tokens instead, see `farskip.executor`), routers, norms, the latent projections of latent attention. Parameters stay
plain tensors in their own modules, under their own names.

Refused: what a slice would compute something else for. Nothing is cut before everything was checked.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from farskip.models.attach import layers_of
from farskip.models.family import Family, backbone_of
from farskip.models.hf_layer import HFSubBlocks
from farskip.parallel.tensor_parallel import TensorLayout, slice_of

_CUT = {"colwise": 0, "rowwise": 1, "heads": 0, "head_norm": 0}
_GATHERS = ("colwise_gather_output", "rowwise_split_input")


class _FirstRankAddsBias(nn.Linear):
    """A row-parallel projection on a rank that leaves the bias to the first one."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        # Times zero, not left out: what needs a gradient has to be the same on all ranks, or their all-reduces differ.
        return nn.functional.linear(input, self.weight, 0.0 * self.bias)


def check_tensor_parallel(model: Any, family: Family, blocks: list[HFSubBlocks], size: int) -> None:
    """Refuse what cannot be cut into `size` slices.

    Raises:
        ValueError: heads or widths that `size` does not divide, random numbers that ranks would draw differently, a
            sub-block without a plan, or one whose projections have to be gathered.
    """
    config = model.config
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if heads is not None and heads % size:
            raise ValueError(f"tensor parallelism of {size} does not divide {name}={heads}: choose a divisor of it")
    for name in ("attention_dropout", "router_jitter_noise"):
        if getattr(config, name, 0.0):
            raise ValueError(
                f"tensor parallelism: {name}={getattr(config, name)} draws other random numbers on every rank; set it "
                "to 0"
            )
    plan = _plan(model, family)
    for name, style in plan.items():
        if style in _GATHERS:
            raise ValueError(
                f"tensor parallelism: {name} of {family.name} is {style}, because a norm reads all heads at once; use "
                "tp=1"
            )
    names = {module: name for name, module in backbone_of(model).named_modules()}
    for layer, block in enumerate(blocks):
        dense: dict[str, nn.Module | None] = {"attention": block.layer.self_attn}
        dense["mlp" if block.experts is None else "shared expert"] = (
            block.mlp_module if block.experts is None else block.shared_expert
        )
        for what, module in dense.items():
            if module is not None and not any(_style(plan, names[part]) == "rowwise" for part in module.modules()):
                raise ValueError(
                    f"tensor parallelism: {family.name} has no plan for the {what} of layer {layer}; use tp=1"
                )
    for name, tensor, dim in _to_cut(model, plan):
        if tensor.shape[dim] % size:
            raise ValueError(
                f"tensor parallelism of {size} does not divide {name} of shape {tuple(tensor.shape)} along dimension "
                f"{dim}: choose a divisor"
            )


def cut_dimensions(model: Any, family: Family) -> dict[str, int]:
    """The dimension along which each parameter of the plan is cut, by name."""
    return {name: dim for name, _, dim in _to_cut(model, _plan(model, family))}


def cut_parameters(model: Any, family: Family, rank: int, size: int) -> dict[str, int]:
    """Cut every parameter of the plan to this rank's slice, in place. `check_tensor_parallel` came before.

    Returns:
        The dimension along which each of them was cut, by name.
    """
    sharded = cut_dimensions(model, family)
    for name, dim in sharded.items():
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        parameter = getattr(module, attribute)
        mine = slice_of(parameter.detach(), dim, rank, size)
        setattr(module, attribute, nn.Parameter(mine, requires_grad=parameter.requires_grad))
    return sharded


def cut_tensors(model: Any, family: Family, rank: int, size: int, *, already_cut: bool = False) -> TensorLayout:
    """Have a model compute this rank's term of every sub-block, with its slices of the parameters.

    Args:
        model: cut in place. `check_tensor_parallel` came before.
        family: of the model.
        rank: which slice.
        size: of how many.
        already_cut: `cut_parameters` came before, too.

    Returns:
        How the parameters lie now.
    """
    sharded = cut_dimensions(model, family) if already_cut else cut_parameters(model, family, rank, size)
    for name, dim in sharded.items():
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, nn.Linear) and attribute == "weight":
            module.out_features, module.in_features = module.weight.shape
            if dim == 1 and module.bias is not None and rank:
                module.__class__ = _FirstRankAddsBias
    for layer in layers_of(model):
        if hasattr(layer.self_attn, "num_heads"):
            layer.self_attn.num_heads //= size
    inside = {id(parameter) for layer in layers_of(model) for parameter in layer.parameters()}
    partial = {name for name, parameter in model.named_parameters() if id(parameter) in inside}
    return TensorLayout(sharded=sharded, partial=frozenset(partial - sharded.keys()))


def head_norms(model: Any, family: Family) -> list[nn.Module]:
    """The norms that read all heads at once. Their weights are cut by `cut_tensors`; their sums are not spread yet."""
    plan = _plan(model, family)
    return [module for name, module in backbone_of(model).named_modules() if _style(plan, name) == "head_norm"]


def _plan(model: Any, family: Family) -> dict[str, str]:
    return {**(getattr(model.config, "base_model_tp_plan", None) or {}), **family.tensor_plan}


def _style(plan: Mapping[str, str], name: str) -> str | None:
    return plan.get(re.sub(r"(?<=\.)\d+(?=\.)", "*", name))


def _to_cut(model: Any, plan: Mapping[str, str]) -> list[tuple[str, torch.Tensor, int]]:
    """Full name, tensor and dimension of every parameter that is cut."""
    backbone = backbone_of(model)
    prefix = next(f"{name}." for name, module in model.named_modules() if module is backbone)
    found: list[tuple[str, torch.Tensor, int]] = []
    for name, parameter in backbone.named_parameters():
        path, _, attribute = name.rpartition(".")
        style = _style(plan, path) or _style(plan, name)
        if style not in _CUT or not (
            isinstance(backbone.get_submodule(path), nn.Linear) or style in ("heads", "head_norm")
        ):
            continue
        if attribute == "bias" and style == "rowwise":
            continue  # added once, by the first rank
        found.append((prefix + name, parameter, _CUT[style]))
    return found
