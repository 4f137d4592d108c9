"""An RMSNorm over all heads on ranks that have a slice of them: against the norm of transformers on the whole."""

import copy
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from farskip.models.attach import attachment_of
from farskip.models.parallelize import parallelize
from farskip.models.sliced_norm import SlicedRMSNorm, spread_norms
from farskip.models.testing_families import CASES, build
from farskip.models.testing_models import gradients, next_token_loss, token_ids
from farskip.parallel.collectives import ProcessGroupLink
from farskip.parallel.emulated_link import EmulatedLink
from farskip.parallel.mesh import TP_AXIS, another_group, axis_group, build_mesh
from farskip.parallel.tensor_parallel import TensorParallelRanks
from farskip.parallel.testing_links import LateLink
from farskip.testing import assert_close, assert_equal_bits

if TYPE_CHECKING:
    from farskip.testing import RankPool

WIDTH = 24


def slices_of_the_whole_norm(dtype: torch.dtype, rel_norm: float) -> None:
    from transformers.models.olmoe.modeling_olmoe import OlmoeRMSNorm

    ranks = TensorParallelRanks(LateLink())
    torch.manual_seed(1)
    x_TH, upstream_TH = (torch.randn(7, WIDTH).to(dtype) for _ in range(2))
    x_TH[3] *= 1e-3  # where eps counts
    whole = OlmoeRMSNorm(WIDTH, eps=1e-5).to(dtype)
    with torch.no_grad():
        whole.weight.add_(0.3 * torch.randn(WIDTH).to(dtype))
    mine = copy.deepcopy(whole)
    mine.weight = torch.nn.Parameter(whole.weight.detach().chunk(ranks.size)[ranks.rank].clone())
    spread_norms([mine], ranks)
    assert type(mine) is SlicedRMSNorm

    def part(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.chunk(ranks.size, -1)[ranks.rank]

    whole_input, my_input = x_TH.clone().requires_grad_(), part(x_TH).clone().requires_grad_()
    output, expected = mine(my_input), whole(whole_input)
    output.backward(part(upstream_TH))
    expected.backward(upstream_TH)
    assert output.dtype == expected.dtype == dtype
    for name, ours, theirs in (
        ("output", output, expected),
        ("gradient of x", my_input.grad, whole_input.grad),
        ("gradient of the weight", mine.weight.grad, whole.weight.grad),
    ):
        assert ours is not None and theirs is not None
        assert_close(ours.detach().float(), part(theirs.detach()).float(), rel_norm=rel_norm, name=name)


@pytest.mark.parametrize(
    ("dtype", "rel_norm"),
    # fp32: other brackets of a sum of 24. bf16: the same, and now and then a last bit of 8.
    [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)],
    ids=str,
)
def test_each_rank_has_its_slice_of_the_whole_norm(dtype: torch.dtype, rel_norm: float, rank_pool: "RankPool") -> None:
    for world in (2, 4):
        rank_pool.run(slices_of_the_whole_norm, world, dtype, rel_norm)


def norms_and_links() -> None:
    mesh = build_mesh(1, tp=2)
    link = EmulatedLink(axis_group(mesh, TP_AXIS), bandwidth_gbit_s=8.0, latency_us=50.0)
    model = parallelize(build(CASES["olmoe"]), mesh, tensor_link=link)
    attachment = attachment_of(model)
    assert attachment is not None
    for layer in model.model.layers:
        for name in ("q", "k"):  # the key has fewer heads
            norm, projection = (getattr(layer.self_attn, f"{name}_{kind}") for kind in ("norm", "proj"))
            assert isinstance(norm, SlicedRMSNorm) and norm.weight.shape == (projection.out_features,)
        assert not isinstance(layer.input_layernorm, SlicedRMSNorm)
    summed = model.model.layers[0].self_attn.q_norm._sum
    before = link.meter.seconds()
    assert torch.equal(summed(torch.ones(3)), torch.full((3,), 2.0))
    assert link.meter.seconds() >= before + 50e-6, "as slow as the link that was given, and its waits count"


def test_the_norms_of_a_model_get_a_link_like_its_own(rank_pool: "RankPool") -> None:
    rank_pool.run(norms_and_links, 2)


def norms_beside_what_is_in_flight() -> None:
    """One rank launches an all-reduce of the schedule before the norm, the other behind it."""
    mesh, in_flight = build_mesh(1, tp=2), torch.full((3,), 10.0)
    link = ProcessGroupLink(axis_group(mesh, TP_AXIS))
    model = parallelize(build(CASES["olmoe"], num_hidden_layers=1), mesh, tensor_link=link)
    norm, x_TH = model.model.layers[0].self_attn.q_norm, torch.ones(3, 16)
    for rank in (0, 1):
        if dist.get_rank() == rank:
            work = link.all_reduce(in_flight)
        if rank == 0:
            normed_TH = norm(x_TH)
    work.wait()
    assert torch.equal(in_flight, torch.full((3,), 20.0))
    assert_close(normed_TH.detach(), norm.weight.detach().expand(3, 16), max_error=1e-4)  # eps of 1e-5 beside 1


def test_the_norms_do_not_queue_behind_the_schedule(rank_pool: "RankPool") -> None:
    rank_pool.run(norms_beside_what_is_in_flight, 2)


def groups(ep: int | None) -> tuple[list[int], bool]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))["tp"] if ep is None else build_mesh(ep, tp=2)
    group = another_group(axis_group(mesh, TP_AXIS))
    tensor = torch.full((1,), 10.0 ** dist.get_rank())
    ProcessGroupLink(group).all_reduce(tensor).wait()
    assert tensor.item() == sum(10.0**rank for rank in dist.get_process_group_ranks(group))
    return dist.get_process_group_ranks(group), group is axis_group(mesh, TP_AXIS)


@pytest.mark.parametrize("ep", [1, 2, 4, None], ids=["ep=1", "ep=2", "ep=4", "a mesh's part"])
def test_the_norms_have_a_group_of_their_own(ep: int | None, rank_pool: "RankPool") -> None:
    assert rank_pool.run(groups, 4, ep) == [([0, 1], False)] * 2 + [([2, 3], False)] * 2


def a_compiled_attention() -> None:
    mesh, ids, found = build_mesh(1, tp=2), token_ids(2, 7), []
    for compiled in (False, True):
        model = parallelize(build(CASES["olmoe"], num_hidden_layers=1), mesh)
        if compiled:
            model.model.layers[0].self_attn.compile(backend="eager")
        logits = model(ids, use_cache=False).logits
        next_token_loss(logits, ids).backward()
        found.append({"logits": logits.detach(), **gradients(model)})
    assert_equal_bits(found[1], found[0])


# Dynamo itself looks whether a tensor that it reads has a gradient.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_attention_sums_outside_its_graphs(rank_pool: "RankPool") -> None:
    rank_pool.run(a_compiled_attention, 2)
