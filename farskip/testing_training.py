"""A language model, data and ranks small enough to test a training loop with.

Decides: a model with an embedding, one mixing layer over earlier positions of the same document, a norm and a head;
data that is random but fixed, and knows its position; a communicator that adds over the default process group. Nothing
here is meant to be fast.

Legend: B sequences, S positions, D hidden size, V vocabulary, T positions.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from farskip.batch import IGNORED_LABEL, Batch
from farskip.metrics import METRICS_FILE
from farskip.objectives import DistillationObjective, PretrainObjective
from farskip.pending import Pending
from farskip.trainer import TrainResult, train
from farskip.training_config import CheckpointConfig, HeldoutConfig, OptimizerConfig, TrainingConfig
from farskip.training_protocols import Communicator, Objective, SingleProcess

CHUNK_TOKENS = 5
"""Fewer than a tiny batch has, and no divisor of it."""

MAX_GRAD_NORM = 0.25
"""Low enough that every step of a tiny run is clipped."""


class TinyModule(torch.nn.Module):
    """Parameters of the tiny model, and a buffer that a checkpoint must carry.

    Args:
        vocab_size: V.
        width: D.
        tied: the head is the embedding.
        dropout: probability of dropping a hidden value.
        seed: of the initial weights.
    """

    def __init__(
        self, vocab_size: int = 17, width: int = 8, *, tied: bool = False, dropout: float = 0.0, seed: int = 0
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = torch.nn.Embedding(vocab_size, width)
            self.mix = torch.nn.Linear(2 * width, width)
            self.norm = torch.nn.LayerNorm(width)
            self.head = torch.nn.Linear(width, vocab_size, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.dropout = torch.nn.Dropout(dropout)
        self.register_buffer("bias", torch.zeros(3))


class TinyLanguageModel:
    """The model as training sees it: hidden states and head of a ``TinyModule``.

    Args:
        module: the parameters; a fresh module if not given.
    """

    def __init__(self, module: TinyModule | None = None) -> None:
        self.tiny = TinyModule() if module is None else module
        self.module: torch.nn.Module = self.tiny

    def hidden(self, batch: Batch) -> Tensor:
        """[B, S, D] after the norm; a position sees the position before it, unless its document starts there."""
        x_BSD = self.tiny.embedding(batch.input_ids_BS)
        before_BSD = torch.nn.functional.pad(x_BSD[:, :-1], (0, 0, 1, 0))
        before_BSD = before_BSD * (batch.position_ids_BS > 0)[..., None]
        mixed_BSD = torch.tanh(self.tiny.mix(torch.cat([x_BSD, before_BSD], dim=-1)))
        hidden_BSD: Tensor = self.tiny.norm(x_BSD + self.tiny.dropout(mixed_BSD))
        return hidden_BSD

    def head(self, hidden_TD: Tensor) -> Tensor:
        """[T, V]."""
        logits_TV: Tensor = self.tiny.head(hidden_TD)
        return logits_TV


def tiny_batch(seed: int, *, num_sequences: int = 2, length: int = 6, vocab_size: int = 17) -> Batch:
    """A batch of random tokens with two documents in each row.

    Row b's second document starts at position 2 + b. The last token of the first has no label, nor have the last ``seed
    % 3`` positions of row 0, so that batches differ in their number of labels.
    """
    generator = torch.Generator().manual_seed(seed)
    ids_BS = torch.randint(vocab_size, (num_sequences, length + 1), generator=generator)
    labels_BS = ids_BS[:, 1:].clone()
    positions_BS = torch.arange(length).repeat(num_sequences, 1)
    for row in range(num_sequences):
        second = 2 + row % (length - 2)
        positions_BS[row, second:] -= second
        labels_BS[row, second - 1] = IGNORED_LABEL
    labels_BS[0, length - seed % 3 :] = IGNORED_LABEL
    return Batch(input_ids_BS=ids_BS[:, :-1].clone(), labels_BS=labels_BS, position_ids_BS=positions_BS)


class TinyBatches:
    """An iterator over ``tiny_batch``es that can be put back to any position.

    Args:
        seeds: of the batches, in order.
        world_size: number of ranks, each of which has other batches.
    """

    def __init__(self, seeds: list[int], world_size: int = 1) -> None:
        self._seeds = seeds
        self._world_size = world_size
        self._next = 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._next == len(self._seeds):
            raise StopIteration
        self._next += 1
        return tiny_batch(self._seeds[self._next - 1])

    def state_dict(self) -> dict[str, Any]:
        """The number of batches handed out to all ranks."""
        return {"next": self._next * self._world_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after that many."""
        if state["next"] % self._world_size:
            raise ValueError(f"{state['next']} batches were used, which {self._world_size} ranks cannot have done")
        self._next = state["next"] // self._world_size


