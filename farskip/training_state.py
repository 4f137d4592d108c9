"""What a training run consists of, as the names and tensors that a checkpoint holds.

Decides: names (``model.<name>``, ``optimizer.<slot>.<name>``), which of them go through the communicator as sharded
tensors, and what belongs to a rank alone: random number generators and the position in the data.
Refuses: to write or read files.
"""

import random
from typing import Any

import torch

from farskip.training_protocols import Communicator, TrainBatches


def tensors_to_save(
    module: torch.nn.Module, optimizer: torch.optim.Optimizer, communicator: Communicator
) -> dict[str, torch.Tensor]:
    """All tensors of a run by name; the tensors are the run's own, not copies."""
    tensors = _model_tensors(module, communicator)
    for name, parameter in module.named_parameters():
        for slot, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{slot}.{name}"] = _wrap(communicator, name, value, parameter)
    return tensors


def tensors_to_fill(
    stored_names: set[str], module: torch.nn.Module, optimizer: torch.optim.Optimizer, communicator: Communicator
) -> dict[str, torch.Tensor]:
    """The tensors a checkpoint is read into; a fresh optimizer gets the state that the checkpoint has."""
    tensors = _model_tensors(module, communicator)
    parameters = dict(module.named_parameters())
    trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    on_device = any(optimizer.defaults.get(flag) for flag in ("fused", "capturable"))
    for stored in sorted(name for name in stored_names if name.startswith("optimizer.")):
        _, slot, name = stored.split(".", 2)
        parameter = parameters.get(name)
        if parameter is None or parameter not in trained:
            continue
        if slot == "step":
            value = torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else "cpu")
        else:
            value = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        optimizer.state[parameter][slot] = value
        tensors[stored] = _wrap(communicator, name, value, parameter)
    return tensors


def rank_state_to_save(batches: TrainBatches, device: torch.device) -> dict[str, Any]:
    """What belongs to this rank alone: plain values and tensors."""
    state: dict[str, Any] = {
        "data": batches.state_dict(),
        "rng_python": random.getstate(),
        "rng_torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["rng_cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_rank_state(state: dict[str, Any], batches: TrainBatches, device: torch.device) -> None:
    """Put the data and the random number generators where ``rank_state_to_save`` saw them."""
    batches.load_state_dict(state["data"])
    random.setstate(state["rng_python"])
    torch.set_rng_state(state["rng_torch"])
    if device.type == "cuda" and "rng_cuda" in state:
        torch.cuda.set_rng_state(state["rng_cuda"], device)


def _model_tensors(module: torch.nn.Module, communicator: Communicator) -> dict[str, torch.Tensor]:
    return {
        f"model.{name}": communicator.wrap_for_checkpoint(name, value.detach())
        for name, value in module.state_dict().items()
        if isinstance(value, torch.Tensor)
    }


def _wrap(communicator: Communicator, name: str, value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    # A step count is the same on all ranks; only what is shaped like the parameter is sharded like it.
    return communicator.wrap_for_checkpoint(name, value) if value.shape == parameter.shape else value
