"""Dispatch and combine: every row reaches its expert and comes back to its token, in a fixed order."""

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist

from farskip.async_autograd import InFlight
from farskip.parallel.collectives import AllToAll, ProcessGroupLink
from farskip.parallel.dispatcher import AllToAllDispatcher
from farskip.parallel.host_counts import CountsUnderWay, CpuCounts, Sizes
from farskip.parallel.testing_links import FakeLink
from farskip.pending import Pending
from farskip.stage import Routing

if TYPE_CHECKING:
    from farskip.testing import RankPool

EXPERTS, WIDTH = 6, 3


def routing_of(experts_TK: torch.Tensor, seed: int = 0) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    weights_TK = torch.rand(experts_TK.shape, generator=generator, dtype=torch.float64).requires_grad_()
    return Routing(logits_TE=torch.zeros(experts_TK.shape[0], EXPERTS), weights_TK=weights_TK, experts_TK=experts_TK)


def random_experts(tokens: int, top_k: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, EXPERTS, generator=generator).argsort(1)[:, :top_k]


def expert_value(rows_RD: torch.Tensor, expert_R: torch.Tensor) -> torch.Tensor:
    """What expert e makes of a row: something that tells experts and rows apart."""
    return torch.sin(rows_RD * (expert_R + 1).unsqueeze(1))


