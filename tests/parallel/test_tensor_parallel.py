"""Meshes with a ``tp`` axis, slices and their gathering, and who is summed over whom."""

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from farskip.executor import Executor
from farskip.models.attach import attach, layers_of
from farskip.models.family import family_of_model
from farskip.models.surgery import rewire, wiring_of
from farskip.models.testing_models import run_backward, tiny_model, token_ids
from farskip.parallel.collectives import ProcessGroupLink
from farskip.parallel.data_parallel import DataParallel
from farskip.parallel.duplex_link import DuplexGlooLink
from farskip.parallel.mesh import DATA_AXIS, EP_AXIS, REPLICA_AXIS, TP_AXIS, axes_of, axis_group, axis_size, build_mesh
from farskip.parallel.paced_copy_link import PacedCopyLink
from farskip.parallel.tensor_parallel import TensorLayout, TensorParallelRanks, gather_slices, slice_of
from farskip.parallel.testing_links import FakeLink, LateLink, at_wait, random_delay
from farskip.testing import assert_equal_bits, poison_empty

if TYPE_CHECKING:
    from farskip.testing import RankPool


def groups(ep: int, tp: int) -> dict[str, list[int]]:
    """The ranks that share each axis with this one."""
    mesh = build_mesh(ep, tp=tp)
    found = {}
    for axis in (TP_AXIS, EP_AXIS, DATA_AXIS, REPLICA_AXIS):
        if axes_of(mesh, axis):
            found[axis] = dist.get_process_group_ranks(axis_group(mesh, axis))
            assert axis_size(mesh, axis) == len(found[axis])
        else:
            assert axis_size(mesh, axis) == 1
    return found


EXPECTED = {
    (1, 2): [
        {"tp": [0, 1], "data": [0, 2], "replica": [0, 2]},
        {"tp": [0, 1], "data": [1, 3], "replica": [1, 3]},
        {"tp": [2, 3], "data": [0, 2], "replica": [0, 2]},
        {"tp": [2, 3], "data": [1, 3], "replica": [1, 3]},
    ],
    (2, 2): [
        {"tp": [0, 1], "ep": [0, 1], "data": [0, 2], "replica": [0, 2]},
        {"tp": [0, 1], "ep": [0, 1], "data": [1, 3], "replica": [1, 3]},
        {"tp": [2, 3], "ep": [2, 3], "data": [0, 2], "replica": [0, 2]},
        {"tp": [2, 3], "ep": [2, 3], "data": [1, 3], "replica": [1, 3]},
    ],
    (4, 2): [
        {"tp": [0, 1], "ep": [0, 1, 2, 3], "data": [0, 2], "replica": [0]},
        {"tp": [0, 1], "ep": [0, 1, 2, 3], "data": [1, 3], "replica": [1]},
        {"tp": [2, 3], "ep": [0, 1, 2, 3], "data": [0, 2], "replica": [2]},
        {"tp": [2, 3], "ep": [0, 1, 2, 3], "data": [1, 3], "replica": [3]},
    ],
    (1, 4): [{"tp": [0, 1, 2, 3], "data": [rank], "replica": [rank]} for rank in range(4)],
    (4, 4): [{"tp": [0, 1, 2, 3], "ep": [0, 1, 2, 3], "data": [rank], "replica": [rank]} for rank in range(4)],
}


@pytest.mark.parametrize(("ep", "tp"), EXPECTED)
def test_experts_are_spread_over_whole_tensor_parallel_groups(ep: int, tp: int, rank_pool: "RankPool") -> None:
    assert rank_pool.run(groups, 4, ep, tp) == EXPECTED[ep, tp]


def slices() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    whole = torch.arange(48.0).view(4, 12)
    for dim in (0, 1):
        mine = slice_of(whole, dim, rank, size)
        assert mine.shape[dim] == whole.shape[dim] // size
        assert torch.equal(gather_slices(mine, dim, dist.group.WORLD), whole)
        mine.zero_()
        assert whole.any(), "a slice is a copy"


def test_slices_make_the_whole(rank_pool: "RankPool") -> None:
    rank_pool.run(slices, 4)


def all_reduce() -> None:
    ranks = TensorParallelRanks(ProcessGroupLink())
    assert (ranks.rank, ranks.size) == (dist.get_rank(), dist.get_world_size())
    tensor = torch.full((3,), float(ranks.rank + 1))
    assert torch.equal(ranks.all_reduce(tensor).wait(), torch.full((3,), 3.0))
    assert torch.equal(tensor, torch.full((3,), 3.0)), "in place"


def test_all_reduce_sums_in_place(rank_pool: "RankPool") -> None:
    rank_pool.run(all_reduce, 2)


