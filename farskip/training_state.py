"""What a training run consists of, as the names and tensors that a checkpoint holds.

Decides: names (``model.<name>``, ``optimizer.<slot>.<name>``), which of them go through the communicator as sharded
tensors, and what belongs to a rank alone: random number generators and the position in the data.
Refuses: to write or read files.
"""

import random
from collections.abc import Callable
from typing import Any

import torch

from farskip.training_protocols import Communicator, TrainBatches

Wrap = Callable[[str, torch.Tensor], torch.Tensor]


def tensors_to_save(
    module: torch.nn.Module, optimizer: torch.optim.Optimizer, communicator: Communicator
) -> dict[str, torch.Tensor]:
    """All tensors of a run by name; the tensors are the run's own, not copies."""
    tensors = _model_tensors(module, communicator)
    for name, parameter in module.named_parameters():
        held, wrap = _held(communicator, name, parameter)
        for slot, value in optimizer.state.get(held, {}).items():
            # A step count is the same on all ranks; only what is shaped like what is held is sharded like it.
            tensors[f"optimizer.{slot}.{name}"] = wrap(name, value) if value.shape == held.shape else value
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
        if name not in parameters:
            continue
        held, wrap = _held(communicator, name, parameters[name])
        if held not in trained:
            continue
        if slot == "step":
            value = torch.zeros((), dtype=torch.float32, device=held.device if on_device else "cpu")
        else:
            value = torch.zeros_like(held, memory_format=torch.preserve_format)
        optimizer.state[held][slot] = value
        tensors[stored] = wrap(name, value) if value.shape == held.shape else value
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


def restore_rank_state(
    state: dict[str, Any], batches: TrainBatches, device: torch.device, *, generators: bool = True
) -> None:
    """Put the data and the random number generators where ``rank_state_to_save`` saw them.

    Args:
        state: what it gave.
        batches: of this rank.
        device: of the model.
        generators: the state is this rank's own; else it only says where in the data the ranks were.
    """
    batches.load_state_dict(state["data"])
    if not generators:
        return
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


def _held(communicator: Communicator, name: str, parameter: torch.nn.Parameter) -> tuple[torch.nn.Parameter, Wrap]:
    """What of a parameter the optimizer of this rank holds, and how state of its shape goes into a checkpoint."""
    shares = communicator.shares
    if shares is not None and shares.is_divided(name):
        return shares.of(name), shares.wrap_for_checkpoint
    return parameter, communicator.wrap_for_checkpoint
