"""The emulated link: at least as slow as it claims, and otherwise the real one."""

import threading
import time
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist

from farskip.parallel.collectives import AllGather, AllToAll, ProcessGroupLink
from farskip.parallel.emulated_link import EmulatedLink

if TYPE_CHECKING:
    from farskip.testing import RankPool


def exchange(link: ProcessGroupLink, rows: int, width: int = 1000) -> tuple[torch.Tensor, float]:
    """Send `rows` float32 rows to the other rank; what came, and seconds from launch to the end of the wait."""
    splits = tuple(0 if rank == dist.get_rank() else rows for rank in range(2))
    sent = torch.arange(rows * width, dtype=torch.float32).view(rows, width) + dist.get_rank()
    start = time.perf_counter()
    pending = AllToAll(link=link, input_splits=splits, output_splits=splits).launch(sent)
    return pending.wait(), time.perf_counter() - start


def as_slow_as_it_claims() -> None:
    link = EmulatedLink(bandwidth_gbit_s=0.016, latency_us=5000)  # 2 MB/s: 10 rows of 4 kB take 20 ms
    try:
        for rows, least in ((10, 0.025), (1, 0.007), (0, 0.005)):
            _, seconds = exchange(link, rows)
            assert seconds >= least, f"{rows} rows took {seconds * 1e3:.1f} ms, the wire needs {least * 1e3:.1f} ms"
        pendings = []
        start = time.perf_counter()
        for _ in range(3):
            splits = (10, 0) if dist.get_rank() == 1 else (0, 10)
            sent = torch.zeros(10, 1000)
            pendings.append(AllToAll(link=link, input_splits=splits, output_splits=splits).launch(sent))
        for pending in pendings:
            pending.wait()
        assert time.perf_counter() - start >= 3 * 0.025, "exchanges share one wire"
        assert link.meter.seconds() >= 0.1
    finally:
        link.close()


def test_every_exchange_takes_the_time_of_its_bytes_one_after_the_other(rank_pool: "RankPool") -> None:
    rank_pool.run(as_slow_as_it_claims, 2)


def same_results() -> None:
    emulated = EmulatedLink(bandwidth_gbit_s=1.0, latency_us=100)
    real = ProcessGroupLink()
    try:
        for rows in (0, 1, 7):
            assert torch.equal(exchange(emulated, rows)[0], exchange(real, rows)[0])
        counts = torch.arange(4).view(2, 2) + 10 * dist.get_rank()
        assert torch.equal(emulated.exchange_counts(counts).wait(), real.exchange_counts(counts).wait())
    finally:
        emulated.close()


def test_results_are_those_of_the_real_link(rank_pool: "RankPool") -> None:
    rank_pool.run(same_results, 2)


def rings() -> None:
    """Of two ranks each sends half of the whole: 20 kB over 2 MB/s."""
    link = EmulatedLink(bandwidth_gbit_s=0.016, latency_us=5000)
    gather = AllGather(link=link)
    try:
        for exchange_of, rows in ((gather, 5), (gather.reverse(), 10)):
            start = time.perf_counter()
            assert exchange_of.launch(torch.ones(rows, 1000)).wait().shape == (15 - rows, 1000)
            assert time.perf_counter() - start >= 0.015
    finally:
        link.close()


def test_a_gather_and_a_scatter_take_as_long_as_a_ring(rank_pool: "RankPool") -> None:
    rank_pool.run(rings, 2)


def own_rows_are_free() -> None:
    link = EmulatedLink(bandwidth_gbit_s=0.001, latency_us=0)
    try:
        splits = tuple(100 if rank == dist.get_rank() else 0 for rank in range(2))
        start = time.perf_counter()
        AllToAll(link=link, input_splits=splits, output_splits=splits).launch(torch.zeros(100, 1000)).wait()
        assert time.perf_counter() - start < 1.0, "400 kB over 125 kB/s would take 3 s"
    finally:
        link.close()


def test_rows_that_stay_use_no_wire(rank_pool: "RankPool") -> None:
    rank_pool.run(own_rows_are_free, 2)


def threads_left() -> int:
    before = set(threading.enumerate())  # links of earlier cases may still have theirs
    EmulatedLink(bandwidth_gbit_s=1.0, latency_us=0).close()
    return len(set(threading.enumerate()) - before)


def test_a_closed_link_leaves_no_thread(rank_pool: "RankPool") -> None:
    assert rank_pool.run(threads_left, 2) == [0, 0]


@pytest.mark.parametrize(("bandwidth", "latency"), [(0.0, 1.0), (-1.0, 1.0), (1.0, -1.0)])
def test_a_wire_that_cannot_be_is_refused(bandwidth: float, latency: float) -> None:
    with pytest.raises(ValueError, match=r"emulated link: bandwidth_gbit_s=.* must be above 0 and latency_us="):
        EmulatedLink(bandwidth_gbit_s=bandwidth, latency_us=latency)