def through(dispatcher: AllToAllDispatcher, tokens_TD: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Dispatch, experts, combine, merge."""
    first = dispatcher.link.rank * dispatcher.num_local_experts
    chunks = dispatcher.prepare(tokens_TD.view(1, *tokens_TD.shape), routing)
    back = []
    for rows, plan in chunks:
        there, again = InFlight(plan.collective), InFlight(plan.collective.reverse())
        arrived = there.wait(there.launch(rows))
        assert arrived.shape[0] == plan.expert_R.shape[0]
        assert ((plan.expert_R >= 0) & (plan.expert_R < dispatcher.num_local_experts)).all()
        back.append(again.wait(again.launch(expert_value(arrived, plan.expert_R + first))))
    return dispatcher.merge(back, routing, [plan for _, plan in chunks]).view_as(tokens_TD)


def expected_of(tokens_TD: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Token by token."""
    rows = []
    for token, experts, weights in zip(tokens_TD, routing.experts_TK, routing.weights_TK, strict=True):
        parts = [
            weight * expert_value(token.unsqueeze(0), expert.view(1))[0]
            for expert, weight in zip(experts, weights, strict=True)
        ]
        rows.append(torch.stack(parts).sum(0))
    return torch.stack(rows) if rows else tokens_TD * 1.0


def kept_by_capacity(experts_TK: torch.Tensor, chunks: int, capacity: int | None) -> torch.Tensor:
    """[T, K] bool: whether a slot is among the first `capacity` of its expert in its chunk of tokens."""
    kept = torch.ones_like(experts_TK, dtype=torch.bool)
    if capacity is None:
        return kept
    for tokens in torch.arange(experts_TK.shape[0]).tensor_split(chunks):
        taken = [0] * EXPERTS
        for token, k in itertools.product(tokens.tolist(), range(experts_TK.shape[1])):
            expert = int(experts_TK[token, k])
            kept[token, k] = taken[expert] < capacity
            taken[expert] += 1
    return kept


def compare(dispatcher: AllToAllDispatcher, tokens: int, top_k: int, experts_TK: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(tokens + 10 * dispatcher.link.rank)
    tokens_TD = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
    routing = routing_of(experts_TK, dispatcher.link.rank)
    upstream = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64)
    kept = kept_by_capacity(experts_TK, dispatcher.chunks, dispatcher.capacity)
    limited = replace(routing, weights_TK=routing.weights_TK * kept)
    outputs = []
    for function in (lambda: through(dispatcher, tokens_TD, routing), lambda: expected_of(tokens_TD, limited)):
        tokens_TD.grad = routing.weights_TK.grad = None
        output = function()
        (output * upstream).sum().backward()
        outputs.append([output.detach(), tokens_TD.grad, routing.weights_TK.grad])
    for ours, theirs in zip(*outputs, strict=True):
        if theirs is not None or tokens:
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    num_slots = kept.numel() if dispatcher.capacity is not None else 0
    assert dispatcher.take_dropped() == (int((~kept).sum()), num_slots)
    assert dispatcher.take_dropped() == (0, 0), "taken is taken"


@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize(("tokens", "top_k"), list(itertools.product([0, 1, 2, 7, 63], [1, 2, 6])), ids=str)
def test_one_rank(tokens: int, top_k: int, chunks: int) -> None:
    compare(AllToAllDispatcher(FakeLink(), EXPERTS, chunks), tokens, top_k, random_experts(tokens, top_k, 0))


@pytest.mark.parametrize("capacity", [1, 2, 5, 100])
@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize(("tokens", "top_k"), [(0, 2), (1, 1), (7, 2), (63, 6)], ids=str)
def test_beyond_its_capacity_an_expert_takes_no_row(tokens: int, top_k: int, chunks: int, capacity: int) -> None:
    link = FakeLink()
    dispatcher = AllToAllDispatcher(link, EXPERTS, chunks, capacity=capacity)
    compare(dispatcher, tokens, top_k, random_experts(tokens, top_k, 0))


def test_a_fixed_capacity_needs_no_counts() -> None:
    link = FakeLink()
    link.exchange_counts = None  # type: ignore[method-assign, assignment]
    experts_TK = random_experts(9, 2, 0)
    prepared = AllToAllDispatcher(link, EXPERTS, 2, capacity=3).prepare(torch.ones(1, 9, WIDTH), routing_of(experts_TK))
    for rows, plan in prepared:
        assert rows.shape == (EXPERTS * 3, WIDTH)
        assert torch.equal(plan.expert_R, torch.arange(EXPERTS).repeat_interleave(3))
    num_sent = sum(int(rows.any(dim=1).sum()) for rows, _ in prepared)
    assert num_sent == int(kept_by_capacity(experts_TK, 2, 3).sum()), "padding is zero"


def test_the_counts_travel_while_rows_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exchange is launched before the copy and waited for behind it."""
    import farskip.parallel.dispatcher as module

    link, under_way = FakeLink(), []
    real = module.permute

    def watched(*arguments: Any, **keywords: Any) -> torch.Tensor:
        under_way.append(len(link.in_flight))
        return real(*arguments, **keywords)

    monkeypatch.setattr(module, "permute", watched)
    module.AllToAllDispatcher(link, EXPERTS, 2).prepare(torch.zeros(1, 8, WIDTH), routing_of(random_experts(8, 2, 0)))
    assert under_way == [1, 1] and not link.in_flight


@pytest.mark.parametrize("chunks", [1, 2])
def test_one_read_behind_the_copy_of_rows(chunks: int) -> None:
    """The host begins to read before the copy, has done so behind it, and reads nothing else."""
    import farskip.parallel.dispatcher as module

    link, log = FakeLink(), []
    copy, to_list = module.permute, torch.Tensor.tolist

    class Watched(CpuCounts):
        def begin(self, received: Pending, sizes: Sizes) -> CountsUnderWay:
            log.append("begin")
            assert len(link.in_flight) == 1
            return super().begin(received, sizes)

    def copied(*arguments: Any, **keywords: Any) -> torch.Tensor:
        log.append("copy")
        return copy(*arguments, **keywords)

    def read(tensor: torch.Tensor) -> Any:
        log.append("read")
        return to_list(tensor)

    dispatcher = AllToAllDispatcher(link, EXPERTS, chunks)
    dispatcher.make_host_counts = lambda device, meter: Watched()
    experts_TK = random_experts(8, 2, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "permute", copied)
        patch.setattr(torch.Tensor, "tolist", read)
        for _ in range(2):
            dispatcher.prepare(torch.zeros(1, 8, WIDTH), routing_of(experts_TK))
    assert log == ["begin", *["copy"] * chunks, "read"] * 2


def on_ranks(chunks: int, capacity: int | None = None) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    dispatcher = AllToAllDispatcher(ProcessGroupLink(), EXPERTS, chunks, capacity=capacity)
    for tokens in (rank, 5 - rank, 9):  # uneven, none on rank 0
        compare(dispatcher, tokens, 2, random_experts(tokens, 2, seed=rank))
    for only in range(size):  # all tokens of all ranks to the experts of one rank
        local = EXPERTS // size
        experts_TK = torch.arange(only * local, only * local + 2).repeat(4, 1)
        compare(dispatcher, 4, 2, experts_TK)
    if rank:
        compare(dispatcher, 0, 2, torch.zeros(0, 2, dtype=torch.int64))
    else:
        compare(dispatcher, 3, 2, random_experts(3, 2, 1))


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks(world: int, chunks: int, rank_pool: "RankPool") -> None:
    rank_pool.run(on_ranks, world, chunks)


def test_ranks_with_a_capacity(rank_pool: "RankPool") -> None:
    """Also where ranks have different numbers of tokens: the sizes do not depend on them."""
    rank_pool.run(on_ranks, 2, 2, 2)


def uneven_splits_swap() -> None:
    rank = dist.get_rank()
    there = AllToAll(link=ProcessGroupLink(), input_splits=(rank, 2), output_splits=((0, 1), (2, 2))[rank])
    assert there.launch(torch.zeros(rank + 2, 1)).wait().shape == (sum(there.output_splits), 1)
    back = there.reverse()
    assert back.launch(torch.zeros(sum(there.output_splits), 1)).wait().shape == (rank + 2, 1)


def arriving_rows_know_their_expert() -> None:
    """Each row carries its expert's number; both ranks finish the exchange before either one judges."""
    rank, local = dist.get_rank(), EXPERTS // dist.get_world_size()
    experts_TK = random_experts(9 + rank, 2, seed=rank)
    dispatcher = AllToAllDispatcher(ProcessGroupLink(), EXPERTS)
    [(_, plan)] = dispatcher.prepare(torch.zeros(1, 9 + rank, WIDTH), routing_of(experts_TK))
    numbers = experts_TK.reshape(-1)[plan.dispatch.src.long()].unsqueeze(1)
    arrived = plan.collective.launch(numbers.contiguous()).wait().squeeze(1)
    assert torch.equal(arrived, plan.expert_R + rank * local)


def test_arriving_rows_know_their_expert(rank_pool: "RankPool") -> None:
    rank_pool.run(arriving_rows_know_their_expert, 2)


def test_splits_swap_on_the_way_back(rank_pool: "RankPool") -> None:
    rank_pool.run(uneven_splits_swap, 2)


def test_rows_of_one_expert_keep_the_order_of_their_tokens() -> None:
    """A stable sort: else two runs could add the rows of an expert's gradient in two orders."""
    experts_TK = torch.tensor([[1, 0], [0, 1], [1, 0], [0, 1]] * 16)
    [(_, plan)] = AllToAllDispatcher(FakeLink(), EXPERTS).prepare(torch.zeros(1, 64, WIDTH), routing_of(experts_TK))
    slots = plan.dispatch.src.view(2, 64)
    assert (slots.diff(dim=1) > 0).all()
    assert torch.equal(plan.expert_R, torch.arange(2).repeat_interleave(64))
    assert torch.equal(plan.dispatch.src[plan.dispatch.dst.flatten().long()].long(), torch.arange(128))


def test_experts_that_the_ranks_do_not_divide_are_refused() -> None:
    link = FakeLink()
    link.size = 4  # type: ignore[misc]
    with pytest.raises(ValueError, match="expert parallelism of 4 does not divide 6 experts: choose a divisor"):
        AllToAllDispatcher(link, EXPERTS)


@pytest.mark.parametrize("chunks", [0, -1])
def test_no_chunk_is_refused(chunks: int) -> None:
    with pytest.raises(ValueError, match=f"chunks={chunks} is too small"):
        AllToAllDispatcher(FakeLink(), EXPERTS, chunks)


@pytest.mark.parametrize("capacity", [0, -1])
def test_no_capacity_is_refused(capacity: int) -> None:
    with pytest.raises(ValueError, match=f"capacity={capacity} is too small"):
        AllToAllDispatcher(FakeLink(), EXPERTS, capacity=capacity)


def test_the_reverse_of_an_exchange_swaps_the_splits() -> None:
    [(_, plan)] = AllToAllDispatcher(FakeLink(), EXPERTS).prepare(
        torch.zeros(1, 4, WIDTH), routing_of(random_experts(4, 2, 0))
    )
    back = plan.collective.reverse()
    assert (back.input_splits, back.output_splits) == (plan.collective.output_splits, plan.collective.input_splits)  # type: ignore[attr-defined]
    assert back.reverse() == plan.collective


def one_expert_on_each_rank() -> None:
    link = ProcessGroupLink()
    experts_TK = torch.randint(link.size, (7, 1), generator=torch.Generator().manual_seed(link.rank))
    compare(AllToAllDispatcher(link, link.size, chunks=2), 7, 1, experts_TK)


def test_chunks_with_one_expert_on_each_rank(rank_pool: "RankPool") -> None:
    """The counts of the chunks are a view there, and gloo takes only contiguous tensors."""
    rank_pool.run(one_expert_on_each_rank, 2)
