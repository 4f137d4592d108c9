"""Autograd for things in flight: launch and wait as a pair, fan-out with a fixed order of sums, and stage marks.

Launch and wait. Forward: `launch` starts a collective, `wait` waits for it. Backward: the gradient of `wait` launches
the reverse collective and hands on a placeholder of the right shape, the gradient of `launch` waits for it and hands on
the real gradient. Autograd runs, of the nodes that are ready, the one created last, so what stood between launch and
wait in forward stands between them in backward too, in reverse.

Fan-out. Where a tensor has three or more uses, the order in which autograd sums their gradients is the order in which
the uses ran backwards, and that moves with the schedule. `fan_out` hands out one alias per use and sums the gradients
of the aliases in the order of the aliases, so serial and overlapped give equal bits. It is used in both.

Nothing here knows streams, process groups or models.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable

from farskip.pending import Pending


class Collective(Protocol):
    """An exchange between ranks that can be launched, and whose gradient is another one."""

    def launch(self, tensor: torch.Tensor) -> Pending:
        """Start the exchange of a contiguous tensor; all ranks of the group have to do it in the same order."""
        ...

    def reverse(self) -> "Collective":
        """The collective that carries the gradient of the output back to the input."""
        ...


Notify = Callable[[str, bool], "Ended"]
"""Called with (``launch`` or ``wait``, whether in backward) when one begins; returns what to call when it has ended."""

Ended = Callable[[], None]


class InFlight:
    """One launched collective: ties its two autograd nodes together, in both directions.

    Args:
        collective: what is launched.
        notify: told when a launch or a wait begins.
        keep: called after a wait, in either direction, with the result and what was sent: they may have been made in
            another lane than the one that has waited (`farskip.side_stream`).
    """

    __slots__ = ("_collective", "_keep", "_notify", "_pending")

    def __init__(
        self, collective: Collective, notify: Notify | None = None, keep: Callable[..., None] | None = None
    ) -> None:
        self._collective = collective
        self._notify = notify
        self._keep = keep
        self._pending: Pending | None = None

    def launch(self, tensor: torch.Tensor) -> torch.Tensor:
        """Start the collective. Returns a tensor of the result's shape whose content is undefined until `wait`."""
        return _Launch.apply(tensor, self)

    def wait(self, unfilled: torch.Tensor) -> torch.Tensor:
        """The result. `unfilled` is what `launch` returned; it must have no other use."""
        return _Wait.apply(unfilled, self)

    def _start(self, tensor: torch.Tensor, *, backward: bool) -> torch.Tensor:
        assert self._pending is None, "a collective was launched twice without a wait"
        ended = self._notify("launch", backward) if self._notify else None
        collective = self._collective.reverse() if backward else self._collective
        self._pending = collective.launch(tensor.contiguous())
        if ended:
            ended()
        return self._pending.unfilled

    def _finish(self, *, backward: bool) -> torch.Tensor:
        assert self._pending is not None, "a collective was waited for before it was launched"
        ended = self._notify("wait", backward) if self._notify else None
        pending, self._pending = self._pending, None
        tensors = pending.tensors if self._keep else ()
        result = pending.wait()
        if self._keep:
            self._keep(*tensors)
        if ended:
            ended()
        return result


class _Launch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, in_flight: InFlight) -> torch.Tensor:
        ctx.in_flight = in_flight
        return in_flight._start(tensor.detach(), backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, placeholder: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.in_flight._finish(backward=True), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, unfilled: torch.Tensor, in_flight: InFlight) -> torch.Tensor:
        ctx.in_flight = in_flight
        ctx.shape = unfilled.shape
        result = in_flight._finish(backward=False)
        return result.view_as(result)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.in_flight._start(gradient, backward=True)
        # What autograd hands on to `_Launch` is only a token: uneven splits give the real gradient another shape, and
        # NaN shows up at once should anybody ever read it.
        return gradient.new_full((), float("nan")).expand(ctx.shape), None


class _FanOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, num_uses: int) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for _ in range(num_uses))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, None]:
        total: torch.Tensor | None = None
        for gradient in gradients:
            if gradient is not None:
                total = gradient if total is None else total + gradient
        return total, None


def fan_out(tensor: torch.Tensor, num_uses: int) -> tuple[torch.Tensor, ...]:
    """One alias per use; in backward their gradients are summed in the order of the aliases.

    Args:
        tensor: any tensor that requires a gradient.
        num_uses: how many aliases; each may have at most two graph edges out of it, else the order inside an alias
            is autograd's own.
    """
    if num_uses < 2 or not (torch.is_grad_enabled() and tensor.requires_grad):
        return (tensor,) * num_uses
    return _FanOut.apply(tensor, num_uses)


class _Mark(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Callable[[], None], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.call = call
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        ctx.call()
        return (None, *gradients)


def mark_backward(call: Callable[[], None], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The same tensors; `call` is called when backward passes this point. Changes no bit of any gradient."""
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in tensors):
        return tensors
    return _Mark.apply(call, *tensors)
