"""Links for tests that make races visible: what was not waited for is NaN, what was not kept alive is lost.

`FakeLink` is one rank that exchanges with itself, in one process and without torch.distributed, so that a model on one
rank runs through dispatch, combine and both directions of autograd. `LateLink` is the real group, held back.

Both deliver as late or as early as they are told to, and read what is sent only when they deliver it.
"""

import random
import weakref
from collections.abc import Callable, Sequence

import torch

from farskip.parallel.collectives import ProcessGroupLink
from farskip.pending import Pending, Work
from farskip.wait_meter import WaitMeter

Delay = Callable[[], int]
"""After how many further calls of the link an exchange is delivered; waiting delivers it at once."""


def at_wait() -> int:
    """The slowest link: nothing arrives before it is waited for."""
    return 1 << 30


def random_delay(seed: int, longest: int = 4) -> Delay:
    """Between 0 and `longest` further calls."""
    draw = random.Random(seed)
    return lambda: draw.randint(0, longest)


def poison(tensor: torch.Tensor) -> None:
    """Fill with NaN; integers with their lowest value."""
    tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min)


class FakeLink:
    """One rank that sends to itself, through a wire that keeps nothing alive.

    Args:
        delay: when an exchange arrives.

    Attributes:
        lost: how many exchanges found that what they should send, or where it should arrive, was gone: nobody kept it
            alive.
        in_flight: exchanges that were launched and not delivered, oldest first.
        num_exchanges: how many were launched.
    """

    rank = 0
    size = 1

    def __init__(self, delay: Delay = at_wait) -> None:
        self.meter = WaitMeter()
        self.lost = 0
        self.num_exchanges = 0
        self.in_flight: list[_Exchange] = []
        self._delay = delay

    def all_to_all(
        self,
        output: torch.Tensor,
        tensor: torch.Tensor,
        output_splits: Sequence[int],
        input_splits: Sequence[int],
    ) -> Work:
        """See `Link.all_to_all`."""
        assert tuple(output_splits) == tuple(input_splits) == (tensor.shape[0],)
        assert output.shape == tensor.shape and tensor.is_contiguous()
        poison(output)
        self.tick()
        self.num_exchanges += 1
        self.in_flight.append(_Exchange(self, output, weakref.ref(tensor), self._delay()))
        return self.in_flight[-1]

    def all_reduce(self, tensor: torch.Tensor) -> Work:
        """See `Link.all_reduce`: the sum over one rank, late."""
        assert tensor.is_contiguous()
        sent = tensor.clone()
        poison(tensor)
        self.tick()
        self.num_exchanges += 1
        self.in_flight.append(_Exchange(self, tensor, lambda: sent, self._delay()))
        return self.in_flight[-1]

    def all_gather(self, output: torch.Tensor, tensor: torch.Tensor) -> Work:
        """See `Link.all_gather`: the rows of one rank."""
        return self.all_to_all(output, tensor, (tensor.shape[0],), (tensor.shape[0],))

    def reduce_scatter(self, output: torch.Tensor, tensor: torch.Tensor) -> Work:
        """See `Link.reduce_scatter`: the sum over one rank."""
        return self.all_to_all(output, tensor, (tensor.shape[0],), (tensor.shape[0],))

    def exchange_counts(self, counts: torch.Tensor) -> Pending:
        """See `Link.exchange_counts`."""
        received = torch.empty_like(counts)
        poison(received)
        self.tick()
        self.in_flight.append(_Exchange(self, received, weakref.ref(counts), self._delay()))
        return Pending(received, self.in_flight[-1], keep=(counts,))

    def tick(self) -> None:
        """Time passes: deliver what is due, in order."""
        for exchange in list(self.in_flight):
            exchange.ticks_left -= 1
            if exchange.ticks_left < 0:
                exchange.deliver()


class _Exchange:
    def __init__(
        self, link: FakeLink, output: torch.Tensor, sent: Callable[[], torch.Tensor | None], ticks_left: int
    ) -> None:
        self._link = link
        self._output = weakref.ref(output)
        self._sent = sent
        self.ticks_left = ticks_left

    def deliver(self) -> None:
        self._link.in_flight.remove(self)
        sent, output = self._sent(), self._output()
        if sent is None or output is None:
            self._link.lost += 1
        else:
            output.copy_(sent)

    def wait(self) -> object:
        if self in self._link.in_flight:
            self.deliver()
        self._link.tick()
        return None


class LateLink(ProcessGroupLink):
    """The real exchange, whose result only arrives when it is waited for; until then the buffer is NaN."""

    def all_to_all(
        self,
        output: torch.Tensor,
        tensor: torch.Tensor,
        output_splits: Sequence[int],
        input_splits: Sequence[int],
    ) -> Work:
        """See `Link.all_to_all`."""
        arrived = torch.empty_like(output)
        poison(output)
        return _Late(super().all_to_all(arrived, tensor, output_splits, input_splits), output, arrived)

    def all_reduce(self, tensor: torch.Tensor) -> Work:
        """See `Link.all_reduce`."""
        arrived = tensor.clone()
        poison(tensor)
        return _Late(super().all_reduce(arrived), tensor, arrived)

    def all_gather(self, output: torch.Tensor, tensor: torch.Tensor) -> Work:
        """See `Link.all_gather`."""
        arrived = torch.empty_like(output)
        poison(output)
        return _Late(super().all_gather(arrived, tensor), output, arrived)

    def reduce_scatter(self, output: torch.Tensor, tensor: torch.Tensor) -> Work:
        """See `Link.reduce_scatter`."""
        arrived = torch.empty_like(output)
        poison(output)
        return _Late(super().reduce_scatter(arrived, tensor), output, arrived)


class _Late:
    def __init__(self, work: Work, output: torch.Tensor, arrived: torch.Tensor) -> None:
        self._work = work
        self._output = output
        self._arrived = arrived

    def wait(self) -> object:
        self._work.wait()
        self._output.copy_(self._arrived)
        return None
