"""AdamW for a training run: which parameters decay, and which implementation runs.

Decides: weight decay goes to matrices (two or more dimensions: projections, routers, stacked experts, an untied head).
Norm weights, biases and every other vector, and the weights of ``torch.nn.Embedding`` (and with them a head tied to
one), get none.
Where ranks divide the update among them, AdamW holds this rank's shares, and its step brings those of the others.
Refuses: parameters below fp32, in which small updates are lost; to divide what torch's fused kernel updates on CPU: it
rounds the last elements of a tensor, fewer than a vector register holds, otherwise than the rest.
"""

from typing import Any

import torch

from farskip.training_config import OptimizerConfig, OptimizerImplementation
from farskip.training_protocols import UpdateShares

Named = dict[str, torch.nn.Parameter]


def split_for_weight_decay(module: torch.nn.Module) -> tuple[Named, Named]:
    """The trainable parameters by name: those that decay, and those that do not (vectors and embeddings)."""
    embeddings = {
        id(parameter)
        for child in module.modules()
        if isinstance(child, torch.nn.Embedding)
        for parameter in child.parameters(recurse=False)
    }
    decayed: Named = {}
    spared: Named = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            group = spared if parameter.ndim < 2 or id(parameter) in embeddings else decayed
            group[name] = parameter
    return decayed, spared


def build_optimizer(
    module: torch.nn.Module, config: OptimizerConfig, shares: UpdateShares | None = None
) -> torch.optim.AdamW:
    """AdamW over the module's trainable parameters.

    Args:
        module: whose gradients are final when the optimizer's ``step`` is called.
        config: rates and the like.
        shares: who updates what; None: this rank everything. Else ``step`` is a collective.

    Raises:
        ValueError: when nothing is trainable, a trainable parameter is below fp32, or fused updates on CPU are to be
            divided.
    """
    decayed, spared = split_for_weight_decay(module)
    parameters = decayed | spared
    if not parameters:
        raise ValueError("the model has no trainable parameter: set requires_grad on what is to be trained")
    for name, parameter in parameters.items():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"parameter {name} is {str(parameter.dtype).removeprefix('torch.')}: training keeps parameters in "
                "fp32, load the model with dtype=float32 and set training.precision=bf16 to compute in bf16"
            )
    devices = {parameter.device.type for parameter in parameters.values()}
    if shares is not None and "cpu" in devices and config.implementation is OptimizerImplementation.fused:
        raise ValueError(
            "training.optimizer.implementation=fused with parallel.shard_optimizer=true on CPU: torch's fused kernel "
            "there rounds the last elements of a tensor otherwise than the rest, so bits would depend on who updates "
            "what; use auto, foreach or loop"
        )
    groups = [
        {"params": _held(decayed, shares), "weight_decay": config.weight_decay},
        {"params": _held(spared, shares), "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        **_flags(config.implementation, devices),
    }
    if shares is None:
        return torch.optim.AdamW(groups, **settings)
    optimizer = _AdamWOfShares(groups, **settings)
    optimizer.module = module
    optimizer.register_step_pre_hook(lambda *_: shares.begin())
    optimizer.register_step_post_hook(lambda *_: shares.finish())
    return optimizer


class _AdamWOfShares(torch.optim.AdamW):
    """Updates shares of a module's parameters. Gradients are those of the parameters."""

    module: torch.nn.Module

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the module's; the shares' are gone with each step."""
        self.module.zero_grad(set_to_none)


def _held(parameters: Named, shares: UpdateShares | None) -> list[torch.nn.Parameter]:
    return list(parameters.values()) if shares is None else [shares.of(name) for name in parameters]


def _flags(implementation: OptimizerImplementation, device_types: set[str]) -> dict[str, Any]:
    if implementation is OptimizerImplementation.auto:
        # Not on CPU: bits there would depend on how a parameter is cut.
        is_cuda = device_types == {"cuda"}
        implementation = OptimizerImplementation.fused if is_cuda else OptimizerImplementation.foreach
    return {
        "fused": implementation is OptimizerImplementation.fused,
        "foreach": implementation is OptimizerImplementation.foreach,
    }
