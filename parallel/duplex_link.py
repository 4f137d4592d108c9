"""gloo's all-to-all, both directions at once.

gloo carries an all-to-all of two ranks often one direction after the other, whenever the ranks do not begin at the same
moment: it then takes twice as long as the link needs. Here rows to higher ranks and rows to lower ones are two
all-to-alls in process groups of their own, so each direction has connections to itself.

Measured by benchmarks/gloo_exchange.py; its figures are in benchmarks/results/gloo_exchange.json.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from farskip.parallel.collectives import ProcessGroupLink
from farskip.parallel.mesh import timeout_of
from farskip.pending import Work


def real_link(group: dist.ProcessGroup) -> ProcessGroupLink:
    """The link of a process group: a `DuplexGlooLink` under gloo. Then making it is a collective of the group."""
    return DuplexGlooLink(group) if dist.get_backend(group) == "gloo" else ProcessGroupLink(group)


class DuplexGlooLink(ProcessGroupLink):
    """The link of a gloo process group. Making one is a collective of the group.

    Args:
        group: the process group; the default group if None.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        super().__init__(group)
        ranks, timeout = dist.get_process_group_ranks(group), timeout_of(group)
        self._up, self._down = (
            dist.new_group(ranks, backend="gloo", timeout=timeout, use_local_synchronization=True) for _ in range(2)
        )

    def _same_kind(self, group: dist.ProcessGroup) -> ProcessGroupLink:
        """A plain one: groups beside the first carry no all-to-all."""
        return ProcessGroupLink(group)

    def _carry(
        self,
        output: torch.Tensor,
        tensor: torch.Tensor,
        output_splits: Sequence[int],
        input_splits: Sequence[int],
    ) -> Work:
        here = self.rank
        sent = tensor.split([sum(input_splits[:here]), input_splits[here], sum(input_splits[here + 1 :])])
        received = output.split([sum(output_splits[:here]), output_splits[here], sum(output_splits[here + 1 :])])
        higher, lower = [0] * (here + 1), [0] * (self.size - here)
        directions = (
            (self._up, received[0], sent[2], [*output_splits[:here], *lower], [*higher, *input_splits[here + 1 :]]),
            (self._down, received[2], sent[0], [*higher, *output_splits[here + 1 :]], [*input_splits[:here], *lower]),
        )
        works = [
            dist.all_to_all_single(into, out_of, output_sizes, input_sizes, group=group, async_op=True)
            for group, into, out_of, output_sizes, input_sizes in directions
        ]
        received[1].copy_(sent[1])
        return _Both(works)


class _Both:
    """Done when all of them are."""

    def __init__(self, works: Sequence[Work]) -> None:
        self._works = works

    def wait(self) -> object:
        for work in self._works:
            work.wait()
        return None
