"""The order of batches: the same for any number of ranks, disjoint, reshuffled, and exact after a resume."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from farskip.batch import Batch
from farskip.data_loader import PackedSequences, ShuffledBatches, TrainBatches, heldout_rows
from farskip.data_packing import _Writer

LENGTH = 4
NUM_SEQUENCES = 22


@pytest.fixture
def sequences(tmp_path: Path) -> PackedSequences:
    """Sequence n consists of the tokens n, so that a batch says which sequences it holds."""
    with _Writer(tmp_path, "train", LENGTH) as writer:
        for n in range(NUM_SEQUENCES):
            writer.add([n] * LENGTH, None)
        split = writer.close(0)
    return PackedSequences(tmp_path, "train", split.num_sequences, LENGTH)


def loader_for(
    sequences: PackedSequences, batch_size: int = 2, seed: int = 3, rank: int = 0, world_size: int = 1
) -> TrainBatches:
    sampler = ShuffledBatches(len(sequences), batch_size, seed, rank, world_size)
    return TrainBatches(sequences, sampler, {"data.seed": seed, "data.batch_size * ranks": batch_size * world_size})


def take(loader: TrainBatches, num_batches: int) -> list[list[int]]:
    return [batch.input_ids_BS[:, 0].tolist() for batch in itertools.islice(loader, num_batches)]


@pytest.mark.parametrize(("num_ranks", "batch_size"), [(2, 2), (4, 1)])
def test_k_ranks_see_the_rows_of_one_rank(sequences: PackedSequences, num_ranks: int, batch_size: int) -> None:
    num_batches = 12  # more than two epochs of five global batches
    whole = take(loader_for(sequences, batch_size=4), num_batches)
    parts = [
        take(loader_for(sequences, batch_size=batch_size, rank=rank, world_size=num_ranks), num_batches)
        for rank in range(num_ranks)
    ]
    assert [list(itertools.chain.from_iterable(rows)) for rows in zip(*parts, strict=True)] == whole


def test_an_epoch_visits_each_sequence_once_and_epochs_differ(sequences: PackedSequences) -> None:
    loader = loader_for(sequences, batch_size=4)
    per_epoch = NUM_SEQUENCES // 4
    epochs = []
    for epoch in range(3):
        epochs.append(list(itertools.chain.from_iterable(take(loader, per_epoch))))
        assert loader.epoch == epoch
        assert len(set(epochs[-1])) == len(epochs[-1]) == per_epoch * 4
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert len({frozenset(epoch) for epoch in epochs}) > 1  # the dropped tail is another one
    assert take(loader_for(sequences, batch_size=4), per_epoch) == take(loader_for(sequences, batch_size=4), per_epoch)
    assert take(loader_for(sequences, seed=4), 3) != take(loader_for(sequences, seed=3), 3)


@pytest.mark.parametrize("position", [0, 1, 4, 5, 6, 10, 11], ids=lambda k: f"after {k}")
def test_resume_is_exact(sequences: PackedSequences, position: int) -> None:
    for rank in range(2):
        straight = loader_for(sequences, rank=rank, world_size=2)
        expected = list(itertools.islice(straight, 14))
        first = loader_for(sequences, rank=rank, world_size=2)
        seen = list(itertools.islice(first, position))
        state = json.loads(json.dumps(first.state_dict()))  # plain data: any checkpoint format can hold it
        second = loader_for(sequences, rank=rank, world_size=2)
        take(second, 3)  # a loader that has already moved goes to the position all the same
        second.load_state_dict(state)
        assert second.epoch == first.epoch
        seen += list(itertools.islice(second, 14 - position))
        assert second.epoch == straight.epoch
        for batch, reference in zip(seen, expected, strict=True):
            assert_equal(batch, reference)


def assert_equal(batch: Batch, reference: Batch) -> None:
    for name in ("input_ids_BS", "labels_BS", "position_ids_BS"):
        assert torch.equal(getattr(batch, name), getattr(reference, name))


def test_saving_does_not_move_the_loader(sequences: PackedSequences) -> None:
    expected = take(loader_for(sequences), 6)
    loader = loader_for(sequences)
    found = []
    for _ in range(6):
        loader.state_dict()
        found += take(loader, 1)
    assert found == expected


def test_resume_on_other_ranks_with_the_same_global_batch(sequences: PackedSequences) -> None:
    whole = loader_for(sequences, batch_size=4)
    take(whole, 3)
    state = whole.state_dict()
    parts = []
    for rank in range(2):
        part = loader_for(sequences, batch_size=2, rank=rank, world_size=2)
        part.load_state_dict(state)
        parts.append(take(part, 5))
    assert [a + b for a, b in zip(*parts, strict=True)] == take(whole, 5)


@pytest.mark.parametrize(("change", "key"), [({"seed": 9}, "data.seed=3"), ({"batch_size": 3}, "ranks=2")])
def test_a_position_of_another_order_is_refused(sequences: PackedSequences, change: dict[str, Any], key: str) -> None:
    state = loader_for(sequences).state_dict()
    with pytest.raises(ValueError, match=f"saved position in the data is for .*{key}.*start without resuming"):
        loader_for(sequences, **change).load_state_dict(state)


def test_loading_leaves_the_models_random_numbers_alone(sequences: PackedSequences) -> None:
    before = torch.get_rng_state()
    loader = loader_for(sequences)
    take(loader, 30)
    loader.load_state_dict(loader.state_dict())
    take(loader, 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_can_be_written_to_without_touching_the_cache(sequences: PackedSequences) -> None:
    sequences[0].input_ids_BS.fill_(-1)
    assert sequences[0].input_ids_BS.tolist() == [[0] * LENGTH]


@pytest.mark.parametrize(("num_sequences", "num_batches", "expected"), [(100, 3, 3), (13, 9, 3), (4, 1, 1)])
def test_heldout_rows_are_spread_in_order_and_shared_out(num_sequences: int, num_batches: int, expected: int) -> None:
    whole = heldout_rows(num_sequences, num_batches, 4, 0, 1)
    flat = list(itertools.chain.from_iterable(whole))
    assert len(whole) == expected and len(flat) == 4 * expected
    assert flat == sorted(set(flat)) and max(flat) < num_sequences
    # Evenly: no gap is wider than the split divided by the rows, rounded up.
    edges = [*flat, num_sequences]
    assert edges[0] == 0 and max(b - a for a, b in itertools.pairwise(edges)) <= -(-num_sequences // len(flat))
    parts = [heldout_rows(num_sequences, num_batches, 2, rank, 2) for rank in range(2)]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole
