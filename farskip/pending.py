"""`Pending`: the only thing an asynchronous call returns, and the only place where this project waits.

The buffer of a collective exists from the moment it is launched, because autograd needs a tensor of the right shape to
build its graph on; what is in it is undefined until `wait` returns. Nobody outside this file and
`farskip.async_autograd` may touch `Pending.unfilled`.
"""

from typing import Protocol

import torch

from farskip.wait_meter import WaitMeter


class Work(Protocol):
    """A collective under way: what torch.distributed returns for ``async_op=True``, or a stand-in."""

    def wait(self) -> object:
        """Block the host (gloo) or the current stream (NCCL) until the result may be read."""
        ...


class Pending:
    """The result of a collective that may still be in flight.

    Args:
        unfilled: the buffer that the collective writes into.
        work: handle to wait on; None when the result is already there.
        keep: tensors that the transfer reads and that have to outlive it.
        meter: told how long `wait` kept compute standing still.
    """

    __slots__ = ("_keep", "_meter", "_work", "unfilled")

    def __init__(
        self,
        unfilled: torch.Tensor,
        work: Work | None,
        *,
        keep: tuple[torch.Tensor, ...] = (),
        meter: WaitMeter | None = None,
    ) -> None:
        self.unfilled = unfilled
        self._work = work
        self._keep = keep
        self._meter = meter

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that the transfer reads and writes, until it has been waited for."""
        return (self.unfilled, *self._keep)

    def wait(self) -> torch.Tensor:
        """The result, ready to be read on the current stream.

        Note: blocks the host under gloo; under NCCL it makes the current stream wait and returns at once. May be
        called again; only the first call waits.
        """
        if self._work is not None:
            if self._meter is None:
                self._work.wait()
            else:
                self._meter.timed(self._work.wait, self.unfilled.device)
            self._work = None
            self._keep = ()
        return self.unfilled
