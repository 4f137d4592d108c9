"""An emulated link: the real exchange, held back until a wire of a given bandwidth and latency would have carried it.

On loopback a transfer is itself work of the CPU that computes, so there is nothing to hide. This link adds the time of
a slow wire without using the CPU: a helper thread sleeps. Figures taken over it are figures of an emulation, and
everything that prints them says so.
"""

import queue
import threading
import time
from collections.abc import Sequence
from typing import Self

import torch
import torch.distributed as dist

from farskip.parallel.collectives import ProcessGroupLink
from farskip.pending import Work

RANGE_PREFIX = "farskip::emulated_link::"


class EmulatedLink(ProcessGroupLink):
    """A link over which every exchange takes at least bytes / bandwidth + latency, one after the other.

    Args:
        group: the process group that really carries the bytes.
        bandwidth_gbit_s: gigabits per second that leave this rank; the busier direction counts.
        latency_us: microseconds added to each exchange.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, *, bandwidth_gbit_s: float, latency_us: float) -> None:
        if bandwidth_gbit_s <= 0 or latency_us < 0:
            raise ValueError(
                f"emulated link: bandwidth_gbit_s={bandwidth_gbit_s} must be above 0 and latency_us={latency_us} not "
                "below 0"
            )
        super().__init__(group)
        self._bytes_per_s = bandwidth_gbit_s * 1e9 / 8
        self._latency_s = latency_us * 1e-6
        self._beside: list[Self] = []
        self._jobs: queue.SimpleQueue[tuple[_Paced, str, float] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._pace, name="farskip-emulated-link", daemon=True)
        self._thread.start()

    def all_to_all(
        self,
        output: torch.Tensor,
        tensor: torch.Tensor,
        output_splits: Sequence[int],
        input_splits: Sequence[int],
    ) -> Work:
        """See `Link.all_to_all`."""
        self._refuse_cuda(tensor)
        paced = _Paced(super().all_to_all(output, tensor, output_splits, input_splits))
        row_bytes = tensor[:1].nbytes if tensor.shape[0] else output[:1].nbytes
        away = max(
            sum(splits) - splits[self.rank] for splits in (list(input_splits), list(output_splits))
        )  # rows that stay on this rank use no wire
        self._jobs.put((paced, "all_to_all", away * row_bytes / self._bytes_per_s + self._latency_s))
        return paced

    def all_reduce(self, tensor: torch.Tensor) -> Work:
        """See `Link.all_reduce`; takes as long as a ring, which sends 2 (W - 1) / W of the tensor from every rank."""
        self._refuse_cuda(tensor)
        paced = _Paced(super().all_reduce(tensor))
        ring_bytes = 2 * (self.size - 1) / self.size * tensor.nbytes
        self._jobs.put((paced, "all_reduce", ring_bytes / self._bytes_per_s + self._latency_s))
        return paced

    def _same_kind(self, group: dist.ProcessGroup) -> Self:
        """A wire of its own, as fast as this one, that ends with it."""
        other = type(self)(group, bandwidth_gbit_s=self._bytes_per_s * 8e-9, latency_us=self._latency_s * 1e6)
        self._beside.append(other)
        return other

    def all_gather(self, output: torch.Tensor, tensor: torch.Tensor) -> Work:
        """See `Link.all_gather`; takes as long as a ring, which sends (W - 1) / W of the result from every rank."""
        self._refuse_cuda(tensor)
        return self._ring("all_gather", super().all_gather(output, tensor), output)

    def reduce_scatter(self, output: torch.Tensor, tensor: torch.Tensor) -> Work:
        """See `Link.reduce_scatter`; takes as long as a ring, which sends (W - 1) / W of the tensor from every rank."""
        self._refuse_cuda(tensor)
        return self._ring("reduce_scatter", super().reduce_scatter(output, tensor), tensor)

    def _ring(self, name: str, work: Work, whole: torch.Tensor) -> Work:
        paced = _Paced(work)
        ring_bytes = (self.size - 1) / self.size * whole.nbytes
        self._jobs.put((paced, name, ring_bytes / self._bytes_per_s + self._latency_s))
        return paced

    def close(self) -> None:
        """End the helper thread, and those of links made by `over`."""
        for other in self._beside:
            other.close()
        self._jobs.put(None)
        self._thread.join()

    def _refuse_cuda(self, tensor: torch.Tensor) -> None:
        if tensor.is_cuda:
            raise ValueError("the emulated link paces transfers between CPU ranks; on CUDA use link.kind=real")

    def _pace(self) -> None:
        while (job := self._jobs.get()) is not None:
            paced, name, duration_s = job
            with torch.profiler.record_function(f"{RANGE_PREFIX}{name}"):
                time.sleep(duration_s)
            paced.released.set()


class _Paced:
    """Done when both the real exchange is done and the emulated wire has let it go."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self.released = threading.Event()

    def wait(self) -> object:
        self._work.wait()
        self.released.wait()
        return None
