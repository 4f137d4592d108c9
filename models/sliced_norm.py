"""An RMSNorm over all heads of a query or key, on a rank that has a slice of the heads: mean squares over the ranks.

    y = w * x / sqrt(sum over ranks (sum of x_BSH ** 2) / H of all ranks + eps)

One number per token is summed over the ranks, in forward and in backward, and waited for at once: nothing of the
attention can go on without it. These all-reduces have a process group of their own, so that they do not queue behind
those that the schedule has in flight.

Legend: B batch, S sequence, H features of this rank's heads.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from farskip.parallel.tensor_parallel import TensorParallelRanks
from farskip.reduction_autograd import sum_over_ranks


class SlicedRMSNorm(nn.Module):
    """What an RMSNorm of transformers with ``weight`` and ``variance_epsilon`` becomes; rounds where that one does."""

    weight: nn.Parameter
    variance_epsilon: float
    _sum: Callable[[torch.Tensor], torch.Tensor]
    _width: int

    def forward(self, x_BSH: torch.Tensor) -> torch.Tensor:
        """This rank's slice of the normed features; the same dtypes as the whole norm gives."""
        x32_BSH = x_BSH.to(torch.float32)
        squares_BS1 = self._sum(x32_BSH.pow(2).sum(-1, keepdim=True))
        normed_BSH = x32_BSH * torch.rsqrt(squares_BS1 / self._width + self.variance_epsilon)
        return self.weight * normed_BSH.to(x_BSH.dtype)


def spread_norms(norms: Iterable[nn.Module], ranks: TensorParallelRanks) -> None:
    """Have norms whose weights are this rank's slices norm over the slices of all ranks, in place.

    Args:
        norms: RMSNorms of transformers.
        ranks: who holds the slices; over a group that carries nothing else.
    """
    # A compiled attention breaks its graph here, as at the seam.
    summed = torch.compiler.disable(partial(sum_over_ranks, ranks=ranks), reason="a collective between ranks")
    norm: Any
    for norm in norms:
        assert hasattr(norm, "variance_epsilon"), f"{type(norm).__name__} is no RMSNorm of the kind that can be sliced"
        norm.__class__ = SlicedRMSNorm
        norm._sum, norm._width = summed, norm.weight.shape[0] * ranks.size
