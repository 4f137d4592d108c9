"""What the training loop asks of the rest of the house: a model, the ranks, the data, a balancer, an objective.

Decides: the seams. The core never imports a model, a mesh or a data loader; they are passed in as objects of these
shapes. ``SingleProcess`` is the communicator of one rank.

Legend: B sequences, S positions, D hidden size, T positions, V vocabulary.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from farskip.batch import Batch
from farskip.pending import Pending


class LanguageModel(Protocol):
    """A student or a teacher: a module and the two halves of its forward."""

    module: torch.nn.Module

    def hidden(self, batch: Batch) -> Tensor:
        """Hidden states [B, S, D] after the final norm."""
        ...

    def head(self, hidden_TD: Tensor, /) -> Tensor:
        """Logits [T, V]. Called once per chunk of positions; must build its graph inside the call."""
        ...


class UpdateShares(Protocol):
    """An optimizer's work divided over the ranks that hold the same parameters."""

    def of(self, name: str) -> torch.nn.Parameter:
        """What this rank's optimizer updates of a parameter: a share of it, or all if it cannot be divided. The same
        object at every call."""
        ...

    def is_divided(self, name: str) -> bool:
        """Whether ``of`` has given a share of it."""
        ...

    def begin(self) -> None:
        """In front of the update, when gradients are final: shares get theirs."""
        ...

    def finish(self) -> None:
        """After the update: every parameter gets the shares that other ranks updated. A collective."""
        ...

    def wrap_for_checkpoint(self, name: str, tensor: Tensor) -> Tensor:
        """As `Communicator.wrap_for_checkpoint`, for optimizer state of a share's shape."""
        ...


class Communicator(Protocol):
    """The ranks of a job. All but ``wrap_for_checkpoint`` and ``exposed_communication_s`` are collectives.

    Attributes:
        rank: this process, 0 .. world_size-1.
        world_size: number of processes.
        data_rank: which share of the data it sees; processes that share tensors see the same.
        data_size: number of shares.
        shares: who updates what of the parameters; None: every rank all of its own.
    """

    rank: int
    world_size: int
    data_rank: int
    data_size: int

    @property
    def shares(self) -> UpdateShares | None: ...

    def expect_last_backward(self) -> None:
        """In front of a step's last backward: from here on, gradients that are there may be on their way."""
        ...

    def reduce_gradients(self) -> None:
        """After a step's last backward: replicated gradients summed over all ranks, expert gradients over replicas."""
        ...

    def clip_gradients(self, max_norm: float | None) -> Tensor:
        """The global gradient norm (each expert once, equal on all ranks); scales gradients above ``max_norm`` down."""
        ...

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum over the shares of the data, equal on all ranks. The argument may be overwritten."""
        ...

    def sum_over_processes(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, equal on all of them. The argument may be overwritten."""
        ...

    def launch_sum_over_processes(self, tensor: Tensor) -> Pending:
        """Start the sum over all processes, in place; what waiting for it takes is counted as exposed."""
        ...

    def any(self, flag: bool) -> bool:
        """True if any rank says True."""
        ...

    def barrier(self) -> None:
        """Returns when every rank has arrived."""
        ...

    def wrap_for_checkpoint(self, name: str, tensor: Tensor) -> Tensor:
        """How a tensor goes into a checkpoint; reading fills the returned tensor in place.

        Args:
            name: the parameter's name in ``module.state_dict()``, also for optimizer state of its shape.
            tensor: this rank's.

        Returns:
            A DTensor over the same storage for a sharded parameter, the tensor itself for a replicated one.
        """
        ...

    def exposed_communication_s(self) -> float:
        """Seconds this rank stood waiting in collectives since the last call."""
        ...


class Balancer(Protocol):
    """Load balancing of routers."""

    def set_scale(self, scale: float) -> None:
        """The weight of the coming micro-batch's auxiliary loss: its share, over all ranks, of the step's tokens."""
        ...

    def update(self) -> Mapping[str, float]:
        """After each optimizer step: moves routers' biases. Returns what is to be logged, equal names on all ranks."""
        ...


class TrainBatches(Protocol):
    """An iterator over micro-batches that knows where it stands."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch: ...

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch handed out: plain values and tensors only, since it is read back safely."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. On another number of ranks every rank is given what rank 0 saved.

        Raises:
            ValueError: that position means nothing here.
        """
        ...


class TrainingData(Protocol):
    """This rank's share of a data set."""

    def train_batches(self) -> TrainBatches: ...

    def heldout_batches(self, num_batches: int) -> Iterable[Batch]:
        """The same batches at every call; equally many on every rank, at most the given number."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class LossSums:
    """One micro-batch's loss, as sums.

    Attributes:
        loss: 0-d, differentiable: the sum over the counted positions.
        sums: name to (sum, number of positions), detached; the names are the same on every rank.
    """

    loss: Tensor
    sums: Mapping[str, tuple[Tensor, int]]


class Objective(Protocol):
    """What is minimized."""

    model: LanguageModel
    teacher: LanguageModel | None

    def num_tokens(self, batch: Batch) -> int:
        """How many positions of the batch count in the loss."""
        ...

    def loss(self, batch: Batch) -> LossSums: ...


class SingleProcess:
    """The communicator of a world of one rank.

    Args:
        module: the trained module.
    """

    rank = data_rank = 0
    world_size = data_size = 1
    shares = None

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module

    def expect_last_backward(self) -> None:
        """Nobody to send to."""

    def reduce_gradients(self) -> None:
        """Nothing to add."""

    def clip_gradients(self, max_norm: float | None) -> Tensor:
        """The gradient norm in fp32 (or higher); gradients scaled in place when it is above ``max_norm``."""
        gradients = [parameter.grad for parameter in self._module.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._module.parameters(), max_norm, norm)
        return norm

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def sum_over_processes(self, tensor: Tensor) -> Tensor:
        return tensor

    def launch_sum_over_processes(self, tensor: Tensor) -> Pending:
        """The tensor: nothing to add."""
        return Pending(tensor, None)

    def any(self, flag: bool) -> bool:
        return flag

    def barrier(self) -> None:
        """Nobody to wait for."""

    def wrap_for_checkpoint(self, name: str, tensor: Tensor) -> Tensor:
        return tensor

    def exposed_communication_s(self) -> float:
        return 0.0
