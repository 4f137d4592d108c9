"""Shares of tokens and their way through gather and scatter, for all ranks of a group in one process."""

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from farskip.async_autograd import Collective
from farskip.parallel.collectives import AllGather
from farskip.parallel.tensor_parallel import TensorParallelRanks
from farskip.parallel.testing_links import FakeLink
from farskip.token_shards import TokenShards

WIDTH = 3
SHAPES = [(1, 1), (1, 2), (2, 3), (1, 7), (3, 5), (2, 8)]
GROUPS = list(itertools.product((1, 2, 3, 4), (1, 2, 3)))


@dataclass
class Ranks:
    """One of `size` ranks, without a link."""

    rank: int
    size: int
    chunks: int = 1
    sequence_parallel: bool = True
    gather: Collective = field(default_factory=lambda: AllGather(link=FakeLink()))

    def all_reduce(self, tensor: torch.Tensor) -> Any:
        raise AssertionError("there is none")


def group(size: int, chunks: int, shape: tuple[int, int]) -> list[TokenShards]:
    return [TokenShards(Ranks(rank, size, chunks), torch.Size((*shape, WIDTH))) for rank in range(size)]


def stream(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def gathered(shards: list[TokenShards], shares: list[torch.Tensor], *, chunked: bool) -> list[torch.Tensor]:
    """What an all-gather of each chunk brings; it wants equally many rows of every rank, and at least one."""
    of_ranks = [each.parts(share, chunked=chunked) for each, share in zip(shards, shares, strict=True)]
    for chunk in zip(*of_ranks, strict=True):
        assert len({rows.shape for rows in chunk}) == 1 and chunk[0].shape[0] > 0
    return [torch.cat(chunk) for chunk in zip(*of_ranks, strict=True)]


def scattered(shards: list[TokenShards], wholes: list[torch.Tensor], *, chunked: bool) -> list[torch.Tensor]:
    """What every rank has of the sums over the ranks, where only the first rank's term is not zero."""
    pieces = [whole.chunk(len(shards)) for whole in wholes]
    return [each.joined([chunk[rank] for chunk in pieces], chunked=chunked) for rank, each in enumerate(shards)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("size", "chunks"), GROUPS)
def test_shares_make_the_whole_and_the_whole_makes_the_shares(size: int, chunks: int, shape: tuple[int, int]) -> None:
    shards, x_BSD = group(size, chunks, shape), stream(shape)
    shares = [each.mine(x_BSD) for each in shards]
    assert [share.shape for share in shares] == [each.shape for each in shards]
    assert torch.equal(torch.cat(shares, 1).view(x_BSD.shape), x_BSD)
    lengths = [share.shape[1] for share in shares]
    assert max(lengths) - min(lengths) <= 1
    (rows,) = gathered(shards, shares, chunked=False)
    for each in shards:
        assert torch.equal(each.whole(rows), x_BSD)
        assert torch.equal(each.laid_out(each.whole(rows)), rows), "the padding is zeros again"
    back = scattered(shards, [shards[0].laid_out(x_BSD)], chunked=False)
    assert all(torch.equal(ours, share) for ours, share in zip(back, shares, strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("size", "chunks"), GROUPS)
def test_chunks_hold_every_row_once_and_padding_has_no_gradient(size: int, chunks: int, shape: tuple[int, int]) -> None:
    shards, x_BSD = group(size, chunks, shape), stream(shape)
    shares = [each.mine(x_BSD).requires_grad_() for each in shards]
    wholes = gathered(shards, shares, chunked=True)
    assert len(wholes) == chunks
    back = scattered(shards, [whole * 2.0 + 1.0 for whole in wholes], chunked=True)
    for ours, share in zip(back, shares, strict=True):
        assert torch.equal(ours, share * 2.0 + 1.0)
    sum(ours.square().sum() for ours in back).backward()  # type: ignore[union-attr]
    for share in shares:
        assert share.grad is not None and torch.equal(share.grad, 4.0 * (2.0 * share.detach() + 1.0))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_whole_sees_gradients_of_its_tokens_only(shape: tuple[int, int]) -> None:
    for size in (2, 3, 4):
        shards, x_BSD = group(size, 1, shape), stream(shape)
        (rows,) = gathered(shards, [each.mine(x_BSD) for each in shards], chunked=False)
        rows.requires_grad_()
        shards[0].whole(rows).backward(x_BSD)
        assert rows.grad is not None and torch.equal(rows.grad, shards[0].laid_out(x_BSD))
        y_BSD = x_BSD.clone().requires_grad_()
        shards[0].laid_out(y_BSD).backward(rows.detach())
        assert y_BSD.grad is not None and torch.equal(y_BSD.grad, x_BSD)


def test_a_stream_enters_and_leaves() -> None:
    """On one rank both ends are the identity, in both directions; what is gathered is waited for."""
    link = FakeLink()
    shards = TokenShards(TensorParallelRanks(link, sequence_parallel=True), torch.Size((2, 3, WIDTH)))
    x_BSD = stream((2, 3)).requires_grad_()
    share = shards.enter(x_BSD)
    assert share.shape == (1, 6, WIDTH) and link.num_exchanges == 0
    left = shards.leave(share)
    assert torch.equal(left, x_BSD) and link.num_exchanges == 1
    left.square().sum().backward()
    assert x_BSD.grad is not None and torch.equal(x_BSD.grad, 2.0 * x_BSD.detach())
    assert link.num_exchanges == 2, "the gradient is gathered where the stream enters, and only there"


def test_under_autocast_what_is_multiplied_travels_in_its_dtype() -> None:
    """Rounded once, in front of the wire as behind it; the stream itself is not."""
    (shards,) = group(1, 2, (1, 5))
    normed_1ND = shards.mine(stream((1, 5)).float()).requires_grad_()
    exact = shards.sent(normed_1ND, chunked=True)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = shards.sent(normed_1ND, chunked=True)
        assert all(rows.dtype == torch.float32 for rows in shards.parts(normed_1ND, chunked=True))
        assert all(rows.dtype == torch.float64 for rows in shards.sent(stream((1, 5)), chunked=True))
    assert [rows.dtype for rows in exact + rounded] == [torch.float32] * 2 + [torch.bfloat16] * 2
    assert all(torch.equal(ours, theirs.bfloat16()) for ours, theirs in zip(rounded, exact, strict=True))
    sum(rows.float().sum() for rows in rounded).backward()  # type: ignore[union-attr]
    assert normed_1ND.grad is not None and normed_1ND.grad.dtype == torch.float32


def test_no_chunk_is_refused() -> None:
    with pytest.raises(ValueError, match="chunks=0 is too small; use 1 for no chunks, or more"):
        TensorParallelRanks(FakeLink(), sequence_parallel=True, chunks=0)
