"""Figures by the rules of HolisticTraceAnalysis, so that people can cross-check ours with a tool they know.

The rules (facts, not its code): communication is what matches ``^nccl.*Kernel``; copies count neither way; everything
else on a stream is compute. If any stamp has a fraction, starts are rounded up and ends down to whole microseconds,
which gives a kernel inside one microsecond a negative length, and such lengths are summed as they are. With two or
more different ProfilerStep names, the rows launched in the last step and rows without a launch are dropped unless
asked for.
"""

import re

import numpy as np

from farskip.trace_model import Bool, Int64, TraceFile

_COMMUNICATION = re.compile(r"^nccl.*Kernel")
_MEMORY = re.compile(r"(^Memcpy)|(^Memset)|(^dma)")
_NO_COMPUTE = re.compile(r"(^nccl.*Kernel)|(.*(Memcpy)|(Memset))|(.*Sync)")


class HtaFigures:
    """What its overlap and temporal-breakdown tables show for one rank, in nanoseconds."""

    def __init__(self, trace: TraceFile, *, include_last_step: bool) -> None:
        rows = _filtered(trace, include_last_step)
        start, end = _stamps(trace, rows)
        is_communication, is_compute = _classes(trace, rows)
        communication = _merged(start[is_communication], end[is_communication])
        self.num_rows = len(rows)
        self.num_communication = int(is_communication.sum())
        self.communication_ns = int((communication[1] - communication[0]).sum())
        self.hidden_ns = _both(communication, _merged(start[is_compute], end[is_compute]))
        # Its breakdown sorts all rows in place before it picks the compute rows and sorts those again. The sort is not
        # stable, and among rows of one stamp the order decides whether a negative length disappears in a neighbor.
        order = _sort_order(start)
        start, end, is_compute = start[order], end[order], is_compute[order]
        compute, everything = _merged(start[is_compute], end[is_compute]), _merged(start, end, is_sorted=True)
        self.compute_ns = int((compute[1] - compute[0]).sum())
        self.window_ns = int(everything[1][-1] - everything[0][0]) if len(rows) else 0
        self.window_start_ns = int(everything[0][0]) if len(rows) else 0
        self.idle_ns = self.window_ns - int((everything[1] - everything[0]).sum())

    @property
    def overlap_percent(self) -> float | None:
        """Its percentage, rounded to two decimals as it prints it; None without communication."""
        return round(100 * (self.hidden_ns / self.communication_ns), 2) if self.communication_ns else None


def _classes(trace: TraceFile, rows: Int64) -> tuple[Bool, Bool]:
    """Which rows are communication and which are compute, by name alone."""
    names = [trace.rows.name_of(row) for row in rows.tolist()]
    is_communication = np.asarray([bool(_COMMUNICATION.match(name)) for name in names], dtype=np.bool_)
    is_neither = np.asarray([bool(_MEMORY.match(n) or _NO_COMPUTE.match(n)) for n in names], dtype=np.bool_)
    return is_communication, ~is_communication & ~is_neither


def _filtered(trace: TraceFile, include_last_step: bool) -> Int64:
    """The rows that it measures: all that carry a stream, even operators of the host; of some steps only."""
    table = trace.rows
    step_names = [index for index, name in enumerate(table.names) if "ProfilerStep" in name]
    if len(step_names) < 2:
        return np.flatnonzero(table.stream_R != -1)
    is_sync = np.isin(table.name_R, [i for i, name in enumerate(table.names) if name in ("Event Sync", "Context Sync")])
    is_device = ((table.stream_R >= 0) & (table.correlation_R >= 0)) | is_sync
    host_rows, device_rows = np.flatnonzero(~is_device), np.flatnonzero(is_device)
    start, _ = _stamps(trace, host_rows)
    step_start, step_end = _stamps(trace, host_rows[np.isin(table.name_R[host_rows], step_names)])
    if include_last_step:
        # It shifts starts to begin at zero and leaves ends as they are, so with stamps of a real clock nothing is cut.
        first, _ = _stamps(trace, np.arange(len(table.start_R)))
        kept = host_rows[start - first.min() <= step_end.max()]
    else:
        kept = host_rows[start < step_start.max()]
    launched = device_rows[np.isin(table.correlation_R[device_rows], np.unique(table.correlation_R[kept]))]
    rows = np.concatenate((launched, kept))
    return rows[table.stream_R[rows] != -1]


def _stamps(trace: TraceFile, rows: Int64) -> tuple[Int64, Int64]:
    """Stamps rounded as it rounds them, in double precision as it computes them."""
    table = trace.rows
    start, end = table.start_R[rows], table.end_R[rows]
    if not trace.stamps_are_float:
        return start, end
    start_us = start / 1000.0
    end_us = start_us + (end - start) / 1000.0
    return np.ceil(start_us).astype(np.int64) * 1000, np.floor(end_us).astype(np.int64) * 1000


def _sort_order(start_N: Int64) -> Int64:
    """The order of its sort. Which of two equal stamps comes first depends on the width of the integers, so they are
    narrowed as it narrows them."""
    microseconds = start_N // 1000
    return np.argsort(
        microseconds.astype(np.min_scalar_type(-int(np.abs(microseconds).max(initial=1)))), kind="quicksort"
    )


def _merged(start_N: Int64, end_N: Int64, *, is_sorted: bool = False) -> tuple[Int64, Int64]:
    """Merges intervals by its rule: a new group begins where a start lies after every end before it."""
    if not len(start_N):
        return start_N, end_N
    if not is_sorted:
        order = _sort_order(start_N)
        start_N, end_N = start_N[order], end_N[order]
    reached = np.maximum.accumulate(end_N)
    first: Bool = np.append(True, start_N[1:] > reached[:-1])
    return start_N[first], np.maximum.reduceat(end_N, np.flatnonzero(first))


def _both(a: tuple[Int64, Int64], b: tuple[Int64, Int64]) -> int:
    """Time during which one interval of each is open, summed over the sweep of all edges."""
    if not len(a[0]) or not len(b[0]):
        return 0
    time = np.concatenate((a[0], a[1], b[0], b[1]))
    change = np.concatenate(
        (np.full(len(a[0]), 1), np.full(len(a[0]), -1), np.full(len(b[0]), 2), np.full(len(b[0]), -2))
    )
    order = np.argsort(time, kind="stable")
    time, running = time[order], np.cumsum(change[order])
    return int((time[1:] - time[:-1])[running[:-1] == 3].sum())
