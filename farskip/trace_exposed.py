"""Says why communication was exposed: every stretch gets one cause, and the words read or inferred.

    waits for collective     compute stood still until a collective was done
    same stream              the collective and the compute behind it are on one stream, so nothing could run
    host launched late       the next kernel had not been launched yet
    nothing left to overlap  no compute followed in this step
    kernel gap               a pause between two kernels (operators) while the collective went on
    edge of the window       before the first compute of the trace

A stretch is cut where the owner of the time changes, where the host launches the kernel that ends it, and (CPU) where
one of our wait ranges begins or ends, so each piece has one cause.
"""

from bisect import bisect_left, bisect_right
from functools import cached_property
from typing import NamedTuple

import numpy as np

from farskip.trace_activity import Activity
from farskip.trace_attribute import UNATTRIBUTED, HostIndex, Place
from farskip.trace_intervals import Union, distinct, subtract
from farskip.trace_model import Category, TraceFile
from farskip.trace_report import Stretch

WAITS, SAME_STREAM, HOST_LATE = "waits for collective", "same stream", "host launched late"
NOTHING_LEFT, KERNEL_GAP, EDGE = "nothing left to overlap", "kernel gap", "edge of the window"
CAUSES = (WAITS, SAME_STREAM, HOST_LATE, NOTHING_LEFT, KERNEL_GAP, EDGE)

STARTS_RIGHT_AFTER_NS = 20_000
"""A kernel that starts within this after a collective's end waited for it: queued kernels start faster than that."""

_BLOCKING_CALLS = ("Synchronize", "aten::item", "aten::_local_scalar_dense", "cudaMemcpy", "hipMemcpy")


def describe(kind: str, place: Place) -> str:
    """A collective in words: what it does and what it was for."""
    if place.phase == UNATTRIBUTED:
        return kind
    stage = place.phase.removesuffix("::backward")
    backward = " (backward)" if place.backward else ""
    if place.layer >= 0:
        return f"{stage} of layer {place.layer}{backward}"
    return f"{kind} in {stage}{backward}"


class _Piece(NamedTuple):
    start: int
    end: int
    owner: int


def exposed_stretches(trace: TraceFile, host: HostIndex, activity: Activity) -> tuple[Stretch, ...]:
    """All exposed time of one rank, classed, worst first.

    Args:
        trace: the rank's trace.
        host: its host side.
        activity: its activity.

    Returns:
        Stretches whose lengths add up to the rank's exposed time.
    """
    exposed = subtract(activity.communication, activity.compute)
    if not len(exposed):
        return ()
    names = _Names(activity)
    kind = _DeviceReader if activity.device == "gpu" else _HostReader
    reader = kind(trace, host, activity, names)
    steps: list[int] = activity.collectives.step_C.tolist()
    stretches = []
    for piece in _cut(exposed, activity, reader.cuts()):
        for start, end, cause, waits_for, evidence in reader.explain(piece):
            if end > start:
                stretches.append(
                    Stretch(
                        start_ns=start - activity.window[0],
                        length_ns=end - start,
                        cause=cause,
                        waits_for=waits_for,
                        evidence=evidence,
                        collective=names[piece.owner],
                        step=steps[piece.owner],
                    )
                )
    return tuple(sorted(stretches, key=lambda stretch: (-stretch.length_ns, stretch.start_ns)))


def edge_exposed_ns(activity: Activity) -> int:
    """Exposed time before the first and after the last compute of the window."""
    exposed = subtract(activity.communication, activity.compute)
    if not len(activity.compute):
        return exposed.length()
    first, last = int(activity.compute.start_M[0]), int(activity.compute.end_M[-1])
    inside = np.minimum(exposed.end_M, last) - np.maximum(exposed.start_M, first)
    return exposed.length() - int(np.maximum(inside, 0).sum())


class _Names:
    """Collectives in words, each worded once."""

    def __init__(self, activity: Activity) -> None:
        self._events = activity.collectives
        self._known: dict[int, str] = {}

    def __getitem__(self, index: int) -> str:
        if index not in self._known:
            self._known[index] = describe(self._events.kind_of(index), self._events.places[index])
        return self._known[index]


