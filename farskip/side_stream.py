"""The side lane on a device: a CUDA stream of high priority, and what lets values cross between it and compute.

A lane is a stream. The executor issues every instruction in one of two, by the list (`farskip.lanes`). Nothing is
ordered between streams but by an event, and memory that is freed may be handed out again at once to the stream that it
was allocated on. So where a value made in one lane is read in the other

    read    the reading stream waits for an event recorded when the value was made: for its maker, not for what the
            maker's lane was given since. A router beside attention waits for the norm that formed its stream, not
            for the projections behind it.
    keep    its memory is marked as used by the reading stream too (`record_stream`). The mark holds until the memory is
            freed, so it also serves what autograd saves and frees in backward while a kernel still reads it.

What crosses, and who looks after it:

    values of the stream         terms, sums and normed inputs: `Residual` marks each where it is formed and reads it
                                 where it is taken, also what one lane forms while the other needs it (x' in the router,
                                 its norm for the shared expert)
    rows that travelled          allocated where they were launched, read where they are waited for: kept at the wait.
                                 So is what was sent: the lane that waits knows when the transfer is over, the lane
                                 that owns the memory does not
    plans, routing               whoever waits for rows goes behind the lane that launched them, hence behind their
                                 plan; kept by experts and merge
    parameters, biases           written before the pass, on the stream that it begins on; every stage of the side lane
                                 reads something that was made there since
    what a routing hook keeps    is made in the router's lane. Leaving a segment takes the last merge, so the stream
                                 that the pass began on is behind the side lane when the hook's owner reads it; its
                                 memory goes back to the side lane, whose next pass begins behind that stream

Backward. Autograd runs the gradient of an op on the stream of the op. Between two nodes on different streams it makes
the later one's wait and marks the gradient as used there; at the end the stream that called it waits for all that wrote
gradients of parameters. What it cannot know is in our own functions (`farskip.async_autograd`). The gradient of a wait
launches the reverse exchange, in the lane where forward waited; the gradient of a launch waits for it, in the lane
where forward launched. The placeholder between them orders the two lanes as any gradient does; the buffer, allocated in
one and returned in the other, and what was sent are kept by the wait, as in forward. Sums of gradients (`fan_out`) run
in the lane that formed the value, in program order, so lanes change no bit.

A segment that is recomputed runs again inside backward, on the stream of whatever node first wants something of it,
perhaps the side stream. `at` brings it back to the stream of its forward pass and makes that node's stream wait for it.

Nobody but the executor and this file enters streams, except links, and what brings counts to the host
(`farskip.parallel.host_counts`), which have their own.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, Protocol

import torch

from farskip.wait_meter import WaitMeter


class SideLane(Protocol):
    """The side lane beside the lane that a pass begins in. "This lane" is the one in which the caller is."""

    def entered(self) -> AbstractContextManager[None]:
        """Around what is issued in the side lane."""
        ...

    def mark(self) -> Any:
        """All that this lane has been given so far."""
        ...

    def read(self, mark: Any, *tensors: torch.Tensor) -> None:
        """This lane goes on behind a mark and reads tensors made before it. Nothing to do for a mark of its own."""
        ...

    def keep(self, *tensors: torch.Tensor) -> None:
        """This lane reads these: their memory, once freed, is not handed out again before it has done so."""
        ...

    def at(self, mark: Any) -> AbstractContextManager[None]:
        """Around what is issued in the lane of a mark, from wherever the caller is; he goes on behind it."""
        ...


class _Mark(NamedTuple):
    stream: torch.cuda.Stream
    event: torch.cuda.Event


class CudaSideLane:
    """Implements `SideLane`.

    Args:
        device: a CUDA device.
        meter: told how long other streams stood still for the side stream. What the side stream itself waits for is
            left out of it: it holds no compute.
    """

    def __init__(self, device: torch.device, meter: WaitMeter | None = None) -> None:
        self._device = device
        self._meter = meter
        self._stream = torch.cuda.Stream(device, priority=-1)
        if meter is not None:
            meter.leave_out(self._stream)

    def entered(self) -> AbstractContextManager[None]:
        """See `SideLane.entered`."""
        return torch.cuda.stream(self._stream)

    def mark(self) -> _Mark:
        """See `SideLane.mark`."""
        stream = torch.cuda.current_stream(self._device)
        return _Mark(stream, stream.record_event())

    def read(self, mark: _Mark, *tensors: torch.Tensor) -> None:
        """See `SideLane.read`."""
        here = torch.cuda.current_stream(self._device)
        if mark.stream == here:
            return
        if self._meter is None:
            here.wait_event(mark.event)
        else:
            self._meter.timed(lambda: here.wait_event(mark.event), self._device)
        self.keep(*tensors)

    def keep(self, *tensors: torch.Tensor) -> None:
        """See `SideLane.keep`."""
        here = torch.cuda.current_stream(self._device)
        for tensor in tensors:
            tensor.record_stream(here)

    @contextmanager
    def at(self, mark: _Mark) -> Iterator[None]:
        """See `SideLane.at`."""
        here = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(mark.stream):
            yield
        if here != mark.stream:
            here.wait_stream(mark.stream)


def make_side_lane(device: torch.device, meter: WaitMeter | None = None) -> SideLane | None:
    """The side lane of a device; None on one without streams, where its stages run in place, in the list's order."""
    return CudaSideLane(device, meter) if device.type == "cuda" else None


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors in a nest of dataclasses and sequences, as plans and routings are."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [tensor for item in value for tensor in tensors_in(item)]
    if dataclasses.is_dataclass(value):
        return [tensor for field in dataclasses.fields(value) for tensor in tensors_in(getattr(value, field.name))]
    return []
