"""AdamW for a training run: which parameters decay, and which implementation runs.

Decides: weight decay goes to matrices (two or more dimensions: projections, routers, stacked experts, an untied head).
Norm weights, biases and every other vector, and the weights of ``torch.nn.Embedding`` (and with them a head tied to
one), get none.
Refuses: parameters below fp32, in which small updates are lost.
"""

from typing import Any

import torch

from farskip.training_config import OptimizerConfig, OptimizerImplementation

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


def build_optimizer(module: torch.nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the module's trainable parameters.

    Raises:
        ValueError: when nothing is trainable, or a trainable parameter is below fp32.
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
    groups = [
        {"params": list(decayed.values()), "weight_decay": config.weight_decay},
        {"params": list(spared.values()), "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        **_flags(config.implementation, {parameter.device.type for parameter in parameters.values()}),
    )


def _flags(implementation: OptimizerImplementation, device_types: set[str]) -> dict[str, Any]:
    if implementation is OptimizerImplementation.auto:
        has_fused = device_types <= {"cpu", "cuda"}
        implementation = OptimizerImplementation.fused if has_fused else OptimizerImplementation.foreach
    return {
        "fused": implementation is OptimizerImplementation.fused,
        "foreach": implementation is OptimizerImplementation.foreach,
    }
