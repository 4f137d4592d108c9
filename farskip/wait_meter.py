"""How long compute stood still for communication.

On CPU the host itself waits, so the host's clock tells. On CUDA a wait returns at once and the stream stands still
later: two events around it tell, and are read only when somebody asks.
"""

import time
from collections.abc import Callable

import torch

_MOST_STALLS = 512
"""Pairs of events from which on those that are over are added up, though nobody asks."""


class WaitMeter:
    """Sums the stand-stills of one rank."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._stalls: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._left_out: list[torch.cuda.Stream] = []

    def leave_out(self, stream: torch.cuda.Stream) -> None:
        """Count no wait of this stream: nothing computes on it that has to be on time."""
        self._left_out.append(stream)

    def timed(self, wait: Callable[[], object], device: torch.device) -> None:
        """Call `wait`, and count how long it keeps a device's current stream, or on CPU the host."""
        if device.type == "cuda":
            if self._left_out and torch.cuda.current_stream(device) in self._left_out:
                wait()
                return
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            wait()
            end.record()
            self._stalls.append((begin, end))
            if len(self._stalls) >= _MOST_STALLS:
                self._add_finished()
        else:
            start = time.perf_counter()
            wait()
            self._seconds += time.perf_counter() - start

    def seconds(self) -> float:
        """Seconds since the meter was made. Note: waits for what was launched on CUDA up to the last `timed`."""
        for _, end in self._stalls:
            end.synchronize()
        self._add_finished()
        return self._seconds

    def _add_finished(self) -> None:
        """Add what is over and forget its events."""
        waiting = []
        for begin, end in self._stalls:
            if end.query():
                self._seconds += begin.elapsed_time(end) / 1e3
            else:
                waiting.append((begin, end))
        self._stalls = waiting
