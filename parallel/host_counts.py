"""Counts on their way to the host, which needs some of them: split sizes are host integers.

Decides what the host waits for: for the counts, and for nothing that its device was given besides. On CUDA a plain
read would wait for all that the stream was given so far, then launch what follows onto an idle device. So the counts
come on a stream of their own:

    host      ... exchange   begin   launch copy of rows   read |       launch what follows
    compute   ... count | . . . . . . . copy of rows ........................... | what follows
    counts              | exchange | sum, copy to the host |

Memory. What the second stream reads was made on the stream of the caller, and what it makes is its own. All of it is
held until the host has waited for the second stream's last act, so nothing is handed out again while it is read.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch

from farskip.pending import Pending
from farskip.wait_meter import WaitMeter

Sizes = Callable[[torch.Tensor], torch.Tensor]
"""Received counts -> the numbers that the host needs."""


class CountsUnderWay(Protocol):
    """Counts that are on their way."""

    def read(self) -> tuple[torch.Tensor, Any]:
        """What was received, ready on the current stream, and the sizes as nested lists. The host waits for them."""
        ...


class HostCounts(Protocol):
    """Brings counts to the host."""

    def begin(self, received: Pending, sizes: Sizes) -> CountsUnderWay:
        """Start; do not wait. What `sizes` reads besides lies on the current stream, and was made by now."""
        ...


class CpuCounts:
    """Implements `HostCounts` where the host computes."""

    def begin(self, received: Pending, sizes: Sizes) -> CountsUnderWay:
        """See `HostCounts.begin`."""
        return _OnCpu(received, sizes)


class _OnCpu:
    def __init__(self, received: Pending, sizes: Sizes) -> None:
        self._received, self._sizes = received, sizes

    def read(self) -> tuple[torch.Tensor, Any]:
        received = self._received.wait()
        return received, self._sizes(received).tolist()


class CudaCounts:
    """Implements `HostCounts` by a stream of high priority.

    Args:
        device: a CUDA device.
        meter: told how long compute stood still for counts. What the stream of counts waits for holds no compute.
    """

    def __init__(self, device: torch.device, meter: WaitMeter) -> None:
        self._device, self._meter = device, meter
        self._stream = torch.cuda.Stream(device, priority=-1)
        meter.leave_out(self._stream)

    def begin(self, received: Pending, sizes: Sizes) -> CountsUnderWay:
        """See `HostCounts.begin`."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            on_device = sizes(received.wait())
            on_host = on_device.to("cpu", non_blocking=True)  # pinned memory, or the host would wait here
            arrived = self._stream.record_event()
        return _OnCuda(self._device, self._meter, received.unfilled, (sizes, on_device), on_host, arrived)


class _OnCuda:
    def __init__(
        self,
        device: torch.device,
        meter: WaitMeter,
        received: torch.Tensor,
        held: tuple[Any, ...],
        on_host: torch.Tensor,
        arrived: torch.cuda.Event,
    ) -> None:
        self._device, self._meter, self._received = device, meter, received
        self._held, self._on_host, self._arrived = held, on_host, arrived

    def read(self) -> tuple[torch.Tensor, Any]:
        here = torch.cuda.current_stream(self._device)
        self._meter.timed(lambda: here.wait_event(self._arrived), self._device)
        self._arrived.synchronize()
        self._held = ()
        return self._received, self._on_host.tolist()


def make_host_counts(device: torch.device, meter: WaitMeter) -> HostCounts:
    """What brings counts from a device to the host."""
    return CudaCounts(device, meter) if device.type == "cuda" else CpuCounts()
