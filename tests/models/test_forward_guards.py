"""What a parallel model refuses: other tokens on ranks of one group, and wrappers that average its slices."""

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from farskip.models.attach import attachment_of
from farskip.models.forward_guards import refuse_other_tokens
from farskip.models.parallelize import parallelize
from farskip.models.surgery import rewire
from farskip.models.testing_models import next_token_loss, tiny_model, token_ids
from farskip.parallel.mesh import REPLICA_AXIS, build_mesh

if TYPE_CHECKING:
    from farskip.testing import RankPool


def refused(call: Any) -> str | None:
    """What a call says; None if it was allowed."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return None


# -- tokens -----------------------------------------------------------------------------------------------------------


def tokens_of_a_loader(divisor: int) -> str | None:
    """The first forward of a model that gets batches by ``rank // divisor``."""
    model = parallelize(tiny_model("qwen3_moe"), build_mesh(2, tp=2))
    ids = token_ids(2, 5, seed=dist.get_rank() // divisor)
    said = refused(lambda: model(ids))
    assert refused(lambda: model(ids)) == said, "who was refused once is refused again"
    if said is None:
        model.generate(ids, max_new_tokens=2, do_sample=False)
    return said


def test_other_tokens_on_ranks_of_one_group_are_refused(rank_pool: "RankPool") -> None:
    assert rank_pool.run(tokens_of_a_loader, 4, 2) == [None] * 4
    expected = [
        f"tensor parallelism: rank {first + 1} was given other tokens than rank {first}, but ranks {first}, "
        f"{first + 1} cut one model: give them the same batches, shared out by rank // 2 instead of rank"
        for first in (0, 0, 2, 2)
    ]
    assert rank_pool.run(tokens_of_a_loader, 4, 1) == expected


def inputs(kind: str) -> tuple[str | None, str | None]:
    """Inputs that differ on rank 1, and the same without the difference."""
    ids, odd = torch.arange(12).view(2, 6), dist.get_rank() == 1
    mask = torch.ones_like(ids, dtype=torch.bool)
    embeddings = torch.rand(2, 6, 4)
    differing: dict[str, list[Any]] = {
        "one token": [ids.index_fill(1, torch.tensor([5]), 7) if odd else ids],
        "their order": [ids.flip(0) if odd else ids],
        "their shape": [ids.view(3, 4) if odd else ids],
        "their number": [ids[:, :5] if odd else ids],
        "the mask": [ids, mask.logical_not() if odd else mask],
        "two inputs exchanged": [mask, ids] if odd else [ids, mask],
        "the embeddings' shape": [embeddings[:1] if odd else embeddings],
    }
    same = [ids, mask, None, embeddings + dist.get_rank()]
    return tuple(
        refused(lambda each=each: refuse_other_tokens(each, dist.group.WORLD)) for each in (differing[kind], same)
    )  # type: ignore[misc,return-value]


@pytest.mark.parametrize(
    "kind",
    [
        "one token",
        "their order",
        "their shape",
        "their number",
        "the mask",
        "two inputs exchanged",
        "the embeddings' shape",
    ],
)
def test_every_difference_is_seen_on_every_rank(kind: str, rank_pool: "RankPool") -> None:
    """Values of embeddings may differ in bits."""
    for said, of_same in rank_pool.run(inputs, 2, kind):
        assert said is not None and said.startswith("tensor parallelism: rank 1 was given other tokens than rank 0")
        assert of_same is None


def num_gathers() -> list[int]:
    model, seen = parallelize(tiny_model("qwen3_moe"), build_mesh(1, tp=2)), []
    gather = dist.all_gather

    def noted(*arguments: Any, **keywords: Any) -> Any:
        seen[-1] += 1
        return gather(*arguments, **keywords)

    dist.all_gather = noted
    try:
        for _ in range(3):
            seen.append(0)
            next_token_loss(model(token_ids(1, 5)).logits, token_ids(1, 5)).backward()
    finally:
        dist.all_gather = gather
    return seen


def test_tokens_are_compared_once(rank_pool: "RankPool") -> None:
    assert rank_pool.run(num_gathers, 2) == [[1, 0, 0]] * 2


# -- wrappers ---------------------------------------------------------------------------------------------------------

AROUND = (
    " around a parallel model takes the slices of ranks for copies of one tensor; load the model afresh and sum "
    "gradients with farskip.parallel.data_parallel.DataParallel (docs/tensor_parallel.md)"
)


class Around(torch.nn.Module):
    """As Lightning's module and many others."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids).logits


def under_ddp(ep: int, tp: int) -> list[str | None]:
    """Called as it is, and inside another module."""
    said = []
    for wrap in (lambda model: model, Around):
        model = parallelize(rewire(tiny_model("qwen3_moe"), "farskip"), build_mesh(ep, tp=tp))
        ddp = DistributedDataParallel(wrap(model), find_unused_parameters=True)
        said.append(refused(lambda ddp=ddp: ddp(token_ids(1, 5))))  # type: ignore[misc]
        assert refused(lambda model=model: model(token_ids(1, 5))) is None, "without it, it is as before"  # type: ignore[misc]
    return said


@pytest.mark.parametrize(("ep", "tp"), [(2, 1), (1, 2)])
def test_ddp_around_slices_is_refused(ep: int, tp: int, rank_pool: "RankPool") -> None:
    assert rank_pool.run(under_ddp, 2, ep, tp) == [["DistributedDataParallel" + AROUND] * 2] * 2


def test_ddp_around_whole_parameters_is_not_our_business(rank_pool: "RankPool") -> None:
    assert rank_pool.run(under_ddp, 2, 1, 1) == [[None, None]] * 2


def beside_ddp() -> None:
    """A parallel teacher that another model, which is under DDP, calls."""

    class Student(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.scale * teacher(ids).logits.detach()

    teacher = parallelize(tiny_model("qwen3_moe"), build_mesh(2)).requires_grad_(False)
    DistributedDataParallel(Student())(token_ids(1, 5)).sum().backward()


def test_a_parallel_model_beside_ddp_is_no_mistake(rank_pool: "RankPool") -> None:
    rank_pool.run(beside_ddp, 2)


def under_fsdp1(use_orig_params: bool) -> str | None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = parallelize(tiny_model("qwen3_moe"), build_mesh(2))
    fsdp = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=use_orig_params)
    return refused(lambda: fsdp(token_ids(1, 5)))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("use_orig_params", [False, True])
def test_fsdp1_around_slices_is_refused(use_orig_params: bool, rank_pool: "RankPool") -> None:
    assert rank_pool.run(under_fsdp1, 2, use_orig_params) == ["FullyShardedDataParallel" + AROUND] * 2


def under_fsdp2(tp: int) -> str | None:
    """Everything but the slices of experts over all ranks, or slices and all over the ranks with other tokens."""
    from torch.distributed.fsdp import fully_shard

    mesh = build_mesh(2 if tp == 1 else 1, tp=tp)
    model = parallelize(tiny_model("qwen3_moe"), mesh)
    attachment = attachment_of(model)
    assert attachment is not None
    experts = {p for name, p in model.named_parameters() if name in attachment.sharded_experts}
    over = None if tp == 1 else mesh[REPLICA_AXIS]
    fully_shard(model, mesh=over, ignored_params=experts, reshard_after_forward=False)
    ids = token_ids(1, 5)
    return refused(lambda: next_token_loss(model(ids, use_cache=False).logits, ids).backward())


@pytest.mark.parametrize("tp", [1, 2])
def test_fsdp2_is_no_mistake(tp: int, rank_pool: "RankPool") -> None:
    assert rank_pool.run(under_fsdp2, 2, tp) == [None] * 2
