"""From packed sequences on disk to batches: which rank sees which sequences in which order, and where to go on.

An epoch visits the packed sequences in an order that only depends on the seed and the number of the epoch. Global batch
``g`` is the ``g``-th stretch of ``world_size * batch_size`` sequences of that order, and a rank takes its own rows
of it; k ranks with batches of b therefore see together exactly what one rank with batches of k * b sees. What is left
at the end of an epoch and does not fill a global batch is dropped; the next epoch's order drops other sequences.

Legend: N packed sequences, S positions per sequence, B sequences per batch.
"""

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from farskip.batch import IGNORED_LABEL, Batch
from farskip.data_packing import START, TRAINED


class PackedSequences(torch.utils.data.Dataset[Batch]):
    """The packed sequences of one split, mapped into memory, not read into it."""

    def __init__(self, folder: Path, split: str, num_sequences: int, sequence_length: int) -> None:
        """Map the two files of a split.

        Args:
            folder: what pack_text made.
            split: train or heldout.
            num_sequences: N, at least 1.
            sequence_length: S.
        """
        size = num_sequences * sequence_length
        shape = (num_sequences, sequence_length)
        tokens = torch.from_file(str(folder / f"{split}.tokens"), shared=False, size=size, dtype=torch.int32)
        flags = torch.from_file(str(folder / f"{split}.flags"), shared=False, size=size, dtype=torch.uint8)
        self._tokens_NS = tokens.view(shape)
        self._flags_NS = flags.view(shape)

    def __len__(self) -> int:
        return self._tokens_NS.shape[0]

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> Batch:
        """The sequences with these indices as one batch."""
        rows_B = torch.tensor(indices, dtype=torch.int64)
        tokens_BS = self._tokens_NS[rows_B].to(torch.int64)
        flags_BS = self._flags_NS[rows_B]
        starts_BS = (flags_BS & START).bool()
        # A token is the label of the position before it, unless that position belongs to another piece.
        is_label_BS = (flags_BS & TRAINED).bool() & ~starts_BS
        labels_BS = torch.full_like(tokens_BS, IGNORED_LABEL)
        labels_BS[:, :-1] = torch.where(is_label_BS[:, 1:], tokens_BS[:, 1:], IGNORED_LABEL)
        index_S = torch.arange(tokens_BS.shape[1])
        last_start_BS = torch.where(starts_BS, index_S, 0).cummax(dim=1).values
        return Batch(input_ids_BS=tokens_BS, labels_BS=labels_BS, position_ids_BS=index_S - last_start_BS)


class ShuffledBatches:
    """Endless row numbers of one rank, epoch after epoch; its position is two integers."""

    def __init__(self, num_sequences: int, batch_size: int, seed: int, rank: int, world_size: int) -> None:
        self.epoch = 0
        self._next_batch = 0
        self._num_sequences = num_sequences
        self._batch_size = batch_size
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._order: tuple[int, torch.Tensor] | None = None

    def __iter__(self) -> "ShuffledBatches":
        return self

    def __next__(self) -> list[int]:
        global_batch = self._batch_size * self._world_size
        if self._next_batch >= self._num_sequences // global_batch:
            self.epoch, self._next_batch = self.epoch + 1, 0
        if self._order is None or self._order[0] != self.epoch:
            self._order = (self.epoch, epoch_order(self._num_sequences, self._seed, self.epoch))
        first = self._next_batch * global_batch + self._rank * self._batch_size
        self._next_batch += 1
        rows: list[int] = self._order[1][first : first + self._batch_size].tolist()
        return rows

    def state_dict(self) -> dict[str, int]:
        """Where the next batch comes from, counted in global batches and so the same on every rank."""
        return {"epoch": self.epoch, "next_batch": self._next_batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a position that state_dict returned."""
        self.epoch, self._next_batch = int(state["epoch"]), int(state["next_batch"])


def epoch_order(num_sequences: int, seed: int, epoch: int) -> torch.Tensor:
    """Order in which an epoch visits the sequences: a permutation, int64, shape (N,)."""
    digest = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    return torch.randperm(num_sequences, generator=generator)


def heldout_rows(num_sequences: int, num_batches: int, batch_size: int, rank: int, world_size: int) -> list[list[int]]:
    """Row numbers of one rank's held-out batches: in order, evenly spread over the split.

    Returns:
        At most num_batches lists of batch_size rows, equally many on every rank; fewer where the split is too small.
    """
    global_batch = batch_size * world_size
    num_batches = min(num_batches, num_sequences // global_batch)
    num_rows = num_batches * global_batch
    rows = [index * num_sequences // num_rows for index in range(num_rows)]
    firsts = range(rank * batch_size, num_rows, global_batch)
    return [rows[first : first + batch_size] for first in firsts]


class TrainBatches:
    """Endless training batches of one rank, with a position that can be saved and restored exactly."""

    def __init__(
        self,
        sequences: PackedSequences,
        sampler: ShuffledBatches,
        identity: dict[str, Any],
        packed_by: Mapping[str, Any] | None = None,
    ) -> None:
        """Set up torchdata's loader over the sequences.

        Args:
            sequences: the training split.
            sampler: chooses this rank's rows.
            identity: what has to be equal for a saved position to mean the same batches: configuration key -> value.
            packed_by: settings that made the text what it is. Not compared, as a text that was moved still is the same;
                the error for another text names those that differ.
        """
        from torchdata.stateful_dataloader import StatefulDataLoader

        self._sampler = sampler
        self._identity = identity
        self._packed_by = dict(packed_by or {})
        with warnings.catch_warnings():
            # torchdata 0.11 calls a function that torch 2.13 declares deprecated.
            warnings.filterwarnings("ignore", message="'set_vital' is deprecated", category=UserWarning)
            self._loader: Any = StatefulDataLoader(
                sequences,
                batch_sampler=sampler,
                collate_fn=_as_it_is,
                num_workers=0,  # a batch is one gather from mapped memory
                generator=torch.Generator(),  # its own: the loader must not draw from the model's random numbers
            )
        self._batches: Iterator[Batch] | None = None

    @property
    def epoch(self) -> int:
        """Number of the epoch that the newest batch came from; the first is 0."""
        return self._sampler.epoch

    def __iter__(self) -> "TrainBatches":
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = iter(self._loader)
        return next(self._batches)

    def state_dict(self) -> dict[str, Any]:
        """The position after the newest batch, in plain integers and strings, and what it is a position in."""
        return {
            "loader": self._loader.state_dict(),
            "identity": dict(self._identity),
            "packed_by": dict(self._packed_by),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batch that was the newest one when the state was taken.

        Raises:
            ValueError: the state belongs to another text, order or global batch.
        """
        for key, here in self._identity.items():
            saved = state["identity"].get(key)
            if saved != here:
                then = state.get("packed_by", {}) if key == "packed text" else {}
                causes = [name for name, now in self._packed_by.items() if name in then and then[name] != now]
                before = ", ".join(f"{name}={then[name]}" for name in causes) or f"{key}={saved}"
                now = ", ".join(f"{name}={self._packed_by[name]}" for name in causes) or f"{key}={here}"
                raise ValueError(
                    f"the saved position in the data is for {before}, but this run has {now}; "
                    "restore the old value or start without resuming"
                )
        self._loader.load_state_dict(state["loader"])
        self._batches = iter(self._loader)


def _as_it_is(batch: Batch) -> Batch:
    return batch
