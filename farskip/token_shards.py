"""Which tokens of a batch lie on which rank under sequence parallelism, and how rows are laid out on their way.

The sequences of a batch are laid end to end, T tokens; rank r of W holds tokens T*r/W .. T*(r+1)/W - 1, rounded down.
Shares differ by at most one token. Collectives want equally many rows of every rank, so shorter shares travel with a
row of zeros, which is cut off where rows come back to their rank; where all tokens are together, attention sees none of
these rows, and MLP and shared expert, which work row by row, compute them for nothing.

The ends of the model stand outside the schedule. `enter` takes the rank's share of a stream that all ranks hold; its
gradient is gathered from all. `leave` gathers; its gradient is the rank's share of a gradient that all ranks hold.
Either blocks.

Legend: B batch, S sequence, D hidden, T = B*S tokens, W ranks, N tokens of this rank, M rows of a collective per rank.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from farskip.rows import even_sizes, product_dtype
from farskip.stage import TensorParallel


class TokenShards:
    """The shares of one batch.

    Args:
        ranks: who shares.
        shape_BSD: of the whole stream.
    """

    def __init__(self, ranks: TensorParallel, shape_BSD: torch.Size) -> None:
        total, size = shape_BSD[:-1].numel(), ranks.size
        self.collective = ranks.gather
        self.chunks = ranks.chunks
        self._shape_BSD = shape_BSD
        self._starts = [total * rank // size for rank in range(size + 1)]
        self._sizes = [stop - start for start, stop in zip(self._starts, self._starts[1:], strict=False)]
        self._rank = ranks.rank

    @property
    def shape(self) -> tuple[int, int, int]:
        """(1, N, D), of the stream on this rank."""
        return (1, self._sizes[self._rank], self._shape_BSD[-1])

    def enter(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """This rank's share [1, N, D] of a stream that all ranks hold."""
        return _Enter.apply(x_BSD, self)

    def leave(self, x_1ND: torch.Tensor) -> torch.Tensor:
        """The whole stream [B, S, D]. A collective, also in the backward pass of `enter`."""
        return _Leave.apply(x_1ND, self)

    def sent(self, normed_1ND: torch.Tensor, *, chunked: bool) -> list[torch.Tensor]:
        """The `parts` of what is multiplied where it arrives. Under autocast it would be rounded to its dtype there; it
        is before, and travels in half the bytes."""
        return self.parts(normed_1ND.to(product_dtype(normed_1ND)), chunked=chunked)

    def parts(self, x_1ND: torch.Tensor, *, chunked: bool) -> list[torch.Tensor]:
        """The rank's rows as its collectives take them: [M, D] for each chunk."""
        rows_ND = x_1ND.reshape(-1, self._shape_BSD[-1])
        sizes, widths = self._part_sizes(self._sizes[self._rank], chunked), self._widths(chunked)
        return [_padded(part, width) for part, width in zip(rows_ND.split(sizes), widths, strict=True)]

    def joined(self, parts: Sequence[torch.Tensor], *, chunked: bool) -> torch.Tensor:
        """The inverse of `parts`: [1, N, D]."""
        sizes = self._part_sizes(self._sizes[self._rank], chunked)
        rows = [part_MD[:size] for part_MD, size in zip(parts, sizes, strict=True)]
        return (rows[0] if len(rows) == 1 else torch.cat(rows)).view(self.shape)

    def whole(self, rows_RD: torch.Tensor) -> torch.Tensor:
        """All tokens [B, S, D] from what the collective brought of every rank [W * M, D]."""
        (width,) = self._widths(chunked=False)
        if min(self._sizes) < width:
            pieces = rows_RD.split([each for size in self._sizes for each in (size, width - size)])
            rows_RD = torch.cat(pieces[::2])
        return rows_RD.view(self._shape_BSD)

    def laid_out(self, output_BSD: torch.Tensor) -> torch.Tensor:
        """The inverse of `whole`."""
        rows_TD = output_BSD.reshape(-1, self._shape_BSD[-1])
        (width,) = self._widths(chunked=False)
        if min(self._sizes) == width:
            return rows_TD
        return torch.cat([_padded(share, width) for share in rows_TD.split(self._sizes)])

    def mine(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """A copy of the rank's share."""
        rows_TD = x_BSD.reshape(-1, self._shape_BSD[-1])
        return rows_TD[self._starts[self._rank] : self._starts[self._rank + 1]].clone().view(self.shape)

    def gathered(self, x_1ND: torch.Tensor) -> torch.Tensor:
        """The shares of all ranks. A collective; blocks."""
        (rows_MD,) = self.parts(x_1ND, chunked=False)
        return self.whole(self.collective.launch(rows_MD.contiguous()).wait())

    def _part_sizes(self, total: int, chunked: bool) -> list[int]:
        return even_sizes(total, self.chunks if chunked else 1)

    def _widths(self, chunked: bool) -> list[int]:
        """M of every chunk: the largest of all ranks, and never nothing, which not every backend carries."""
        return [max(size, 1) for size in self._part_sizes(max(self._sizes), chunked)]


def _padded(rows_ND: torch.Tensor, width: int) -> torch.Tensor:
    return rows_ND if rows_ND.shape[0] == width else pad(rows_ND, (0, 0, 0, width - rows_ND.shape[0]))


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BSD: torch.Tensor, shards: TokenShards) -> torch.Tensor:
        ctx.shards = shards
        return shards.mine(x_BSD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_1ND: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.shards.gathered(gradient_1ND), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_1ND: torch.Tensor, shards: TokenShards) -> torch.Tensor:
        ctx.shards = shards
        return shards.gathered(x_1ND)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BSD: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.shards.mine(gradient_BSD), None
