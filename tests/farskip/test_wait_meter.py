"""Stand-stills: the host's clock on CPU, pairs of events on CUDA."""

import time

import pytest
import torch

from farskip.wait_meter import WaitMeter


def test_on_cpu_the_host_waits() -> None:
    meter = WaitMeter()
    for _ in range(2):
        meter.timed(lambda: time.sleep(0.01), torch.device("cpu"))
    assert 0.02 <= meter.seconds() == meter.seconds()


class Event:
    """A CUDA event on a stream whose clock is a list."""

    clock_ms = 0.0
    log: list[str] = []  # noqa: RUF012 - one stream for all

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at_ms = Event.clock_ms
        Event.log.append("record")

    def synchronize(self) -> None:
        Event.log.append("synchronize")

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "Event") -> float:
        return end.at_ms - self.at_ms


def test_on_cuda_events_tell_and_the_host_waits_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "log", [])
    meter = WaitMeter()

    def wait() -> None:
        Event.clock_ms += 250.0

    for _ in range(2):
        meter.timed(wait, torch.device("cuda"))
        Event.clock_ms += 1000.0  # compute between the waits does not count
    assert Event.log == ["record"] * 4
    assert meter.seconds() == pytest.approx(0.5)
    assert meter.seconds() == pytest.approx(0.5), "what was read is not read again"
    assert Event.log[4:] == ["synchronize"] * 2


def test_nobody_has_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that never reads its meter keeps a bounded number of events, and no time is lost."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    meter = WaitMeter()

    def wait() -> None:
        Event.clock_ms += 1.0

    for _ in range(3000):
        meter.timed(wait, torch.device("cuda"))
        assert len(meter._stalls) <= 512
    assert meter.seconds() == pytest.approx(3.0)


@pytest.mark.gpu
def test_a_stalled_stream_is_seen() -> None:
    """The current stream waits for a busy one; the host does not."""
    meter, busy = WaitMeter(), torch.cuda.Stream()
    with torch.cuda.stream(busy):
        torch.cuda._sleep(200_000_000)
        done = torch.cuda.Event()
        done.record()
    start = time.perf_counter()
    meter.timed(done.wait, torch.device("cuda"))
    assert time.perf_counter() - start < 0.02
    assert meter.seconds() > 0.02
