"""Asynchronous exchanges between the ranks of a group. Each launch returns a `Pending`.

`Link` is the wire: what starts an exchange of bytes between ranks. The real one is torch.distributed; the emulated one
(`farskip.parallel.emulated_link`) is the real one slowed down to a given bandwidth and latency, and tests bring links
that delay and poison.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
import torch.distributed as dist

from farskip.pending import Pending, Work
from farskip.wait_meter import WaitMeter


class Link(Protocol):
    """Starts exchanges between the ranks of one group.

    Attributes:
        meter: sums how long compute stood still for exchanges of this link.
    """

    rank: int
    size: int
    meter: WaitMeter

    def all_to_all(
        self,
        output: torch.Tensor,
        tensor: torch.Tensor,
        output_splits: Sequence[int],
        input_splits: Sequence[int],
    ) -> Work:
        """Start sending ``input_splits[r]`` rows of `tensor` to every rank r and receiving `output`; do not wait."""
        ...

    def all_reduce(self, tensor: torch.Tensor) -> Work:
        """Start summing a contiguous tensor over the ranks, in place; do not wait."""
        ...

    def all_gather(self, output: torch.Tensor, tensor: torch.Tensor) -> Work:
        """Start bringing the contiguous rows `tensor` [N, ...] of every rank to all, in `output` [size * N, ...]."""
        ...

    def reduce_scatter(self, output: torch.Tensor, tensor: torch.Tensor) -> Work:
        """Start summing `tensor` [size * N, ...] over the ranks; rank r gets rows r*N .. of the sum, in `output`.

        The order of the terms is fixed by the ranks.
        """
        ...

    def exchange_counts(self, counts: torch.Tensor) -> Pending:
        """Start sending row r of an int64 tensor [size, n] to rank r; the result is what came from each rank."""
        ...


# torch 2.13 renamed both and warns of the old names.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class ProcessGroupLink:
    """The link of a torch.distributed process group (gloo or NCCL).

    gloo carries a reduce-scatter as a whole all-reduce, twice the bytes. Under gloo terms are therefore exchanged, and
    each rank sums its own, in the order of the ranks, when they are waited for.

    Args:
        group: the process group; the default group if None.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.meter = WaitMeter()
        self._sums_terms = dist.get_backend(group) == "gloo"

    def all_to_all(
        self,
        output: torch.Tensor,
        tensor: torch.Tensor,
        output_splits: Sequence[int],
        input_splits: Sequence[int],
    ) -> Work:
        """See `Link.all_to_all`."""
        return self._carry(output, tensor, output_splits, input_splits)

    def _carry(
        self,
        output: torch.Tensor,
        tensor: torch.Tensor,
        output_splits: Sequence[int],
        input_splits: Sequence[int],
    ) -> Work:
        return dist.all_to_all_single(
            output, tensor, list(output_splits), list(input_splits), group=self._group, async_op=True
        )

    def all_reduce(self, tensor: torch.Tensor) -> Work:
        """See `Link.all_reduce`."""
        return dist.all_reduce(tensor, group=self._group, async_op=True)

    def over(self, group: dist.ProcessGroup) -> "ProcessGroupLink":
        """A link of this kind over another group; one meter counts the waits for both."""
        other = self._same_kind(group)
        other.meter = self.meter
        return other

    def _same_kind(self, group: dist.ProcessGroup) -> "ProcessGroupLink":
        return type(self)(group)

    def all_gather(self, output: torch.Tensor, tensor: torch.Tensor) -> Work:
        """See `Link.all_gather`."""
        return _all_gather(output, tensor, group=self._group, async_op=True)

    def reduce_scatter(self, output: torch.Tensor, tensor: torch.Tensor) -> Work:
        """See `Link.reduce_scatter`."""
        if not self._sums_terms:
            return _reduce_scatter(output, tensor, group=self._group, async_op=True)
        terms, rows = torch.empty_like(tensor), (output.shape[0],) * self.size
        return _SumOfTerms(self._carry(terms, tensor, rows, rows), terms.view(self.size, *output.shape), output)

    def exchange_counts(self, counts: torch.Tensor) -> Pending:
        """See `Link.exchange_counts`."""
        received, one_row = torch.empty_like(counts), (1,) * self.size
        work = self.all_to_all(received, counts, one_row, one_row)
        return Pending(received, work, keep=(counts,), meter=self.meter)


class _SumOfTerms:
    """Terms on their way, [size, ...]; waiting for them sums them into `output`."""

    def __init__(self, work: Work, terms: torch.Tensor, output: torch.Tensor) -> None:
        self._work, self._terms, self._output = work, terms, output

    @torch.no_grad()
    def wait(self) -> object:
        self._work.wait()
        first, *others = self._terms
        self._output.copy_(first)
        for term in others:
            self._output += term
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class AllToAll:
    """Rows to other ranks, with uneven splits; its gradient is the same exchange the other way round.

    Attributes:
        link: the wire.
        input_splits: rows that this rank sends to each rank of the group.
        output_splits: rows that it receives from each.
    """

    link: Link
    input_splits: tuple[int, ...]
    output_splits: tuple[int, ...]

    def launch(self, tensor: torch.Tensor) -> Pending:
        """Start the exchange.

        Args:
            tensor: contiguous [sum(input_splits), ...].

        Returns:
            Pending [sum(output_splits), ...] of the same dtype; keeps `tensor` alive until it is waited for.
        """
        output = tensor.new_empty((sum(self.output_splits), *tensor.shape[1:]))
        work = self.link.all_to_all(output, tensor, self.output_splits, self.input_splits)
        return Pending(output, work, keep=(tensor,), meter=self.link.meter)

    def reverse(self) -> Self:
        """The exchange that carries rows, or their gradients, back."""
        return type(self)(link=self.link, input_splits=self.output_splits, output_splits=self.input_splits)


@dataclass(frozen=True, kw_only=True, slots=True)
class AllGather:
    """The rows of all ranks to every rank; its gradient is the reduce-scatter.

    Attributes:
        link: the wire.
    """

    link: Link

    def launch(self, tensor: torch.Tensor) -> Pending:
        """Start it: contiguous [N, ...], the same N on all ranks; pending [size * N, ...]. Keeps `tensor` alive."""
        output = tensor.new_empty((self.link.size * tensor.shape[0], *tensor.shape[1:]))
        return Pending(output, self.link.all_gather(output, tensor), keep=(tensor,), meter=self.link.meter)

    def reverse(self) -> "ReduceScatter":
        """What carries gradients back to the ranks that the rows came from, and sums them."""
        return ReduceScatter(link=self.link)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReduceScatter:
    """The sum over the ranks, each rank its own rows of it; its gradient is the all-gather.

    Attributes:
        link: the wire.
    """

    link: Link

    def launch(self, tensor: torch.Tensor) -> Pending:
        """Start it: contiguous [size * N, ...]; pending [N, ...]. Keeps `tensor` alive."""
        output = tensor.new_empty((tensor.shape[0] // self.link.size, *tensor.shape[1:]))
        return Pending(output, self.link.reduce_scatter(output, tensor), keep=(tensor,), meter=self.link.meter)

    def reverse(self) -> AllGather:
        """What brings the gradient of every rank's rows to all ranks."""
        return AllGather(link=self.link)