class TinyData:
    """One rank's share: batch i of rank r has the seed ``i * world_size + r``, so that k ranks see what one rank sees.

    Args:
        rank: this rank.
        world_size: number of ranks.
        num_batches: training batches of this rank.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, num_batches: int = 1000) -> None:
        self._rank = rank
        self._world_size = world_size
        self._num_batches = num_batches

    def train_batches(self) -> TinyBatches:
        """From the first one."""
        seeds = [i * self._world_size + self._rank for i in range(self._num_batches)]
        return TinyBatches(seeds, self._world_size)

    def heldout_batches(self, num_batches: int) -> Iterator[Batch]:
        """The same at every call."""
        return (tiny_batch(100_000 + i * self._world_size + self._rank) for i in range(num_batches))


class ReplicatedRanks:
    """A communicator over the default process group in which every parameter is replicated.

    Args:
        module: the trained module.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self.rank = self.data_rank = dist.get_rank()
        self.world_size = self.data_size = dist.get_world_size()
        self.shares = None

    def expect_last_backward(self) -> None:
        """Nothing is sent early."""

    def reduce_gradients(self) -> None:
        """Every gradient summed over ranks."""
        for parameter in self._module.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)

    def clip_gradients(self, max_norm: float | None) -> Tensor:
        """The same on every rank, since the gradients are."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._module.parameters() if p.grad is not None])
        if max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._module.parameters(), max_norm, norm)
        return norm

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """In place."""
        dist.all_reduce(tensor)
        return tensor

    def sum_over_processes(self, tensor: Tensor) -> Tensor:
        """In place."""
        dist.all_reduce(tensor)
        return tensor

    def launch_sum_over_processes(self, tensor: Tensor) -> Pending:
        """In place."""
        return Pending(tensor, dist.all_reduce(tensor, async_op=True))

    def any(self, flag: bool) -> bool:
        """True if any rank says True."""
        return bool(self.all_reduce_sum(torch.tensor(float(flag))) > 0)

    def barrier(self) -> None:
        """All ranks have arrived."""
        dist.barrier()

    def wrap_for_checkpoint(self, name: str, tensor: Tensor) -> Tensor:
        """Nothing is sharded."""
        return tensor

    def exposed_communication_s(self) -> float:
        """Not measured."""
        return 0.0


def tiny_config(num_steps: int, **changes: Any) -> TrainingConfig:
    """Logs every step, clips, and neither evaluates nor saves before the end, but for ``changes``."""
    defaults: dict[str, Any] = {
        "log_every": 1,
        "loss_chunk_tokens": CHUNK_TOKENS,
        "tensorboard": False,
        "optimizer": OptimizerConfig(learning_rate=1e-2, warmup_steps=min(2, num_steps), max_grad_norm=MAX_GRAD_NORM),
        "heldout": HeldoutConfig(every_steps=0),
        "checkpoint": CheckpointConfig(every_steps=0),
    }
    return TrainingConfig(num_steps=num_steps, **(defaults | changes))


def tiny_objective(kind: str = "pretrain", *, dropout: float = 0.0, tied: bool = False) -> Objective:
    """Pretraining of the tiny model, or its distillation ("distill") from one with other weights."""
    model = TinyLanguageModel(TinyModule(dropout=dropout, tied=tied))
    if kind == "pretrain":
        return PretrainObjective(model, chunk_tokens=CHUNK_TOKENS)
    teacher = TinyLanguageModel(TinyModule(seed=1))
    teacher.module.requires_grad_(False)
    return DistillationObjective(model, teacher, chunk_tokens=CHUNK_TOKENS)


def communicator_of(module: torch.nn.Module) -> Communicator:
    """The default process group where there is one, else one process."""
    return ReplicatedRanks(module) if dist.is_initialized() else SingleProcess(module)


def train_tiny(
    objective: Objective, folder: Path, config: TrainingConfig, *, data: TinyData | None = None, **more: Any
) -> TrainResult:
    """``train`` on tiny data; ``more`` goes to it."""
    ranks = communicator_of(objective.model.module)
    return train(objective, data or TinyData(ranks.rank, ranks.world_size), ranks, config, folder, **more)


def tensors_of(module: torch.nn.Module) -> dict[str, Tensor]:
    """Copies of a module's parameters and buffers."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics."""
    return [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
