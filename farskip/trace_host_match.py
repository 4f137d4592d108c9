"""On a CPU trace: which launch a transfer belongs to, and which real transfers are part of a paced one.

The file has no id that links the two sides, so they are linked by kind and order, within the bounds that our wait
ranges set; ``match_launches`` says how.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from farskip.trace_attribute import HostIndex, OwnRange
from farskip.trace_intervals import overlap_of, union_of
from farskip.trace_model import Category, Int64, TraceFile
from farskip.trace_recognize import operation_kind


@dataclass(frozen=True, kw_only=True, slots=True)
class Transfer:
    """One transfer on its way to becoming a collective."""

    row: int
    start: int
    end: int
    kind: str
    emulated: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """A c10d operator or one of our launch ranges on a model thread."""

    row: int
    start: int
    end: int
    lane: int
    kind: str
    deadline: int


def column(items: Sequence[Transfer] | Sequence[Launch], name: str) -> Int64:
    return np.asarray([getattr(item, name) for item in items], dtype=np.int64)


def launches_of(trace: TraceFile, host: HostIndex, model_lanes: set[int]) -> list[Launch]:
    """The c10d operators of the model threads, each with the end of the wait that belongs to it, if we wrote one."""
    table = trace.rows
    rows = table.rows_of(Category.CPU_OP)
    names = np.asarray([name.startswith("c10d::") for name in table.names], dtype=np.bool_)
    rows = rows[names[table.name_R[rows]] & np.isin(table.lane_R[rows], list(model_lanes))]
    deadlines = _deadlines(trace, host)
    launches = [
        Launch(
            row=row,
            start=int(table.start_R[row]),
            end=int(table.end_R[row]),
            lane=int(table.lane_R[row]),
            kind=operation_kind(table.name_of(row).removeprefix("c10d::")),
            deadline=_deadline(deadlines, host, int(table.lane_R[row]), int(table.start_R[row])),
        )
        for row in rows.tolist()
    ]
    return sorted(launches, key=lambda launch: launch.start)


def _deadlines(trace: TraceFile, host: HostIndex) -> dict[tuple[int, str, bool], list[tuple[int, int]]]:
    """(layer, stage, backward) -> (start, end) of its wait ranges, by start."""
    table = trace.rows
    found: dict[tuple[int, str, bool], list[tuple[int, int]]] = {}
    for row in table.rows_of(Category.RANGE).tolist():
        own = host.own_range(row)
        if own is not None and own.verb == "wait":
            key = (own.layer, own.label, own.backward)
            found.setdefault(key, []).append((int(table.start_R[row]), int(table.end_R[row])))
    return {key: sorted(waits) for key, waits in found.items()}


def _deadline(
    deadlines: dict[tuple[int, str, bool], list[tuple[int, int]]], host: HostIndex, lane: int, start: int
) -> int:
    own = _own_at(host, lane, start)
    if own is not None:
        for wait_start, wait_end in deadlines.get((own.layer, own.label, own.backward), ()):
            if wait_start >= start:
                return wait_end
    return int(np.iinfo(np.int64).max)


def _own_at(host: HostIndex, lane: int, time_ns: int) -> OwnRange | None:
    ranges = host.annotations.get(lane)
    for row in ranges.open_at(time_ns) if ranges is not None else ():
        own = host.own_range(row)
        if own is not None:
            return own
    return None


def match_launches(transfers: Sequence[Transfer], launches: Sequence[Launch]) -> list[Launch | None]:
    """Links transfers with their launches; the file has no id for it.

    A backend starts its work in the order in which it was issued, so the first launch of a fitting kind that is still
    without a transfer is the one. A launch whose wait had ended before the transfer started is not. Paced transfers and
    real ones are matched apart, because each exchange over an emulated link has one of either.
    """
    matched: list[Launch | None] = [None] * len(transfers)
    for emulated in (True, False):
        waiting: dict[str, deque[Launch]] = {}
        for launch in launches:
            waiting.setdefault(launch.kind, deque()).append(launch)
        for index, transfer in enumerate(transfers):
            if transfer.emulated != emulated:
                continue
            # gloo carries a reduce_scatter as an all_reduce of its own
            kinds = (transfer.kind, "reduce_scatter") if transfer.kind == "all_reduce" else (transfer.kind,)
            heads = []
            for kind in kinds:
                queue = waiting.get(kind)
                while queue and queue[0].deadline < transfer.start:
                    queue.popleft()
                if queue and queue[0].start <= transfer.start:
                    heads.append((queue[0].start, kind))
            if heads:
                matched[index] = waiting[min(heads)[1]].popleft()
    return matched


def absorb(
    transfers: Sequence[Transfer], matched: Sequence[Launch | None]
) -> tuple[list[Transfer], list[Launch | None]]:
    """Makes real transfers part of the paced ones.

    Over an emulated link the bytes travel on loopback at once, and the wire's time is the paced range. A real transfer
    of the same launch is therefore dropped; where it ends later (a peer was late), the paced one lasts as long. Where
    the launch is unknown, a real transfer inside a paced one of its kind is dropped.
    """
    paced = [transfer for transfer in transfers if transfer.emulated]
    if not paced:
        return list(transfers), list(matched)
    unions = {
        kind: union_of(
            column([t for t in paced if t.kind == kind], "start"), column([t for t in paced if t.kind == kind], "end")
        )
        for kind in {transfer.kind for transfer in paced}
    }
    ends = {id(launch): t for t, launch in zip(transfers, matched, strict=True) if t.emulated and launch is not None}
    longer: dict[int, int] = {}
    dropped: set[int] = set()
    for index, (transfer, launch) in enumerate(zip(transfers, matched, strict=True)):
        if transfer.emulated or transfer.kind not in unions:
            continue
        union = unions[transfer.kind]
        start_1, end_1 = np.asarray([transfer.start]), np.asarray([transfer.end])
        of_launch = ends.get(id(launch)) if launch is not None else None
        if of_launch is not None:
            dropped.add(index)
            longer[of_launch.row] = max(of_launch.end, transfer.end)
        elif int(overlap_of(union, start_1, end_1)[0]) == transfer.end - transfer.start:
            dropped.add(index)
    kept = [
        (_stretched(transfer, longer.get(transfer.row)), launch)
        for index, (transfer, launch) in enumerate(zip(transfers, matched, strict=True))
        if index not in dropped
    ]
    return [transfer for transfer, _ in kept], [launch for _, launch in kept]


def _stretched(transfer: Transfer, end: int | None) -> Transfer:
    return transfer if end is None else replace(transfer, end=end)
