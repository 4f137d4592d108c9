"""Counts come to the host beside what the device computes; on CPU by a record of who waits for what."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch

from farskip.parallel.host_counts import CpuCounts, CudaCounts, make_host_counts
from farskip.pending import Pending
from farskip.wait_meter import WaitMeter


class OneWork:
    """A transfer that brings a tensor when it is waited for."""

    def __init__(self, buffer: torch.Tensor, arrives: torch.Tensor) -> None:
        self.buffer, self.arrives, self.waits = buffer, arrives, 0

    def wait(self) -> object:
        self.waits += 1
        return self.buffer.copy_(self.arrives)


def test_on_cpu_counts_are_waited_for_when_they_are_read() -> None:
    buffer = torch.full((2,), -1)
    work = OneWork(buffer, torch.tensor([3, 4]))
    under_way = CpuCounts().begin(Pending(buffer, work), lambda received: torch.stack([received, 2 * received]))
    assert work.waits == 0
    received, sizes = under_way.read()
    assert work.waits == 1 and received is buffer
    assert sizes == [[3, 4], [6, 8]]


def test_the_device_chooses() -> None:
    assert isinstance(make_host_counts(torch.device("cpu"), WaitMeter()), CpuCounts)


class Event:
    def __init__(self, stream: "Stream") -> None:
        self.stream = stream

    def synchronize(self) -> None:
        self.stream.log.append(f"the host waits for {self.stream.name}")


class Stream:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: "Stream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: Event) -> None:
        self.wait_stream(event.stream)

    def record_event(self) -> Event:
        self.log.append(f"event on {self.name}")
        return Event(self)


class Numbers:
    """As much of a tensor on a device as comes to the host."""

    def __init__(self, log: list[str], here: list[Stream]) -> None:
        self.log, self.here = log, here

    def to(self, device: str, *, non_blocking: bool) -> "Numbers":
        self.log.append(f"copy to {device} on {self.here[-1].name}{'' if non_blocking else ', and the host waits'}")
        return Numbers(self.log, self.here)

    def tolist(self) -> list[int]:
        self.log.append("read")
        return [7]


@contextmanager
def named_streams() -> Iterator[tuple[list[str], list[Stream]]]:
    """What was called, and the current stream as the last of a list; the one that is made is called counts."""
    log: list[str] = []
    here = [Stream("compute", log)]

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        here.append(stream)
        yield
        here.pop()

    class Timed:
        def __init__(self, enable_timing: bool) -> None:
            self.record = lambda: log.append("clock")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "Stream", lambda device, priority: Stream(f"counts{priority}", log))
        patch.setattr(torch.cuda, "Event", Timed)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: here[-1])
        patch.setattr(torch.cuda, "stream", on)
        yield log, here


def test_the_host_waits_for_counts_and_not_for_what_compute_was_given_since() -> None:
    with named_streams() as (log, here):
        meter = WaitMeter()
        counts = CudaCounts(torch.device("cuda"), meter)
        buffer: Any = type("Buffer", (), {"device": torch.device("cuda")})()
        exchange: Any = type("Work", (), {"wait": lambda self: log.append(f"{here[-1].name} waits for the exchange")})()
        made: list[weakref.ref[Numbers]] = []

        def sizes(received: Any) -> torch.Tensor:
            assert received is buffer
            log.append(f"sizes on {here[-1].name}")
            numbers = Numbers(log, here)
            made.append(weakref.ref(numbers))
            return cast(torch.Tensor, numbers)

        under_way = counts.begin(Pending(buffer, exchange, meter=meter), sizes)
        assert log == [
            "counts-1 waits for compute",
            "counts-1 waits for the exchange",
            "sizes on counts-1",
            "copy to cpu on counts-1",
            "event on counts-1",
        ]
        assert made[0]() is not None, "its memory would be handed out while it is copied"
        log.clear()
        assert under_way.read() == (buffer, [7])
        assert log == ["clock", "compute waits for counts-1", "clock", "the host waits for counts-1", "read"]
        assert made[0]() is None


@pytest.mark.gpu
def test_on_a_gpu_the_host_reads_while_compute_goes_on() -> None:
    device = torch.device("cuda")
    counts, sent = make_host_counts(device, WaitMeter()), torch.arange(6, device=device).view(2, 3)
    for cycles in (1, 400_000_000):  # the first round loads kernels
        received = Pending(sent * 2, None)
        under_way = counts.begin(received, lambda received: torch.stack([sent, received]).sum(2))
        torch.cuda._sleep(cycles)
        arrived, sizes = under_way.read()
        busy = not torch.cuda.current_stream().query()
        assert sizes == [[3, 12], [6, 24]]
        assert torch.equal(arrived, 2 * sent)
    assert busy, "the host has waited for compute"
