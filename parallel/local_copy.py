"""A link that carries nothing: every exchange is a copy of rows that stay on this rank, of the right shape.

It bounds what overlap can gain: a model over it does the same compute on the same number of rows, and nothing is ever
in flight. What it computes is wrong by construction, because no row comes from another rank; it is for timing only.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from farskip.parallel.collectives import ProcessGroupLink
from farskip.pending import Pending, Work


class LocalCopyLink(ProcessGroupLink):
    """Exchanges counts for real until `freeze`, then repeats them; never sends a row.

    Args:
        group: the ranks that would exchange; the default group if None.

    Attributes:
        num_bytes: copied so far instead of being sent.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        super().__init__(group)
        self.num_bytes = 0
        self._recorded: list[torch.Tensor] = []
        self._next: int | None = None

    def freeze(self) -> None:
        """Repeat the counts seen so far, in a circle: they are those of one whole pass, and every pass is like it."""
        if not self._recorded:
            raise RuntimeError("local copy: no counts were exchanged yet; run one pass before freeze")
        self._next = 0

    def all_to_all(
        self,
        output: torch.Tensor,
        tensor: torch.Tensor,
        output_splits: Sequence[int],
        input_splits: Sequence[int],
    ) -> Work:
        """Fill `output` with the rows of `tensor`, from the start again where it needs more of them."""
        filled = 0
        while filled < output.shape[0] and tensor.shape[0]:
            rows = min(tensor.shape[0], output.shape[0] - filled)
            output[filled : filled + rows].copy_(tensor[:rows])
            filled += rows
        output[filled:].zero_()
        self.num_bytes += output.nbytes
        return _Done()

    def all_reduce(self, tensor: torch.Tensor) -> Work:
        """Leave the tensor as it is."""
        self.num_bytes += tensor.nbytes
        return _Done()

    def all_gather(self, output: torch.Tensor, tensor: torch.Tensor) -> Work:
        """Take this rank's rows for those of all."""
        output.view(self.size, *tensor.shape).copy_(tensor.expand(self.size, *tensor.shape))
        self.num_bytes += output.nbytes
        return _Done()

    def reduce_scatter(self, output: torch.Tensor, tensor: torch.Tensor) -> Work:
        """Take this rank's term for the sum."""
        output.copy_(tensor.view(self.size, *output.shape)[self.rank])
        self.num_bytes += tensor.nbytes
        return _Done()

    def exchange_counts(self, counts: torch.Tensor) -> Pending:
        """See `Link.exchange_counts`; a real exchange before `freeze`, none after it."""
        if self._next is None:
            received, one_row = torch.empty_like(counts), (1,) * self.size
            super().all_to_all(received, counts, one_row, one_row).wait()
            self._recorded.append(received)
            return Pending(self._recorded[-1].clone(), None)
        received = self._recorded[self._next % len(self._recorded)]
        self._next += 1
        if received.shape != counts.shape:
            raise RuntimeError(f"local copy: counts of shape {tuple(counts.shape)}, recorded {tuple(received.shape)}")
        return Pending(received.clone(), None)


class _Done:
    def wait(self) -> object:
        return None