def gathered_and_scattered() -> None:
    """Rank by rank, whatever the dtype, late or not; what is sent stays as it was; each is the other's reverse."""
    rank, size = dist.get_rank(), dist.get_world_size()
    links = (ProcessGroupLink(), DuplexGlooLink(), LateLink(), LateLink())
    for link, dtype in zip(links, (torch.float32, torch.float32, torch.float64, torch.bfloat16), strict=True):
        gather = TensorParallelRanks(link, sequence_parallel=True).gather
        rows = torch.arange(6, dtype=dtype).view(3, 2) + 10 * rank
        pending = gather.launch(rows)
        assert not isinstance(link, LateLink) or pending.unfilled.isnan().all()
        expected = [torch.arange(6, dtype=dtype).view(3, 2) + 10 * each for each in range(size)]
        assert torch.equal(pending.wait(), torch.cat(expected)) and torch.equal(rows, expected[rank])
        terms = torch.arange(2 * 3 * size, dtype=dtype).view(3 * size, 2) * (rank + 1)
        pending = gather.reverse().launch(terms)
        assert not isinstance(link, LateLink) or pending.unfilled.isnan().all()
        total = torch.arange(2 * 3 * size, dtype=dtype).view(size, 3, 2)[rank] * (size * (size + 1) // 2)
        assert torch.equal(pending.wait(), total)
        assert gather.reverse().reverse() == gather
        terms = torch.full((size, 1), (1e8, -1e8, 1.0)[rank])
        assert gather.reverse().launch(terms).wait().item() == 1.0, "in the order of the ranks, in fp32"


def test_rows_of_all_ranks_are_gathered_and_their_sum_is_scattered(rank_pool: "RankPool") -> None:
    rank_pool.run(gathered_and_scattered, 3)


LAYOUT = TensorLayout(sharded={"slice": 1}, partial=frozenset({"norm"}))


def parameters() -> dict[str, nn.Parameter]:
    """One of every kind; each gradient is 10 to the power of the rank, so that a sum names its terms."""
    made: dict[str, Any] = {name: nn.Parameter(torch.zeros(1, 1)) for name in ("head", "slice", "norm", "expert")}
    for parameter in made.values():
        parameter.grad = torch.full_like(parameter, 10.0 ** dist.get_rank())
    return made


def sums(ep: int) -> dict[str, float]:
    found = parameters()
    data_parallel = DataParallel(build_mesh(ep, tp=2), found, sharded=["expert"], layout=LAYOUT)
    data_parallel.reduce_gradients()
    tokens = data_parallel.all_reduce_sum(torch.tensor([10.0 ** dist.get_rank()]))
    return {**{name: float(each.grad) for name, each in found.items()}, "tokens": float(tokens)}  # type: ignore[arg-type]


def test_each_gradient_is_summed_over_the_ranks_whose_tokens_it_does_not_know(rank_pool: "RankPool") -> None:
    for ep, replicas in ((2, [101.0, 1010.0, 101.0, 1010.0]), (4, [1.0, 10.0, 100.0, 1000.0])):
        for rank, found in enumerate(rank_pool.run(sums, 4, ep)):
            others = 101.0 if rank % 2 == 0 else 1010.0
            assert found == {
                "head": others,
                "slice": others,
                "norm": 1111.0,
                "expert": replicas[rank],
                "tokens": others,
            }


def norm(ep: int) -> tuple[float, dict[str, float]]:
    """As after reduction: replicated ones are equal, slices are 1 and 2, experts 10 to the power of their place."""
    rank, found = dist.get_rank(), parameters()
    values = {"head": 3.0, "norm": 4.0, "slice": 1.0 + rank % 2, "expert": 10.0 ** (rank % ep)}
    for name, value in values.items():
        found[name].grad = torch.full((1, 1), value)
    data_parallel = DataParallel(build_mesh(ep, tp=2), found, sharded=["expert"], layout=LAYOUT)
    total = data_parallel.clip_gradients(1.0)
    return float(total), {name: float(each.grad) / values[name] for name, each in found.items()}  # type: ignore[arg-type]


@pytest.mark.parametrize("ep", [2, 4])
def test_the_norm_counts_every_slice_once(ep: int, rank_pool: "RankPool") -> None:
    expected = (9 + 16 + 1 + 4 + sum(100.0**place for place in range(ep))) ** 0.5
    for total, factors in rank_pool.run(norm, 4, ep):
        assert total == pytest.approx(expected)
        assert list(factors.values()) == pytest.approx([1 / expected] * 4, rel=1e-5)


def model_over(link: Any, mode: str, device: str, **more: Any) -> dict[str, torch.Tensor]:
    """Logits and gradients of a model of one rank whose outputs still go through the collectives."""
    model = rewire(tiny_model("deepseek_v3"), "ladder").to(device)
    blocks = [family_of_model(model).sub_blocks(layer) for layer in layers_of(model)]
    attach(model, Executor(blocks, wiring_of(model), tensor_parallel=TensorParallelRanks(link, **more), mode=mode))
    logits, gradients = run_backward(model, token_ids(2, 9).to(device), use_cache=False)
    return {"logits": logits, **gradients}


WAYS: list[dict[str, Any]] = [{}, {"sequence_parallel": True}, {"sequence_parallel": True, "chunks": 3}]


@pytest.mark.parametrize("more", WAYS, ids=str)
def test_a_model_over_a_late_link_keeps_its_bits(more: dict[str, Any]) -> None:
    links = (FakeLink(at_wait), FakeLink(at_wait), FakeLink(random_delay(0)))
    with poison_empty():
        serial, *others = (
            model_over(link, mode, "cpu", **more)
            for link, mode in zip(links, ("serial", "overlapped", "overlapped"), strict=True)
        )
    for found in others:
        assert_equal_bits(found, serial)
    assert not any(link.in_flight or link.lost for link in links)
    assert all(tensor.isfinite().all() for tensor in serial.values())


@pytest.mark.gpu
@pytest.mark.parametrize("more", WAYS, ids=str)
def test_a_model_over_the_one_gpu_test_bed_keeps_its_bits(more: dict[str, Any]) -> None:
    link = PacedCopyLink(torch.device("cuda"), bandwidth_gbyte_s=0.05, latency_us=200.0)
    serial, overlapped = (model_over(link, mode, "cuda", **more) for mode in ("serial", "overlapped"))
    assert_equal_bits(overlapped, serial)
