"""The one-GPU test bed: an emulated link, a paced copy on a side stream that takes as long as a given wire would.

One rank exchanges with itself. On a stream of high priority, which stands still, on one thread of one multiprocessor,
for as long as a wire of the given bandwidth and latency needs, and then really copies the rows. So launches, events,
streams and memory lifetimes are those of a collective, compute loses next to nothing, and what is read before it was
waited for is not there. Figures taken over it are figures of an emulation, and everything that prints them says so.

Pacing is by the clock of the multiprocessors, which is measured when the link is made.
"""

from collections.abc import Sequence

import torch

from farskip.parallel.emulated_link import RANGE_PREFIX
from farskip.pending import Pending, Work
from farskip.wait_meter import WaitMeter

_CALIBRATION_CYCLES = 20_000_000


class PacedCopyLink:
    """One rank on one GPU. Implements `farskip.parallel.collectives.Link`.

    Args:
        device: a CUDA device.
        bandwidth_gbyte_s: gigabytes per second of the emulated wire.
        latency_us: microseconds added to each exchange.
        away_share: share of the rows that would leave the rank: (W - 1) / W for a balanced exchange between W ranks.

    Raises:
        ValueError: not a CUDA device, or a value out of range.
    """

    rank = 0
    size = 1

    def __init__(
        self, device: torch.device, *, bandwidth_gbyte_s: float, latency_us: float = 0.0, away_share: float = 1.0
    ) -> None:
        if device.type != "cuda":
            raise ValueError(f"the paced copy needs a CUDA device, not {device}; on CPU use the emulated link")
        if bandwidth_gbyte_s <= 0 or latency_us < 0 or not 0 <= away_share <= 1:
            raise ValueError(
                f"paced copy: bandwidth_gbyte_s={bandwidth_gbyte_s} must be above 0, latency_us={latency_us} not below "
                f"0, and away_share={away_share} in 0..1"
            )
        self.meter = WaitMeter()
        self._seconds_per_byte = away_share / (bandwidth_gbyte_s * 1e9)
        self._latency_s = latency_us * 1e-6
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._cycles_per_s = _cycles_per_second(device)

    def all_to_all(
        self, output: torch.Tensor, tensor: torch.Tensor, output_splits: Sequence[int], input_splits: Sequence[int]
    ) -> Work:
        """See `Link.all_to_all`."""
        return self._transfer("all_to_all", output, tensor)

    def all_reduce(self, tensor: torch.Tensor) -> Work:
        """See `Link.all_reduce`: the sum over one rank is the tensor; it takes as long as sending it once."""
        return self._transfer("all_reduce", tensor, None)

    def all_gather(self, output: torch.Tensor, tensor: torch.Tensor) -> Work:
        """See `Link.all_gather`: the rows of one rank."""
        return self._transfer("all_gather", output, tensor)

    def reduce_scatter(self, output: torch.Tensor, tensor: torch.Tensor) -> Work:
        """See `Link.reduce_scatter`: the sum over one rank."""
        return self._transfer("reduce_scatter", output, tensor)

    def exchange_counts(self, counts: torch.Tensor) -> Pending:
        """See `Link.exchange_counts`."""
        received = torch.empty_like(counts)
        return Pending(received, self._transfer("all_to_all", received, counts), keep=(counts,), meter=self.meter)

    def _transfer(self, name: str, output: torch.Tensor, tensor: torch.Tensor | None) -> Work:
        seconds = output.nbytes * self._seconds_per_byte + self._latency_s
        self._stream.wait_stream(torch.cuda.current_stream(output.device))
        with torch.cuda.stream(self._stream), torch.profiler.record_function(f"{RANGE_PREFIX}{name}"):
            sent = output.clone() if tensor is None else tensor
            if tensor is None:
                output.fill_(float("nan"))  # what is read too early shows
            torch.cuda._sleep(int(seconds * self._cycles_per_s))
            output.copy_(sent, non_blocking=True)
        # Freed memory may be handed out again at once to the stream that it came from: not before this one is done.
        for used in (output, tensor):
            if used is not None:
                used.record_stream(self._stream)
        return _OnStream(self._stream.record_event())


class _OnStream:
    """Done when an event is; the current stream waits for it, not the host."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> object:
        self._event.wait()
        return None


def _cycles_per_second(device: torch.device) -> float:
    """What `torch.cuda._sleep` counts in, measured on an idle stream."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.device(device):
        torch.cuda._sleep(_CALIBRATION_CYCLES)  # the first launch loads the kernel
        begin.record()
        torch.cuda._sleep(_CALIBRATION_CYCLES)
        end.record()
        end.synchronize()
    return _CALIBRATION_CYCLES / (begin.elapsed_time(end) / 1e3)
