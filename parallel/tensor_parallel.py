"""Tensor parallelism between ranks: the collectives that the executor launches, and what happened to each parameter.

Column-parallel projections hold a slice of their outputs, row-parallel ones a slice of their inputs; every rank of the
``tp`` axis is given the same tokens and adds one term to each sub-block's output. So of a model's parameters on a rank

    sharded     are slices: their gradients are whole
    partial     are replicated, but see only this rank's slice or share of tokens, as norms do under sequence
                parallelism: their gradients are terms of a sum over ``tp``
    the rest    (embeddings, final norm, head) are replicated and do the same work everywhere: equal, whole gradients
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Self

import torch
import torch.distributed as dist

from farskip.async_autograd import Collective
from farskip.parallel.collectives import AllGather, Link
from farskip.pending import Pending


class TensorParallelRanks:
    """Implements `farskip.stage.TensorParallel` over a link.

    Args:
        link: the ranks of the ``tp`` axis.
        sequence_parallel: see there.
        chunks: see there.

    Raises:
        ValueError: no chunk.
    """

    def __init__(self, link: Link, *, sequence_parallel: bool = False, chunks: int = 1) -> None:
        if chunks < 1:
            raise ValueError(f"chunks={chunks} is too small; use 1 for no chunks, or more")
        self.link = link
        self.rank = link.rank
        self.size = link.size
        self.sequence_parallel = sequence_parallel
        self.chunks = chunks
        self.gather: Collective = AllGather(link=link)

    def all_reduce(self, tensor: torch.Tensor) -> Pending:
        """See `TensorParallel.all_reduce`."""
        return Pending(tensor, self.link.all_reduce(tensor), meter=self.link.meter)


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorLayout:
    """How the parameters of a model lie on the ranks of ``tp``, by name; what is in neither is replicated and whole.

    Attributes:
        sharded: the dimension along which a parameter is cut.
        partial: replicated parameters whose gradients are terms of a sum over ``tp``.
    """

    sharded: Mapping[str, int] = field(default_factory=dict)
    partial: frozenset[str] = frozenset()

    def without(self, names: Collection[str]) -> Self:
        """The layout without parameters that lie otherwise, as experts on ``ep`` do."""
        return replace(self, partial=self.partial - frozenset(names))


def slice_of(tensor: torch.Tensor, dim: int, rank: int, size: int) -> torch.Tensor:
    """A copy of this rank's slice."""
    return tensor.chunk(size, dim)[rank].clone()


def gather_slices(tensor: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    """The whole tensor from the slices of all ranks. A collective."""
    local = tensor.contiguous()
    slices = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(slices, local, group=group)
    return torch.cat(slices, dim)
