"""The data-parallel world: who is summed over whom, a norm that counts each expert once, flags and time."""

from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

from farskip.parallel import gradient_sums
from farskip.parallel.data_parallel import DataParallel
from farskip.parallel.mesh import EP_AXIS, REPLICA_AXIS, axis_size, build_mesh

if TYPE_CHECKING:
    from farskip.testing import RankPool


def parameters_of(rank: int) -> dict[str, nn.Parameter]:
    """Three replicated parameters and one expert slice; gradients are small integers that name their rank."""
    parameters = {
        "plain": nn.Parameter(torch.zeros(3)),
        "matrix": nn.Parameter(torch.zeros(2, 2)),
        "half": nn.Parameter(torch.zeros(2, dtype=torch.bfloat16)),
        "expert": nn.Parameter(torch.zeros(2, 3)),
    }
    for position, parameter in enumerate(parameters.values()):
        parameter.grad = torch.full_like(parameter, 10.0 ** min(rank, 1) * (rank + 1) + position)
    return parameters


def grad(parameter: nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def sums(ep: int, bucket_bytes: int) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    parameters = parameters_of(rank)
    everyone = [parameters_of(other) for other in range(world)]
    with patch.object(gradient_sums, "_BUCKET_BYTES", bucket_bytes):
        DataParallel(build_mesh(ep), parameters, sharded=["expert"]).reduce_gradients()
    for name in ("plain", "matrix", "half"):
        assert torch.equal(grad(parameters[name]), sum(grad(other[name]) for other in everyone)), name  # type: ignore[arg-type]
    replicas = [everyone[other] for other in range(world) if other % ep == rank % ep]
    assert torch.equal(grad(parameters["expert"]), sum(grad(other["expert"]) for other in replicas))  # type: ignore[arg-type]


@pytest.mark.parametrize("bucket_bytes", [1, 20, 1 << 20])
@pytest.mark.parametrize(("world", "ep"), [(1, 1), (2, 1), (2, 2), (4, 2), (4, 4)])
def test_replicated_gradients_are_summed_over_all_and_experts_over_replicas(
    world: int, ep: int, bucket_bytes: int, rank_pool: "RankPool"
) -> None:
    rank_pool.run(sums, world, ep, bucket_bytes)


def absent_gradients() -> None:
    rank = dist.get_rank()
    parameters = {name: nn.Parameter(torch.zeros(2)) for name in ("here", "nowhere", "rank_1")}
    parameters["here"].grad = torch.ones(2)
    if rank == 1:
        parameters["rank_1"].grad = torch.full((2,), 5.0)
    DataParallel(build_mesh(1), parameters).reduce_gradients()
    assert parameters["nowhere"].grad is None
    assert torch.equal(grad(parameters["rank_1"]), torch.full((2,), 5.0))
    assert torch.equal(grad(parameters["here"]), torch.full((2,), 2.0))


def test_a_gradient_that_exists_on_one_rank_reaches_all_and_one_that_exists_nowhere_none(rank_pool: "RankPool") -> None:
    rank_pool.run(absent_gradients, 2)


def norm(ep: int, max_norm: float | None) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    parameters = parameters_of(0)
    grad(parameters["expert"]).fill_(1.0 + rank % ep)  # replicas hold the same slice
    before = {name: grad(parameter).clone() for name, parameter in parameters.items()}
    whole = [before["plain"], before["matrix"], before["half"].float()]
    whole += [torch.full((2, 3), 1.0 + position) for position in range(ep)]
    expected = torch.cat([tensor.reshape(-1) for tensor in whole]).norm()
    measured = DataParallel(build_mesh(ep), parameters, sharded=["expert"]).clip_gradients(max_norm)
    assert abs(float(measured - expected)) <= 1e-5 * float(expected), f"{world} ranks: {measured} is not {expected}"
    factor = min(1.0, (max_norm or float("inf")) / float(expected))
    for name, parameter in parameters.items():
        torch.testing.assert_close(grad(parameter).float(), before[name].float() * factor, rtol=1e-2, atol=0)


@pytest.mark.parametrize("max_norm", [None, 0.25, 1e6])
@pytest.mark.parametrize(("world", "ep"), [(1, 1), (2, 1), (2, 2), (4, 2)])
def test_the_norm_counts_every_expert_once(world: int, ep: int, max_norm: float | None, rank_pool: "RankPool") -> None:
    rank_pool.run(norm, world, ep, max_norm)


def no_gradients() -> None:
    world = DataParallel(build_mesh(1), {"w": nn.Parameter(torch.zeros(2))})
    world.reduce_gradients()
    assert float(world.clip_gradients(1.0)) == 0.0


def test_a_step_without_gradients(rank_pool: "RankPool") -> None:
    rank_pool.run(no_gradients, 2)


def a_nan_somewhere() -> float:
    parameters = parameters_of(0)
    if dist.get_rank() == 1:
        grad(parameters["expert"])[0, 0] = float("nan")
    return float(DataParallel(build_mesh(2), parameters, sharded=["expert"]).clip_gradients(1.0))


def test_a_nan_in_one_ranks_experts_reaches_every_ranks_norm(rank_pool: "RankPool") -> None:
    assert all(value != value for value in rank_pool.run(a_nan_somewhere, 2))


def flags() -> tuple[bool, bool, bool, float, float]:
    rank = dist.get_rank()
    world = DataParallel(build_mesh(1), parameters_of(rank))
    summed = world.all_reduce_sum(torch.tensor([float(rank + 1)]))
    world.barrier()
    world.reduce_gradients()
    first, second = world.exposed_communication_s(), world.exposed_communication_s()
    return world.any(rank == 1), world.any(False), float(summed) == 3.0, first, second


def test_flags_sums_and_waiting_time(rank_pool: "RankPool") -> None:
    for any_of, none_of, summed, first, second in rank_pool.run(flags, 2):
        assert any_of and not none_of and summed
        assert first > 0.0 and second == 0.0


def wrapped() -> None:
    mesh, parameters = build_mesh(2), parameters_of(0)
    world = DataParallel(mesh, parameters, sharded=["expert"])
    mine = torch.full((2, 3), float(dist.get_rank() % 2))
    whole: Any = world.wrap_for_checkpoint("expert", mine)
    assert whole.shape == (4, 3)
    expected = torch.tensor([0.0, 0.0, 1.0, 1.0]).unsqueeze(1).expand(4, 3)
    assert torch.equal(whole.full_tensor(), expected)
    assert world.wrap_for_checkpoint("plain", mine) is mine
    step = torch.tensor(3.0)
    assert world.wrap_for_checkpoint("expert", step) is step


@pytest.mark.parametrize("world", [2, 4])
def test_an_expert_slice_is_written_as_its_part_of_the_whole(world: int, rank_pool: "RankPool") -> None:
    rank_pool.run(wrapped, world)


def meshes() -> tuple[str, int, int, list[int]]:
    mesh = build_mesh(2)
    try:
        build_mesh(3)
    except ValueError as error:
        said = str(error)
    neighbors = dist.get_process_group_ranks(mesh.get_group(EP_AXIS))
    return said, axis_size(mesh, EP_AXIS), axis_size(mesh, REPLICA_AXIS), neighbors


def test_the_mesh_spreads_experts_over_neighbors(rank_pool: "RankPool") -> None:
    for rank, (said, ep, replicas, neighbors) in enumerate(rank_pool.run(meshes, 4)):
        assert said == "ep=3 does not divide 4 ranks: choose a divisor of 4"
        assert (ep, replicas) == (2, 2)
        assert neighbors == ([0, 1] if rank < 2 else [2, 3])
