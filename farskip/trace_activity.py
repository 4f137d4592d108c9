"""One rank's activity, whatever the trace came from: its collectives, its compute, its copies and its window.

Device traces are turned into an ``Activity`` here, CPU traces in ``trace_host``. Everything behind this point (tables,
stretches, comparison, renderers) reads an ``Activity`` and asks no trace again, except for the ranges of the host.

Legend: C collectives of one rank, K pieces of compute.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from farskip.trace_attribute import HostIndex, Place
from farskip.trace_intervals import EMPTY, Union, join, overlap_of, owned_pieces, union_of
from farskip.trace_model import Category, Int32, Int64, TraceFile
from farskip.trace_recognize import KINDS, UserPattern, Verdict, combine_verdicts, is_local_helper, verdict_by_name


@dataclass(frozen=True, kw_only=True, slots=True)
class Collectives:
    """The collectives of one rank, in order of their start.

    Attributes:
        row_C: int64 row of the trace.
        start_C, end_C: int64 nanoseconds.
        kind_C: int8 index into ``KINDS``.
        lane_C: int32 stream (device) or thread (CPU) that carries it.
        launch_C: int64 stamp of the launch on the host, -1 if the trace has none.
        step_C: int64 step of the launch, -1 if unknown.
        places: what each was for.
        sizes: what has to agree between two ranks for two rows to be the same collective.
        emulated_C: bool, a paced transfer of an emulated link.
        owned_start_C, owned_end_C: the instants that belong to it: at each instant, the collective that started first.
        hidden_C: int64 length of the owned instants during which compute ran.
    """

    row_C: Int64
    start_C: Int64
    end_C: Int64
    kind_C: np.ndarray
    lane_C: Int32
    launch_C: Int64
    step_C: Int64
    places: tuple[Place, ...]
    sizes: tuple[tuple[object, ...], ...]
    emulated_C: np.ndarray
    owned_start_C: Int64
    owned_end_C: Int64
    hidden_C: Int64

    def __len__(self) -> int:
        return len(self.row_C)

    def kind_of(self, index: int) -> str:
        """What one of them does."""
        return KINDS[int(self.kind_C[index])]


@dataclass(frozen=True, kw_only=True, slots=True)
class Compute:
    """Pieces of compute, by start: kernels of a device trace, or the compute intervals of each thread of a CPU trace.

    Attributes:
        start_K, end_K: int64 nanoseconds.
        lane_K: int32 stream or thread.
        row_K: int64 row of the trace; -1 where a piece is made of several rows.
    """

    start_K: Int64
    end_K: Int64
    lane_K: Int32
    row_K: Int64


@dataclass(frozen=True, kw_only=True, slots=True)
class Recognized:
    """One line of ``--show-names``: what the rows of one name were counted as, and which layer said so."""

    name: str
    counted_as: str
    said_by: str
    count: int
    summed_ns: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Activity:
    """Everything that the figures of one rank are made of.

    Attributes:
        device: "gpu", "cpu", or "none" where a trace that should have device rows has none.
        window: first start and last end of the rows that count, nanoseconds; (0, 0) if there are none.
        communication, compute, copies: unions of intervals.
        collectives: one by one.
        compute_pieces: one by one, by start.
        work_pieces: compute, and the copies on its streams: what stands still when compute has to wait.
        event_set: which rows counted as what, in words.
        recognized: names and what they were counted as.
        notes: one line for everything the reader should know about this rank's figures.
    """

    device: str
    window: tuple[int, int]
    communication: Union
    compute: Union
    copies: Union
    collectives: Collectives
    compute_pieces: Compute
    work_pieces: Compute
    event_set: Mapping[str, str]
    recognized: tuple[Recognized, ...]
    notes: tuple[str, ...]


def build_collectives(
    *,
    row_C: Int64,
    start_C: Int64,
    end_C: Int64,
    kinds: Sequence[str],
    lane_C: Int32,
    launch_C: Int64,
    step_C: Int64,
    places: Sequence[Place],
    sizes: Sequence[tuple[object, ...]],
    emulated_C: np.ndarray,
    compute: Union,
) -> Collectives:
    """Sorts collectives by start, gives every instant to the one that started first, and measures what compute hid."""
    order = np.lexsort((row_C, start_C))
    start_C, end_C = start_C[order], end_C[order]
    owned_start_C, owned_end_C = owned_pieces(start_C, end_C)
    positions = order.tolist()
    return Collectives(
        row_C=row_C[order],
        start_C=start_C,
        end_C=end_C,
        kind_C=np.asarray([KINDS.index(kinds[i]) for i in positions], dtype=np.int8),
        lane_C=lane_C[order],
        launch_C=launch_C[order],
        step_C=step_C[order],
        places=tuple(places[i] for i in positions),
        sizes=tuple(sizes[i] for i in positions),
        emulated_C=emulated_C[order],
        owned_start_C=owned_start_C,
        owned_end_C=owned_end_C,
        hidden_C=overlap_of(compute, owned_start_C, owned_end_C),
    )


def no_collectives() -> Collectives:
    """The collectives of a rank that has none."""
    none, none32 = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int32)
    return build_collectives(
        row_C=none,
        start_C=none,
        end_C=none,
        kinds=(),
        lane_C=none32,
        launch_C=none,
        step_C=none,
        places=(),
        sizes=(),
        emulated_C=np.zeros(0, dtype=np.bool_),
        compute=EMPTY,
    )


def no_compute() -> Compute:
    """The compute of a rank that has none."""
    none, none32 = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int32)
    return Compute(start_K=none, end_K=none, lane_K=none32, row_K=none)


def window_of(*unions: Union) -> tuple[int, int]:
    """First start and last end of several unions."""
    whole = join(*unions)
    return (int(whole.start_M[0]), int(whole.end_M[-1])) if len(whole) else (0, 0)


def device_rows(trace: TraceFile, device: int | None) -> Int64:
    """Rows of kernels and copies of one device.

    Args:
        trace: a trace.
        device: which device, None for the only one.

    Returns:
        Row indices.

    Raises:
        ValueError: several devices and none chosen, or a device that the file does not have.
    """
    rows = trace.rows.rows_of(Category.KERNEL, Category.COPY)
    found = np.unique(trace.rows.device_R[rows])
    if device is not None:
        if device not in found.tolist():
            listing = ", ".join(map(str, found.tolist())) or "none"
            raise ValueError(
                f"{trace.path}: no rows of device {device}; the file has {listing}; give one of these to --device"
            )
        return rows[trace.rows.device_R[rows] == device]
    if len(found[found >= 0]) > 1:
        listing = ", ".join(map(str, found[found >= 0].tolist()))
        raise ValueError(f"{trace.path}: rows of several devices ({listing}); choose one with --device")
    return rows


def device_activity(trace: TraceFile, host: HostIndex, rows: Int64, patterns: Sequence[UserPattern]) -> Activity:
    """The activity of one rank from the rows of its device.

    Args:
        trace: a trace.
        host: its host side.
        rows: kernels and copies of one device, not empty.
        patterns: from ``--communication``.

    Returns:
        The activity; communication = rows recognized as such (copies only as a copy-engine collective), compute = all
        other kernels, copies = all other copies and memsets.
    """
    table = trace.rows
    verdicts = _verdicts(trace, host, rows, patterns)
    is_communication = np.zeros(len(rows), dtype=np.bool_)
    is_communication[list(verdicts)] = True
    is_copy = table.category_R[rows] == Category.COPY
    kernels, copies, communication = (
        rows[~is_communication & ~is_copy],
        rows[~is_communication & is_copy],
        rows[is_communication],
    )
    compute_union = union_of(table.start_R[kernels], table.end_R[kernels])
    places = [host.place_of(row) for row in communication.tolist()]
    kinds = [
        _kind_by_place(table.name_of(row), verdict, place)
        for row, verdict, place in zip(communication.tolist(), verdicts.values(), places, strict=True)
    ]
    launch = host.launch_R[communication]
    launch_ns = np.where(launch >= 0, table.start_R[np.maximum(launch, 0)], -1)
    collectives = build_collectives(
        row_C=communication,
        start_C=table.start_R[communication],
        end_C=table.end_R[communication],
        kinds=kinds,
        lane_C=table.stream_R[communication],
        launch_C=launch_ns,
        # Where the launch is not in the file, the start on the device has to do.
        step_C=host.steps_at(np.where(launch_ns >= 0, launch_ns, table.start_R[communication])),
        places=places,
        sizes=[_size_key(trace, row, kind) for row, kind in zip(communication.tolist(), kinds, strict=True)],
        emulated_C=np.zeros(len(communication), dtype=np.bool_),
        compute=compute_union,
    )
    communication_union = union_of(table.start_R[communication], table.end_R[communication])
    copies_union = union_of(table.start_R[copies], table.end_R[copies])
    notes = _device_notes(trace, host, rows)
    # A window is made of the rows as they are: a zero-length kernel at its edge belongs to it.
    return Activity(
        device="gpu",
        window=(int(table.start_R[rows].min()), int(table.end_R[rows].max())),
        communication=communication_union,
        compute=compute_union,
        copies=copies_union,
        collectives=collectives,
        compute_pieces=_pieces(trace, kernels),
        work_pieces=_pieces(
            trace, np.concatenate((kernels, copies[np.isin(table.stream_R[copies], table.stream_R[kernels])]))
        ),
        event_set={
            "rows": "all kernels, copies and memsets of one device; synchronization rows are no device work",
            "communication": "rows recognized by arguments, launching operator, name or pattern",
            "compute": "the other kernels",
            "copies": "the other copies and memsets: neither compute nor communication",
            "window": "first start to last end of these rows",
        },
        recognized=_recognized(trace, rows, verdicts),
        notes=notes,
    )


def _pieces(trace: TraceFile, rows: Int64) -> Compute:
    table = trace.rows
    rows = rows[np.argsort(table.start_R[rows], kind="stable")]
    return Compute(start_K=table.start_R[rows], end_K=table.end_R[rows], lane_K=table.stream_R[rows], row_K=rows)


def _verdicts(trace: TraceFile, host: HostIndex, rows: Int64, patterns: Sequence[UserPattern]) -> dict[int, Verdict]:
    """Position in ``rows`` -> verdict, for the rows that are communication."""
    table = trace.rows
    is_copy = table.category_R[rows] == Category.COPY
    by_name: dict[tuple[int, bool], Verdict | None] = {}
    asked = np.zeros(len(rows), dtype=np.bool_)
    for copy in (False, True):
        of_kind = is_copy == copy
        for name in np.flatnonzero(np.bincount(table.name_R[rows[of_kind]])).tolist():
            category = Category.COPY if copy else Category.KERNEL
            verdict = by_name[(name, copy)] = verdict_by_name(table.names[name], category, patterns)
            if verdict is not None:
                asked |= of_kind & (table.name_R[rows] == name)
    helpers = np.asarray([is_local_helper(name) for name in table.names], dtype=np.bool_)
    detailed = np.isin(rows, np.fromiter(table.collectives, dtype=np.int64, count=len(table.collectives)))
    asked |= (detailed | host.launched_inside_nccl(rows)) & ~helpers[table.name_R[rows]]
    found: dict[int, Verdict] = {}
    for position in np.flatnonzero(asked).tolist():
        row = int(rows[position])
        name, details = int(table.name_R[row]), table.collectives.get(row)
        verdict = by_name[(name, bool(is_copy[position]))]
        verdict = combine_verdicts(table.names[name], verdict, details, host.parents_of(row))
        if verdict is not None:
            found[position] = verdict
    return found


def _kind_by_place(name: str, verdict: Verdict, place: Place) -> str:
    """Point-to-point kernels inside our own dispatch or combine are an all-to-all, whatever their name says."""
    stage = place.phase.removesuffix("::backward")
    if verdict.kind in ("unknown", "send_recv") and "sendrecv" in name.lower() and stage in ("dispatch", "combine"):
        return "all_to_all"
    return verdict.kind


def _size_key(trace: TraceFile, row: int, kind: str) -> tuple[object, ...]:
    details = trace.rows.collectives.get(row)
    return (kind, *details.size_key()) if details is not None else (kind,)


def _device_notes(trace: TraceFile, host: HostIndex, rows: Int64) -> tuple[str, ...]:
    table, notes = trace.rows, list(trace.notes)
    launch = host.launch_R[rows]
    known = launch >= 0
    missing = len(rows) - int(known.sum())
    if missing:
        notes.append(
            f"{missing} of {len(rows)} device rows have no launch record: their phase, layer and step come from the "
            "device rows"
        )
    early = int((table.start_R[rows[known]] < table.start_R[launch[known]]).sum())
    if early:
        notes.append(
            f"{early} device rows start before their launch: the clocks of host and device disagree in this file"
        )
    empty = int((table.end_R[rows] == table.start_R[rows]).sum())
    if empty:
        notes.append(f"{empty} device rows have no length: they count as rows and add no time")
    if any(name.startswith("gloo:") for name in table.names):
        notes.append("gloo transfers on host threads are not counted: this trace has device rows")
    return tuple(notes)


def _recognized(trace: TraceFile, rows: Int64, verdicts: Mapping[int, Verdict]) -> tuple[Recognized, ...]:
    table = trace.rows
    labels = {("compute", ""): 0, ("copy", ""): 1}
    label_R = (table.category_R[rows] == Category.COPY).astype(np.int64)
    for position, verdict in verdicts.items():
        label_R[position] = labels.setdefault((f"communication: {verdict.kind}", verdict.said_by), len(labels))
    keys = table.name_R[rows].astype(np.int64) * len(labels) + label_R
    count = np.bincount(keys)
    summed = np.zeros(len(count), dtype=np.int64)
    np.add.at(summed, keys, table.end_R[rows] - table.start_R[rows])
    texts = list(labels)
    found = []
    for key in np.flatnonzero(count).tolist():
        counted_as, said_by = texts[key % len(labels)]
        found.append(
            Recognized(
                name=table.names[key // len(labels)],
                counted_as=counted_as,
                said_by=said_by,
                count=int(count[key]),
                summed_ns=int(summed[key]),
            )
        )
    return tuple(sorted(found, key=lambda name: -name.summed_ns))


def nothing_to_measure(trace: TraceFile, reason: str) -> Activity:
    """The activity of a trace in which nothing counts; ``reason`` is the answer."""
    return Activity(
        device="none",
        window=(0, 0),
        communication=EMPTY,
        compute=EMPTY,
        copies=EMPTY,
        collectives=no_collectives(),
        compute_pieces=no_compute(),
        work_pieces=no_compute(),
        event_set={"rows": "none"},
        recognized=(),
        notes=(*trace.notes, reason),
    )
