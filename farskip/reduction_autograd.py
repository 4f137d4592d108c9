"""Autograd of tensor parallelism: joins of the stream, taps on it, and the sum of gradients between them.

In forward the partial outputs of a sub-block are all-reduced and added to the stream, in backward the partial gradients
of its input. The two are no mirrors: the first joins the stream behind the sub-block, the second in front of it.

    join    made when the all-reduce of the outputs is launched: the next point of the stream, a buffer whose content is
            undefined until the all-reduce was waited for and `fill` has added. In backward: waits for the all-reduce of
            the gradients that came to the taps on its point, and adds it to the gradient of the stream behind it.
    tap     in front of each norm that reads a point. In backward it hands the gradient to the point's `GradientSum`,
            not to autograd; the last tap of a point launches the all-reduce.

A join is older than all that ran after the launch, so autograd runs that first: it is what the all-reduce hides under.

    sum_over_ranks    inside a sub-block, for what has to be known of all slices at once: waited for where it stands, in
                      both directions, and in no schedule.

The norm's input gradient is linear in the gradient behind it, so it is reduced in front of the norm, and whatever has
parameters between tap and partial output holds a part of their gradient, to be summed over the ranks.

Both all-reduces work in place: the last operation of a sub-block must not keep its output for backward, and a norm has
to make a new gradient. Products and norms of any kind do so.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from farskip.async_autograd import Notify
from farskip.pending import Pending
from farskip.stage import TensorParallel


class GradientSum:
    """The gradient at one point of the stream: from every tap on it, summed over taps, then over ranks.

    Args:
        ranks: who sums.
        num_taps: how many norms read the point.
        blocking: whether the all-reduce is waited for where it is launched.
        notify: told of launch and wait, both in backward.
    """

    def __init__(self, ranks: TensorParallel, num_taps: int, *, blocking: bool, notify: Notify | None) -> None:
        self._ranks = ranks
        self._num_taps = num_taps
        self._blocking = blocking
        self._notify = notify
        self._arrived: dict[int, torch.Tensor | None] = {}
        self._pending: Pending | None = None
        self._sum: torch.Tensor | None = None

    def arrive(self, tap: int, gradient: torch.Tensor | None) -> None:
        """Called by each tap once; the last one launches."""
        self._arrived[tap] = gradient
        if len(self._arrived) == self._num_taps:
            self._launch()
            if self._blocking:
                self._wait()

    def take(self) -> torch.Tensor | None:
        """The sum; None if no gradient came. A tap that autograd never reached counts as one without a gradient."""
        if self._arrived:
            self._launch()
        self._wait()
        total, self._sum = self._sum, None
        return total

    def _launch(self) -> None:
        partial: torch.Tensor | None = None
        for tap in sorted(self._arrived):
            gradient = self._arrived[tap]
            if gradient is not None:
                partial = gradient if partial is None else partial + gradient
        self._arrived = {}
        if partial is None:
            return
        ended = self._notify("launch", True) if self._notify else None
        self._pending = self._ranks.all_reduce(partial.contiguous())
        if ended:
            ended()

    def _wait(self) -> None:
        if self._pending is None:
            return
        ended = self._notify("wait", True) if self._notify else None
        pending, self._pending = self._pending, None
        self._sum = pending.wait()
        if ended:
            ended()


def tap(stream: torch.Tensor, gradients: GradientSum, number: int) -> torch.Tensor:
    """The same tensor; in backward its gradient goes to `gradients` as that of tap `number`."""
    if not (torch.is_grad_enabled() and stream.requires_grad):
        return stream
    return _Tap.apply(stream, gradients, number)


def enter(stream: torch.Tensor, gradients: GradientSum | None) -> torch.Tensor:
    """The same tensor; in backward the sum of `gradients` is added to its gradient."""
    if gradients is None or not (torch.is_grad_enabled() and stream.requires_grad):
        return stream
    return _Enter.apply(stream, gradients)


def join(stream: torch.Tensor, partial: torch.Tensor, gradients: GradientSum | None) -> torch.Tensor:
    """The next point of the stream, its content undefined until `fill`.

    Args:
        stream: the point before; may be undefined still.
        partial: this rank's part of what is added.
        gradients: of the new point; None if no norm reads it.
    """
    return _Join.apply(stream, partial, gradients)


@torch.no_grad()
def fill(joined: torch.Tensor, stream: torch.Tensor, summed: torch.Tensor) -> None:
    """Give a join its content: stream + summed."""
    torch.add(stream.detach(), summed, out=joined.detach())


def sum_over_ranks(term: torch.Tensor, ranks: TensorParallel) -> torch.Tensor:
    """The sum of a tensor over the ranks, and in backward the sum of its gradient: every rank goes on from the sum with
    its own slices, so what comes back on each rank is a term of the gradient.

    Args:
        term: this rank's; has to need a gradient on all ranks or on none.
        ranks: who sums. Over a group of its own, or it waits behind what is in flight.
    """
    return _SumOverRanks.apply(term, ranks)


def _added(gradient: torch.Tensor | None, gradients: GradientSum | None) -> torch.Tensor | None:
    """The gradient of the stream behind a point plus that of its readers, in this order."""
    from_readers = gradients.take() if gradients is not None else None
    if gradient is None or from_readers is None:
        return from_readers if gradient is None else gradient
    return gradient + from_readers


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stream: torch.Tensor, gradients: GradientSum, number: int) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.gradients, ctx.number = gradients, number
        return stream.view_as(stream)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor | None) -> tuple[None, None, None]:
        ctx.gradients.arrive(ctx.number, gradient)
        return None, None, None


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stream: torch.Tensor, gradients: GradientSum) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.gradients = gradients
        return stream.view_as(stream)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor | None) -> tuple[torch.Tensor | None, None]:
        return _added(gradient, ctx.gradients), None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stream: torch.Tensor, partial: torch.Tensor, gradients: GradientSum | None) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.gradients = gradients
        return torch.empty_like(stream)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        total = _added(gradient, ctx.gradients)
        return total, total, None


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, term: torch.Tensor, ranks: TensorParallel) -> torch.Tensor:
        ctx.ranks = ranks
        return ranks.all_reduce(term.clone(memory_format=torch.contiguous_format)).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.ranks.all_reduce(gradient.clone(memory_format=torch.contiguous_format)).wait(), None
