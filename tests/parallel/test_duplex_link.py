"""Both directions of an all-to-all in groups of their own: the same result, and the same patience."""

from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from farskip.parallel.collectives import AllToAll, ProcessGroupLink
from farskip.parallel.duplex_link import DuplexGlooLink, real_link
from farskip.parallel.mesh import EP_AXIS, another_group, axis_group, build_mesh, timeout_of

if TYPE_CHECKING:
    from farskip.testing import RankPool

SPLITS = [[3, 1, 0, 2], [0, 0, 0, 0], [1, 4, 2, 0], [5, 0, 1, 1]]
"""Rows from each rank to each."""


def same_rows() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    sent = tuple(SPLITS[rank][:size])
    came = tuple(SPLITS[other][rank] for other in range(size))
    rows = torch.arange(sum(sent) * 3, dtype=torch.float64).view(-1, 3) + 1000 * rank
    duplex, plain = DuplexGlooLink(), ProcessGroupLink()
    both = [AllToAll(link=link, input_splits=sent, output_splits=came) for link in (duplex, plain)]
    received, expected = (exchange.launch(rows).wait() for exchange in both)
    assert torch.equal(received, expected)
    back = both[0].reverse().launch(received).wait()
    assert torch.equal(back, rows)
    counts = torch.arange(2 * size).view(size, 2) + 100 * rank
    assert torch.equal(duplex.exchange_counts(counts).wait(), plain.exchange_counts(counts).wait())
    assert isinstance(real_link(dist.group.WORLD), DuplexGlooLink)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_it_carries_what_one_all_to_all_carries(num_ranks: int, rank_pool: "RankPool") -> None:
    rank_pool.run(same_rows, num_ranks)


def many_in_flight() -> None:
    """Launched before any is waited for, as the executor does."""
    rank, link = dist.get_rank(), DuplexGlooLink()
    pendings = []
    for number in range(20):
        rows = torch.full((4, 50), float(100 * number + rank))
        pendings.append(AllToAll(link=link, input_splits=(2, 2), output_splits=(2, 2)).launch(rows))
    for number, pending in enumerate(pendings):
        expected = torch.tensor([100.0 * number] * 2 + [100.0 * number + 1] * 2)
        assert torch.equal(pending.wait(), expected.unsqueeze(1).expand(4, 50))


def test_many_may_be_in_flight(rank_pool: "RankPool") -> None:
    rank_pool.run(many_in_flight, 2)


def gives_up() -> None:
    """Ranks 0 and 3 miss the other rank of their groups in time; torch's own would be half an hour."""
    usual, rank = timeout_of(None), dist.get_rank()
    _set_pg_timeout(timedelta(seconds=2), dist.group.WORLD)
    try:
        mesh = build_mesh(2)
        group = axis_group(mesh, EP_AXIS)
        links = [
            ProcessGroupLink(group),
            DuplexGlooLink(group),
            ProcessGroupLink(another_group(group)),
        ]
    finally:
        _set_pg_timeout(usual, dist.group.WORLD)
    if rank in (0, 3):
        for link in links:
            with pytest.raises(RuntimeError, match=r"[Tt]imed out|timeout"):
                AllToAll(link=link, input_splits=(1, 1), output_splits=(1, 1)).launch(torch.ones(2, 1)).wait()
    dist.barrier()


def test_a_rank_that_does_not_answer_is_missed_in_time(rank_pool: "RankPool") -> None:
    rank_pool.run(gives_up, 4)
