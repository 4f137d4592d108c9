"""A divided update has the bits of the undivided one, each rank keeps its share of the state, and a checkpoint of
either is read by any number of ranks.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from farskip.checkpoint import CheckpointStore, Progress
from farskip.optimizer import build_optimizer
from farskip.parallel import optimizer_shares
from farskip.parallel.data_parallel import DataParallel
from farskip.parallel.mesh import EP_AXIS, TP_AXIS, axis_group, axis_size, build_mesh
from farskip.parallel.optimizer_shares import dimension_to_divide
from farskip.parallel.tensor_parallel import TensorLayout
from farskip.parallel.testing_links import LateLink
from farskip.testing import assert_equal_bits
from farskip.testing_training import (
    TinyData,
    tensors_of,
    tiny_config,
    tiny_objective,
)
from farskip.trainer import train
from farskip.training_config import CheckpointConfig, OptimizerConfig, OptimizerImplementation
from farskip.training_state import tensors_to_fill, tensors_to_save

if TYPE_CHECKING:
    from farskip.testing import RankPool

CPU = torch.device("cpu")
EP_AND_TP = [(2, 1, 1), (2, 2, 1), (4, 2, 1), (4, 1, 2), (4, 2, 2), (4, 4, 2)]
"""Ranks, ep, tp: all replicated; experts of one copy; experts of two; tensor slices of two; both; both of one copy."""
WHOLE = {
    "even": (8, 6),
    "vector": (11,),
    "uneven": (7, 5),
    "narrow": (1, 12),
    "short": (1,),
    "number": (),
    "late": (5, 4),
    "expert": (4, 6, 3),
    "expert_bias": (4, 6),
    "columns": (8, 10),
    "columns_bias": (8,),
    "rows": (10, 8),
}
CUT = {"columns": 0, "columns_bias": 0, "rows": 1}


@pytest.mark.parametrize(
    ("shape", "size", "dim"),
    [
        ((8, 3), 2, 0),
        ((3, 8), 2, 1),
        ((3,), 2, 0),
        ((50257, 4096), 8, 0),
        ((1, 6, 4), 2, 1),
        ((2, 6, 4), 4, 2),
        ((5, 7), 4, 1),
        ((5, 5), 4, None),
        ((1,), 2, None),
        ((0, 2), 2, 1),
        ((), 2, None),
    ],
    ids=str,
)
def test_the_dimension_that_is_divided(shape: tuple[int, ...], size: int, dim: int | None) -> None:
    assert dimension_to_divide(shape, size) == dim
    if dim is not None:
        assert len(torch.empty(shape, device="meta").chunk(size, dim)) == size


def whole_tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in WHOLE.items()}


class Model:
    """Parameters as they lie on this rank, and those who divide their update, or do not."""

    def __init__(self, ep: int, tp: int, *, divided: bool, implementation: str = "auto") -> None:
        self.mesh = build_mesh(ep, tp=tp)
        sharded = ("expert", "expert_bias") if ep > 1 else ()
        layout = TensorLayout(sharded=CUT, partial=frozenset({"late"})) if tp > 1 else None
        self.axes = dict.fromkeys(sharded, (EP_AXIS, 0)) | (
            {name: (TP_AXIS, dim) for name, dim in CUT.items()} if tp > 1 else {}
        )
        self.module = nn.ParameterDict({name: nn.Parameter(t) for name, t in self.here(whole_tensors(0)).items()})
        self.ranks = DataParallel(
            self.mesh, dict(self.module.named_parameters()), sharded=sharded, layout=layout, shard_optimizer=divided
        )
        config = OptimizerConfig(implementation=OptimizerImplementation(implementation))
        self.optimizer = build_optimizer(self.module, config, self.ranks.shares)

    def here(self, whole: dict[str, Tensor]) -> dict[str, Tensor]:
        """This rank's slices."""
        mine = dict(whole)
        for name, (axis, dim) in self.axes.items():
            rank = dist.get_rank(axis_group(self.mesh, axis))
            mine[name] = whole[name].chunk(axis_size(self.mesh, axis), dim)[rank].clone()
        return mine

    def step(self, number: int) -> float:
        """Gradients of this rank's data, summed, clipped, applied. ``late`` has none in the first step."""
        data = self.ranks.data_rank
        gradients = self.here(whole_tensors(100 * number + data))
        for name, parameter in self.module.named_parameters():
            parameter.grad = None if name == "late" and number == 1 else gradients[name]
        self.ranks.reduce_gradients()
        norm = float(self.ranks.clip_gradients(1.0))
        for group in self.optimizer.param_groups:
            group["lr"] = 0.1 / number
        self.optimizer.step()
        self.module.zero_grad(set_to_none=True)
        return norm

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint gets, every tensor whole."""
        tensors = tensors_to_save(self.module, self.optimizer, self.ranks)
        return {name: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for name, t in tensors.items()}


def divided_equals_undivided(ep: int, tp: int, implementation: str = "auto", bucket_bytes: int = 1 << 20) -> None:
    with (
        patch.object(optimizer_shares, "_BUCKET_BYTES", bucket_bytes),
        patch.object(optimizer_shares, "ProcessGroupLink", LateLink),
    ):
        divided, undivided = (
            Model(ep, tp, divided=divided, implementation=implementation) for divided in (True, False)
        )
    before = tensors_of(undivided.module)
    for number in (1, 2, 3):
        assert divided.step(number) == undivided.step(number)
        assert_equal_bits(tensors_of(divided.module), tensors_of(undivided.module))
    after = tensors_of(undivided.module)
    assert all(not torch.equal(after[name], before[name]) for name in before), "a parameter was never updated"
    assert_equal_bits(divided.state(), undivided.state())


@pytest.mark.parametrize(("world", "ep", "tp"), EP_AND_TP)
def test_a_divided_update_has_the_bits_of_the_undivided_one(
    world: int, ep: int, tp: int, rank_pool: "RankPool"
) -> None:
    rank_pool.run(divided_equals_undivided, world, ep, tp)


@pytest.mark.parametrize(("implementation", "bucket_bytes"), [("foreach", 1), ("loop", 300)])
def test_in_any_implementation_and_any_buckets(implementation: str, bucket_bytes: int, rank_pool: "RankPool") -> None:
    rank_pool.run(divided_equals_undivided, 2, 1, 1, implementation, bucket_bytes)


def fused() -> str:
    Model(1, 1, divided=False, implementation="fused").step(1)
    try:
        Model(1, 1, divided=True, implementation="fused")
    except ValueError as error:
        return str(error)
    return ""


def test_fused_updates_on_cpu_are_not_divided(rank_pool: "RankPool") -> None:
    for said in rank_pool.run(fused, 2):
        assert said.startswith("training.optimizer.implementation=fused with parallel.shard_optimizer=true on CPU: ")


def kept(ep: int, tp: int) -> dict[str, int | None]:
    """Elements of each parameter that this rank has optimizer state for; None for one that is not divided."""
    model = Model(ep, tp, divided=True)
    model.step(2)
    shares, found = model.ranks.shares, dict[str, int | None]()
    assert shares is not None
    for name, parameter in model.module.named_parameters():
        held = shares.of(name)
        state = model.optimizer.state[held]
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == held.shape
        assert (held is not parameter) == shares.is_divided(name)
        assert held is parameter or held.grad is None, "it would keep the whole gradient alive"
        assert held.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr(), "a copy stays"
        found[name] = held.numel() if shares.is_divided(name) else None
    return found


@pytest.mark.parametrize(("world", "ep", "tp"), EP_AND_TP)
def test_one_rank_has_the_state_of_an_element_that_several_could_have(
    world: int, ep: int, tp: int, rank_pool: "RankPool"
) -> None:
    found = rank_pool.run(kept, world, ep, tp)
    whole = {"short", "number"} | ({"expert", "expert_bias"} if ep == world else set())
    for name, shape in WHOLE.items():
        numbers = [each[name] for each in found]
        if name in whole:
            assert numbers == [None] * world, name
        else:
            assert sum(numbers) == torch.Size(shape).numel(), name
            assert max(numbers) < 2 * torch.Size(shape).numel() / world, name


def written(folder: str, ep: int, tp: int, divided: bool) -> dict[str, Tensor]:
    """The whole state that a checkpoint got."""
    model = Model(ep, tp, divided=divided)
    for number in (1, 2):
        model.step(number)
    store = CheckpointStore(Path(folder), model.ranks, keep_last=1, device=CPU)
    store.save(tensors_to_save(model.module, model.optimizer, model.ranks), {}, Progress(step=2))
    return model.state()


def read(folder: str, ep: int, tp: int, divided: bool) -> dict[str, Tensor]:
    """The whole state that others made of it."""
    model = Model(ep, tp, divided=divided)
    store = CheckpointStore(Path(folder), model.ranks, keep_last=1, device=CPU)
    path = store.path_of(2)
    store.load(path, lambda names: tensors_to_fill(names, model.module, model.optimizer, model.ranks))
    return model.state()


@pytest.mark.parametrize(
    ("writers", "readers"),
    [
        ((4, 2, 1, True), (2, 2, 1, False)),
        ((4, 2, 2, True), (1, 1, 1, True)),
        ((2, 1, 1, False), (4, 1, 2, True)),
        ((1, 1, 1, True), (4, 2, 1, True)),
        ((2, 2, 1, True), (2, 1, 1, True)),
    ],
    ids=str,
)
def test_a_checkpoint_is_read_by_any_ranks_divided_or_not(
    writers: tuple[Any, ...], readers: tuple[Any, ...], rank_pool: "RankPool", tmp_path: Path
) -> None:
    expected = rank_pool.run(written, writers[0], str(tmp_path), *writers[1:])[0]
    assert any(name.startswith("optimizer.exp_avg_sq.") for name in expected)
    for found in rank_pool.run(read, readers[0], str(tmp_path), *readers[1:]):
        assert_equal_bits(found, expected)


def trained(folder: str, divided: bool, resume: str | None) -> dict[str, Tensor]:
    """Four steps of two batches each, with a checkpoint after the second: weights and whole optimizer state."""
    objective = tiny_objective()
    module = objective.model.module
    ranks = DataParallel(build_mesh(1), dict(module.named_parameters()), shard_optimizer=divided)
    assert (ranks.shares is None) == (not divided or ranks.world_size == 1)
    config = tiny_config(4, accumulation=2 // ranks.world_size, checkpoint=CheckpointConfig(every_steps=2, keep_last=2))
    start = None if resume is None else Path(resume)
    result = train(objective, TinyData(ranks.rank, ranks.world_size), ranks, config, Path(folder), resume=start)
    assert result.last_checkpoint is not None
    optimizer = build_optimizer(module, config.optimizer, ranks.shares)
    CheckpointStore(Path(folder) / "checkpoints", ranks, keep_last=1, device=CPU).load(
        result.last_checkpoint, lambda names: tensors_to_fill(names, module, optimizer, ranks)
    )
    state = tensors_to_save(module, optimizer, ranks)
    assert any(isinstance(tensor, DTensor) for tensor in state.values()) == (ranks.shares is not None)
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for name, t in state.items()}


def test_a_run_goes_on_to_the_bit_on_another_number_of_ranks(rank_pool: "RankPool", tmp_path: Path) -> None:
    """Of two terms, as those of two micro-batches or of two ranks, there is one sum only."""
    one, two = tmp_path / "one", tmp_path / "two"
    whole = rank_pool.run(trained, 1, str(one), True, None)[0]
    divided = rank_pool.run(trained, 2, str(two), True, None)
    assert_equal_bits(divided[0], whole)
    half = "checkpoints/step_00000002"
    assert_equal_bits(rank_pool.run(trained, 1, str(tmp_path / "to_one"), False, str(two / half))[0], whole)
    for found in rank_pool.run(trained, 2, str(tmp_path / "to_two"), True, str(one / half)):
        assert_equal_bits(found, whole)