def _cut(exposed: Union, activity: Activity, cuts: np.ndarray) -> list[_Piece]:
    """Cuts exposed time where its owner changes and at further points."""
    events = activity.collectives
    owning = np.flatnonzero(events.owned_end_C > events.owned_start_C)
    owning = owning[np.argsort(events.owned_start_C[owning], kind="stable")]
    owned_start = events.owned_start_C[owning]
    edges = distinct(np.concatenate((exposed.start_M, exposed.end_M, owned_start, cuts)))
    start, end = edges[:-1], edges[1:]
    at = np.searchsorted(exposed.start_M, start, side="right") - 1
    inside = (at >= 0) & (start < exposed.end_M[np.maximum(at, 0)])
    owner = owning[np.searchsorted(owned_start, start[inside], side="right") - 1]
    pieces = zip(start[inside].tolist(), end[inside].tolist(), owner.tolist(), strict=True)
    return [_Piece(*piece) for piece in pieces]


_Explained = tuple[int, int, str, str | None, str]


class _DeviceReader:
    """Explains stretches of a trace with device rows."""

    def __init__(self, trace: TraceFile, host: HostIndex, activity: Activity, names: _Names) -> None:
        self.table, self.host, self.names = trace.rows, host, names
        work = activity.work_pieces
        self.starts: list[int] = work.start_K.tolist()
        self.streams: list[int] = work.lane_K.tolist()
        self.rows: list[int] = work.row_K.tolist()
        self.launches: list[int] = host.launch_R[work.row_K].tolist()
        launched_at = self.table.start_R[np.maximum(host.launch_R[work.row_K], 0)]
        self.launched_at: list[int] = np.where(host.launch_R[work.row_K] >= 0, launched_at, -1).tolist()
        self.steps: list[int] = host.steps_at(
            np.where(host.launch_R[work.row_K] >= 0, launched_at, work.start_K)
        ).tolist()
        self.owner_streams: list[int] = activity.collectives.lane_C.tolist()
        self.owner_steps: list[int] = activity.collectives.step_C.tolist()
        self.first_compute = int(activity.compute.start_M[0]) if len(activity.compute) else None
        events = activity.collectives
        order = np.argsort(events.end_C, kind="stable")
        self.by_end: list[int] = order.tolist()
        self.ends: list[int] = events.end_C[order].tolist()

    def cuts(self) -> np.ndarray:
        return np.zeros(0, dtype=np.int64)

    def explain(self, piece: _Piece) -> list[_Explained]:
        following = bisect_left(self.starts, piece.end)
        if self.first_compute is None or piece.end <= self.first_compute:
            cause = NOTHING_LEFT if self.first_compute is None else EDGE
            return [(piece.start, piece.end, cause, None, "read")]
        if following == len(self.starts):
            return [(piece.start, piece.end, NOTHING_LEFT, None, "read")]
        launched_at = self.launched_at[following]
        late_until = min(max(launched_at, piece.start), piece.end)
        explained: list[_Explained] = []
        if late_until > piece.start:
            blocked = self._blocking_call(self.launches[following], piece.start, late_until)
            waits_for = f"the host, blocked in {blocked}" if blocked else "the host"
            explained.append((piece.start, late_until, HOST_LATE, waits_for, "read"))
        if late_until < piece.end:
            explained.append((late_until, piece.end, *self._queued(piece, following)))
        return explained

    def _queued(self, piece: _Piece, following: int) -> tuple[str, str | None, str]:
        """Why a kernel that was already launched did not run."""
        row, stream, start = self.rows[following], self.streams[following], self.starts[following]
        if self.owner_streams[piece.owner] == stream and stream >= 0:
            return SAME_STREAM, f"{self.names[piece.owner]} before {self._stage(row)}", "read"
        if self.steps[following] > self.owner_steps[piece.owner] >= 0:
            return NOTHING_LEFT, None, "read"
        ended = bisect_right(self.ends, start) - 1
        if ended >= 0 and self.ends[ended] > piece.start and start - self.ends[ended] <= STARTS_RIGHT_AFTER_NS:
            waited = self.by_end[ended]
            evidence = "read" if self._sync_says_so(row, stream, self.owner_streams[waited]) else "inferred"
            return WAITS, f"{self.names[waited]} before {self._stage(row)}", evidence
        return KERNEL_GAP, None, "inferred"

    def _stage(self, row: int) -> str:
        phase = self.host.place_of(row).phase.removesuffix("::backward")
        return "the next kernel" if phase == UNATTRIBUTED else phase

    def _sync_says_so(self, row: int, stream: int, waited_stream: int) -> bool:
        """Whether the kernel's stream was told, since the kernel before it, to wait for the collective's stream."""
        correlation = int(self.table.correlation_R[row])
        waits = self._stream_waits.get((stream, waited_stream))
        if not waits or correlation < 0:
            return False
        index = bisect_left(waits, correlation) - 1
        if index < 0:
            return False
        launched = self._launched_on_stream.get(stream, [])
        at = bisect_left(launched, correlation) - 1
        return at < 0 or waits[index] > launched[at]

    @cached_property
    def _stream_waits(self) -> dict[tuple[int, int], list[int]]:
        found: dict[tuple[int, int], list[int]] = {}
        for row, sync in self.table.syncs.items():
            if sync.kind == "Stream Wait Event" and int(self.table.correlation_R[row]) >= 0:
                key = (int(self.table.stream_R[row]), sync.waits_on_stream)
                found.setdefault(key, []).append(int(self.table.correlation_R[row]))
        return {key: sorted(value) for key, value in found.items()}

    @cached_property
    def _launched_on_stream(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        correlations = self.table.correlation_R[np.asarray(self.rows, dtype=np.int64)].tolist()
        for stream, correlation in zip(self.streams, correlations, strict=True):
            found.setdefault(stream, []).append(correlation)
        return {key: sorted(value) for key, value in found.items()}

    @cached_property
    def _blocking(self) -> tuple[list[int], list[int], list[int], list[int]]:
        names = np.asarray([any(call in name for call in _BLOCKING_CALLS) for name in self.table.names], dtype=np.bool_)
        rows = self.table.rows_of(Category.RUNTIME)
        rows = rows[names[self.table.name_R[rows]]]
        rows = rows[np.argsort(self.table.end_R[rows], kind="stable")]
        return (
            rows.tolist(),
            self.table.start_R[rows].tolist(),
            self.table.end_R[rows].tolist(),
            self.table.lane_R[rows].tolist(),
        )

    def _blocking_call(self, launch: int, start: int, end: int) -> str | None:
        """The call in which the launching thread sat for most of an interval, if there is one."""
        rows, starts, ends, lanes = self._blocking
        lane = int(self.table.lane_R[launch])
        index = bisect_right(ends, start)
        while index < len(rows) and starts[index] < end:
            if lanes[index] == lane and min(ends[index], end) - max(starts[index], start) > (end - start) // 2:
                return self.table.name_of(rows[index])
            index += 1
        return None


class _HostReader:
    """Explains stretches of a CPU trace."""

    def __init__(self, trace: TraceFile, host: HostIndex, activity: Activity, names: _Names) -> None:
        self.table, self.host, self.activity, self.names = trace.rows, host, activity, names
        self.starts: list[int] = activity.compute_pieces.start_K.tolist()
        waits = []
        for row in self.table.rows_of(Category.RANGE).tolist():
            own = host.own_range(row)
            if own is not None and own.verb == "wait":
                waits.append((int(self.table.start_R[row]), int(self.table.end_R[row]), row))
        self.waits = sorted(waits)
        self.wait_starts = [wait[0] for wait in self.waits]

    def cuts(self) -> np.ndarray:
        return np.asarray([edge for wait in self.waits for edge in wait[:2]], dtype=np.int64)

    def explain(self, piece: _Piece) -> list[_Explained]:
        events = self.activity.collectives
        next_index = bisect_left(self.starts, piece.end)
        has_next = next_index < len(self.starts)
        wait = self._wait_at(piece.start)
        if wait is not None:
            own = self.host.own_range(wait)
            assert own is not None
            backward = " (backward)" if own.backward else ""
            before = f" before {self._stage(next_index)}" if has_next else ""
            return [(piece.start, piece.end, WAITS, f"{own.stage} of layer {own.layer}{backward}{before}", "read")]
        if not self.starts or piece.end <= self.starts[0]:
            return [(piece.start, piece.end, EDGE if self.starts else NOTHING_LEFT, None, "read")]
        if not has_next:
            return [(piece.start, piece.end, NOTHING_LEFT, None, "read")]
        if int(events.end_C[piece.owner]) <= self.starts[next_index]:
            waits_for = f"{self.names[piece.owner]} before {self._stage(next_index)}"
            return [(piece.start, piece.end, WAITS, waits_for, "inferred")]
        return [(piece.start, piece.end, KERNEL_GAP, None, "inferred")]

    def _wait_at(self, time_ns: int) -> int | None:
        index = bisect_right(self.wait_starts, time_ns) - 1
        while index >= 0 and index > bisect_right(self.wait_starts, time_ns) - 4:
            if self.waits[index][1] > time_ns:
                return self.waits[index][2]
            index -= 1
        return None

    def _stage(self, next_index: int) -> str:
        pieces = self.activity.compute_pieces
        lane, start = int(pieces.lane_K[next_index]), int(pieces.start_K[next_index])
        phase = self.host.place_at(lane, start).phase.removesuffix("::backward")
        return "the next operator" if phase == UNATTRIBUTED else phase
