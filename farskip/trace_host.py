"""One rank's activity from a CPU trace: gloo, or an emulated link, moves bytes while the program's threads compute.

Definitions (the same words stand in docs/trace.md and, short, in a report's event set):

    communication  ranges gloo:X (mpi:X, ucc:X) on any thread, and farskip::emulated_link::X, the paced transfer of an
                   emulated link. The gloo range of the same launch is part of it and can only make it end later.
    model threads  threads with a ProfilerStep, one of our ranges, a c10d:: operator or the autograd engine; if there is
                   none, every thread with operators that carries no communication.
    compute        on each model thread: operators, and our ::run ranges in full; without our ::wait ranges, without
    c10d::
                   operators, without communication on this thread, and without the time after a c10d:: operator in
                   which the thread starts nothing and its transfer runs (a wait that the profiler does not record).
                   Frames of the autograd engine and the nodes that it calls count only through the operators inside
                   them.
    copies         none. A CPU trace does not tell them apart.
    window         first start to last end of these rows.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from farskip.trace_activity import Activity, Collectives, Compute, Recognized, build_collectives, window_of
from farskip.trace_attribute import EMULATED_LINK, NOWHERE, HostIndex, Place
from farskip.trace_host_match import Launch, Transfer, absorb, column, launches_of, match_launches
from farskip.trace_intervals import EMPTY, Union, join, subtract, union_of
from farskip.trace_model import Bool, Category, Int64, TraceFile
from farskip.trace_recognize import UserPattern, operation_kind

_BACKENDS = ("gloo:", "mpi:", "ucc:")


def has_cpu_activity(trace: TraceFile) -> bool:
    """Whether the trace has operators or transfers on the host and no sign that its work ran on a device."""
    table = trace.rows
    if any(name.startswith("nccl:") for name in table.names) or len(table.rows_of(Category.RUNTIME)):
        return False
    return len(table.rows_of(Category.CPU_OP, Category.RANGE)) > 0


def host_activity(trace: TraceFile, host: HostIndex, patterns: Sequence[UserPattern]) -> Activity:
    """The activity of one rank of a CPU trace.

    Args:
        trace: a trace without device rows.
        host: its host side.
        patterns: from ``--communication``; on a CPU trace they are matched with operators and ranges.

    Returns:
        The activity.
    """
    transfers = _transfers(trace, patterns)
    worker_lanes, model_lanes = _lanes(trace, host, transfers)
    launches = launches_of(trace, host, model_lanes)
    matched = match_launches(transfers, launches)
    transfers, matched = absorb(transfers, matched)
    communication = union_of(column(transfers, "start"), column(transfers, "end"))
    per_lane = {lane: _compute_of_lane(trace, host, lane, transfers, matched) for lane in model_lanes}
    compute = join(EMPTY, *per_lane.values())
    collectives = _collectives(trace, host, transfers, matched, compute)
    emulated = int(collectives.emulated_C.sum())
    notes = list(trace.notes)
    if emulated:
        notes.append(f"{emulated} of {len(collectives)} transfers ran over an emulated link (paced, not a real wire)")
    if not model_lanes:
        notes.append("no thread of this trace runs the model: compute is empty")
    return Activity(
        device="cpu",
        window=window_of(communication, compute),
        communication=communication,
        compute=compute,
        copies=EMPTY,
        collectives=collectives,
        compute_pieces=_pieces(per_lane),
        work_pieces=_pieces(per_lane),
        event_set={
            "rows": "host rows of a CPU trace, of the threads that run the model and of those that carry transfers",
            "communication": "paced transfers of an emulated link, and gloo (mpi, ucc) ranges outside them"
            if emulated
            else "gloo (mpi, ucc) ranges",
            "compute": "operators and farskip run ranges on the model threads, without wait ranges, c10d operators and "
            "c10d waits, frames of the autograd engine only through the operators inside",
            "copies": "none: a CPU trace does not tell them apart",
            "window": "first start to last end of these rows",
        },
        recognized=_recognized(trace, transfers, model_lanes, worker_lanes),
        notes=tuple(notes),
    )


def _transfers(trace: TraceFile, patterns: Sequence[UserPattern]) -> list[Transfer]:
    table = trace.rows
    kinds: dict[int, tuple[str, bool]] = {}
    for index, name in enumerate(table.names):
        emulated = EMULATED_LINK.match(name)
        if emulated:
            kinds[index] = (operation_kind(emulated.group(1)), True)
        elif name.startswith(_BACKENDS):
            kinds[index] = (operation_kind(name.split(":", 1)[1]), False)
        else:
            for pattern in patterns:
                if pattern.regex.search(name):
                    kinds[index] = (pattern.kind, False)
                    break
    rows = table.rows_of(Category.RANGE, Category.CPU_OP)
    rows = rows[np.isin(table.name_R[rows], list(kinds))]
    found = [
        Transfer(
            row=row,
            start=int(table.start_R[row]),
            end=int(table.end_R[row]),
            kind=kinds[int(table.name_R[row])][0],
            emulated=kinds[int(table.name_R[row])][1],
        )
        for row in rows.tolist()
    ]
    return sorted(found, key=lambda transfer: (transfer.start, transfer.row))


def _lanes(trace: TraceFile, host: HostIndex, transfers: Sequence[Transfer]) -> tuple[set[int], set[int]]:
    """The threads that carry transfers, and those that run the model."""
    table = trace.rows
    paced = {int(table.lane_R[t.row]) for t in transfers if t.emulated}
    carrying = {int(table.lane_R[t.row]) for t in transfers}
    marks = np.asarray(
        [
            name.startswith(("ProfilerStep#", "c10d::", "autograd::engine")) or host.is_own_name(name)
            for name in table.names
        ],
        dtype=np.bool_,
    )
    rows = table.rows_of(Category.RANGE, Category.CPU_OP)
    marked = set(np.unique(table.lane_R[rows[marks[table.name_R[rows]]]]).tolist()) - paced
    operators = set(np.unique(table.lane_R[table.rows_of(Category.CPU_OP)]).tolist())
    model = marked or (operators - carrying)
    return carrying - model, model


def _compute_of_lane(
    trace: TraceFile,
    host: HostIndex,
    lane: int,
    transfers: Sequence[Transfer],
    matched: Sequence[Launch | None],
) -> Union:
    table = trace.rows
    rows = table.rows_of(Category.RANGE, Category.CPU_OP)
    rows = rows[table.lane_R[rows] == lane]
    names = table.name_R[rows]
    is_operator = table.category_R[rows] == Category.CPU_OP
    is_issue = _names(trace, lambda name: name.startswith(("c10d::", "nccl:")) or name == "record_param_comms")[names]
    is_engine = _names(trace, lambda name: name.startswith("autograd::engine"))[names]
    is_node = (table.sequence_R[rows] >= 0) & (table.forward_thread_R[rows] > 0)
    is_run = _names(trace, lambda name: host.is_own_name(name, "run"))[names]
    is_wait = _names(trace, lambda name: host.is_own_name(name, "wait"))[names]
    is_transfer = np.isin(rows, column(transfers, "row"))
    counts = is_run | (is_operator & ~is_issue & ~is_engine & ~is_node & ~is_transfer)
    away = is_wait | is_issue | is_transfer
    blocked = _unrecorded_waits(np.sort(table.start_R[rows]), lane, transfers, matched)
    return subtract(
        union_of(table.start_R[rows[counts]], table.end_R[rows[counts]]),
        join(union_of(table.start_R[rows[away]], table.end_R[rows[away]]), blocked),
    )


def _names(trace: TraceFile, rule: Callable[[str], bool]) -> Bool:
    return np.asarray([rule(name) for name in trace.rows.names], dtype=np.bool_)


def _unrecorded_waits(
    sorted_start_N: Int64, lane: int, transfers: Sequence[Transfer], matched: Sequence[Launch | None]
) -> Union:
    """After each c10d operator of a thread: until the thread starts its next row, at most until the transfer ends."""
    starts, ends = [], []
    for transfer, launch in zip(transfers, matched, strict=True):
        if launch is None or launch.lane != lane or transfer.end <= launch.end:
            continue
        index = int(np.searchsorted(sorted_start_N, launch.end, side="left"))
        next_start = int(sorted_start_N[index]) if index < len(sorted_start_N) else transfer.end
        starts.append(launch.end)
        ends.append(min(next_start, transfer.end))
    return union_of(np.asarray(starts, dtype=np.int64), np.asarray(ends, dtype=np.int64))


def _collectives(
    trace: TraceFile,
    host: HostIndex,
    transfers: Sequence[Transfer],
    matched: Sequence[Launch | None],
    compute: Union,
) -> Collectives:
    table = trace.rows
    places: list[Place] = []
    kinds, launch_ns = [], []
    for transfer, launch in zip(transfers, matched, strict=True):
        places.append(NOWHERE if launch is None else host.place_at(launch.lane, launch.start))
        kinds.append(launch.kind if launch is not None and launch.kind == "reduce_scatter" else transfer.kind)
        launch_ns.append(-1 if launch is None else launch.start)
    rows = column(transfers, "row")
    return build_collectives(
        row_C=rows,
        start_C=column(transfers, "start"),
        end_C=column(transfers, "end"),
        kinds=kinds,
        lane_C=table.lane_R[rows].astype(np.int32),
        launch_C=np.asarray(launch_ns, dtype=np.int64),
        step_C=host.steps_at(np.where(np.asarray(launch_ns) >= 0, launch_ns, column(transfers, "start"))),
        places=places,
        sizes=[(kind, table.shape_of(row)) for kind, row in zip(kinds, rows.tolist(), strict=True)],
        emulated_C=np.asarray([transfer.emulated for transfer in transfers], dtype=np.bool_),
        compute=compute,
    )


def _pieces(per_lane: dict[int, Union]) -> Compute:
    starts = [union.start_M for union in per_lane.values()]
    ends = [union.end_M for union in per_lane.values()]
    lanes = [np.full(len(union), lane, dtype=np.int32) for lane, union in per_lane.items()]
    none = np.zeros(0, dtype=np.int64)
    start_K, end_K = np.concatenate([none, *starts]), np.concatenate([none, *ends])
    lane_K = np.concatenate([none.astype(np.int32), *lanes])
    order = np.argsort(start_K, kind="stable")
    return Compute(
        start_K=start_K[order],
        end_K=end_K[order],
        lane_K=lane_K[order],
        row_K=np.full(len(order), -1, dtype=np.int64),
    )


def _recognized(
    trace: TraceFile, transfers: Sequence[Transfer], model_lanes: set[int], worker_lanes: set[int]
) -> tuple[Recognized, ...]:
    table = trace.rows
    kinds = {transfer.row: transfer for transfer in transfers}
    counts: Counter[tuple[str, str, str]] = Counter()
    lengths: Counter[tuple[str, str, str]] = Counter()
    for row in table.rows_of(Category.CPU_OP, Category.RANGE).tolist():
        name, transfer = table.name_of(row), kinds.get(row)
        if transfer is not None:
            label = f"communication: {transfer.kind}" + (" (emulated)" if transfer.emulated else "")
            key = (name, label, "name")
        elif name.startswith(_BACKENDS):
            key = (name, "part of a paced transfer", "name")
        elif table.category_R[row] == Category.RANGE:
            continue
        elif int(table.lane_R[row]) in worker_lanes:
            key = (name, "inside a transfer's thread: not counted", "")
        elif int(table.lane_R[row]) not in model_lanes:
            key = (name, "no model thread: not counted", "")
        elif name.startswith("c10d::"):
            key = (name, "launch of a collective: not counted", "operator")
        else:
            key = (name, "compute", "")
        counts[key] += 1
        lengths[key] += int(table.end_R[row] - table.start_R[row])
    return tuple(
        Recognized(name=key[0], counted_as=key[1], said_by=key[2], count=counts[key], summed_ns=lengths[key])
        for key in sorted(counts, key=lambda key: -lengths[key])
    )
