"""The link that carries nothing: right shapes, the recorded counts, and no row from elsewhere."""

import pytest
import torch
import torch.distributed as dist

from farskip.parallel.local_copy import LocalCopyLink
from farskip.testing import RankPool


def no_row_travels() -> None:
    link = LocalCopyLink()
    mine = torch.full((4, 3), float(dist.get_rank()))
    output = torch.full((6, 3), float("nan"))
    link.all_to_all(output, mine, [3, 3], [2, 2]).wait()
    assert torch.equal(output, torch.full((6, 3), float(dist.get_rank())))
    empty = torch.full((2, 3), float("nan"))
    link.all_to_all(empty, mine[:0], [1, 1], [0, 0]).wait()
    assert torch.equal(empty, torch.zeros(2, 3))
    assert link.num_bytes == output.nbytes + empty.nbytes
    whole = torch.full((8, 3), float("nan"))
    link.all_gather(whole, mine).wait()
    assert torch.equal(whole, torch.full((8, 3), float(dist.get_rank())))
    part = torch.full((4, 3), float("nan"))
    link.reduce_scatter(part, torch.arange(24.0).view(8, 3)).wait()
    assert torch.equal(part, torch.arange(24.0).view(8, 3)[4 * dist.get_rank() :][:4])
    assert link.num_bytes == output.nbytes + empty.nbytes + 2 * whole.nbytes


def counts_are_real_until_frozen() -> list[list[int]]:
    link, rank = LocalCopyLink(), dist.get_rank()
    with pytest.raises(RuntimeError, match="before freeze"):
        link.freeze()
    passes = [torch.tensor([[10 * rank + layer], [10 * rank + layer + 5]]) for layer in range(2)]
    real = [link.exchange_counts(counts).wait().flatten().tolist() for counts in passes]
    link.freeze()
    # Other counts, no partner: what comes back is what was recorded, in a circle.
    if rank == 0:
        repeated = [link.exchange_counts(torch.zeros_like(passes[0])).wait().flatten().tolist() for _ in range(4)]
        assert repeated == real + real
        with pytest.raises(RuntimeError, match="recorded"):
            link.exchange_counts(torch.zeros(2, 7, dtype=torch.int64))
    return real


def test_no_row_travels(rank_pool: RankPool) -> None:
    rank_pool.run(no_row_travels, 2)


def test_counts_are_real_until_frozen(rank_pool: RankPool) -> None:
    assert rank_pool.run(counts_are_real_until_frozen, 2) == [[[0, 10], [1, 11]], [[5, 15], [6, 16]]]
