"""Answers, for rows that were launched somewhere: by whom, inside which range, for which phase, layer and step.

The phase of a collective is never read from the kernel's name. It comes, in this order, from

    launch     the ranges open on the launching thread at the launch: ours by name, else the innermost annotation
    sequence   the autograd sequence number: the ranges open when the forward operator ran, marked as backward
    main       the innermost annotation open on the main thread at the launch (backward() blocks there)
    device     the annotation that the profiler drew on the device rows (kernels replayed from a graph)

and stays "unattributed" where none of them answers.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from farskip.trace_intervals import covered_until, union_of
from farskip.trace_model import Bool, Category, Int64, RowTable

OWN_RANGE = re.compile(r"^farskip::L(\d+)::([A-Za-z0-9_]+)::(run|launch|wait)(::backward)?$")
EMULATED_LINK = re.compile(r"^farskip::emulated_link::([a-z_]+)")
_CHUNK = re.compile(r"_\d+$")
_STEP = re.compile(r"^ProfilerStep#(\d+)$")
_OTHER_TOOLS = re.compile(
    r"^(nccl:|gloo:|mpi:|ucc:|c10d::|record_param_comms|ProfilerStep#|farskip::emulated_link::|PyTorch Profiler)"
)
_LAYER_IN_NAME = re.compile(r"(?:^|[^a-z])(?:layers?|blocks?|decoder_?layer|h)[._\[# ]?(\d+)", re.IGNORECASE)

UNATTRIBUTED = "unattributed"


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnRange:
    """What one of our range names says; the label is a stage and, from the second chunk on, the chunk's number."""

    layer: int
    label: str
    verb: str
    backward: bool

    @property
    def stage(self) -> str:
        """The stage without the number of its chunk: the chunks of a collective are one phase."""
        return _CHUNK.sub("", self.label)

    @property
    def phase(self) -> str:
        """The stage, with the mark of the direction that the range names carry."""
        return f"{self.stage}::backward" if self.backward else self.stage


def parse_own_range(name: str) -> OwnRange | None:
    """Reads ``farskip::L003::dispatch::launch[::backward]``; None for any other name."""
    match = OWN_RANGE.match(name)
    if match is None:
        return None
    layer, label, verb, backward = match.groups()
    return OwnRange(layer=int(layer), label=label, verb=verb, backward=backward is not None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """What a collective was for.

    Attributes:
        phase: stage or annotation, "unattributed" if unknown.
        layer: -1 if unknown.
        backward: whether it belongs to the backward pass, as far as the source says.
        said_by: launch | sequence | main | device | "".
    """

    phase: str
    layer: int
    backward: bool
    said_by: str


NOWHERE = Place(phase=UNATTRIBUTED, layer=-1, backward=False, said_by="")


def _distinct(lanes: NDArray[np.int32]) -> list[int]:
    """The lanes that occur; counting is many times quicker than hashing for small numbers."""
    return np.flatnonzero(np.bincount(lanes)).tolist() if len(lanes) else []


class LaneRanges:
    """The ranges of one thread, searchable by time."""

    def __init__(self, rows: Int64, start_N: Int64, end_N: Int64) -> None:
        order_N = np.lexsort((-end_N, start_N))
        self._rows: list[int] = rows[order_N].tolist()
        self._starts: list[int] = start_N[order_N].tolist()
        self._ends: list[int] = end_N[order_N].tolist()
        self._parents: list[int] = []
        stack: list[int] = []
        for index, start in enumerate(self._starts):
            while stack and self._ends[stack[-1]] <= start:
                stack.pop()
            self._parents.append(stack[-1] if stack else -1)
            stack.append(index)

    def open_at(self, time_ns: int) -> list[int]:
        """Rows of the ranges open at a point in time, innermost first."""
        index = bisect_right(self._starts, time_ns) - 1
        rows = []
        while index >= 0:
            if self._ends[index] > time_ns:
                rows.append(self._rows[index])
            index = self._parents[index]
        return rows


class HostIndex:
    """Finds launches and the ranges around them in one trace. Built lazily: without communication it costs nothing."""

    def __init__(self, table: RowTable) -> None:
        self.table = table
        self._own: dict[int, OwnRange | None] = {}

    @cached_property
    def launch_R(self) -> Int64:
        """For each row: the runtime row that launched it, -1 if the file has none."""
        table = self.table
        launch_R = np.full(len(table.start_R), -1, dtype=np.int64)
        runtime = table.rows_of(Category.RUNTIME)
        runtime = runtime[table.correlation_R[runtime] >= 0]
        if not len(runtime):
            return launch_R
        order = np.argsort(table.correlation_R[runtime], kind="stable")
        runtime = runtime[order]
        keys = table.correlation_R[runtime]
        device = table.rows_of(Category.KERNEL, Category.COPY)
        device = device[table.correlation_R[device] >= 0]
        at = np.minimum(np.searchsorted(keys, table.correlation_R[device]), len(keys) - 1)
        found = keys[at] == table.correlation_R[device]
        launch_R[device[found]] = runtime[at[found]]
        return launch_R

    @cached_property
    def annotations(self) -> dict[int, LaneRanges]:
        """Lane -> the annotations of the program (not those that the profiler and the backends draw themselves)."""
        names = self._mask_of_names(lambda name: _OTHER_TOOLS.match(name) is None)
        return self._by_lane(self.table.rows_of(Category.RANGE), names)

    @cached_property
    def collective_operators(self) -> dict[int, LaneRanges]:
        """Lane -> the operators that issue collectives."""
        names = self._mask_of_names(
            lambda name: name.startswith(("nccl:", "c10d::", "gloo:", "symm_mem::")) or name == "record_param_comms"
        )
        return self._by_lane(self.table.rows_of(Category.RANGE, Category.CPU_OP), names)

    @cached_property
    def steps(self) -> list[tuple[int, int, int]]:
        """(start, end, number) of every ``ProfilerStep#N`` of the host, by start."""
        found = []
        for row in self.table.rows_of(Category.RANGE).tolist():
            match = _STEP.match(self.table.name_of(row))
            if match:
                found.append((int(self.table.start_R[row]), int(self.table.end_R[row]), int(match.group(1))))
        return sorted(set(found))

    @cached_property
    def main_lane(self) -> int:
        """The lane with the step ranges, else the one with most annotations; -1 if there is none."""
        rows = self.table.rows_of(Category.RANGE)
        step_names = self._mask_of_names(lambda name: _STEP.match(name) is not None)
        lanes = self.table.lane_R[rows[step_names[self.table.name_R[rows]]]]
        if not len(lanes):
            program = self._mask_of_names(lambda name: _OTHER_TOOLS.match(name) is None)
            lanes = self.table.lane_R[rows[program[self.table.name_R[rows]]]]
        return int(np.bincount(lanes).argmax()) if len(lanes) else -1

    @cached_property
    def _sequenced(self) -> dict[int, LaneRanges]:
        table = self.table
        rows = table.rows_of(Category.CPU_OP)
        return self._group(rows[(table.sequence_R[rows] >= 0) & (table.forward_thread_R[rows] > 0)])

    @cached_property
    def _forward_of_sequence(self) -> dict[int, int]:
        table = self.table
        rows = table.rows_of(Category.CPU_OP)
        forward = rows[(table.sequence_R[rows] >= 0) & (table.forward_thread_R[rows] <= 0)]
        return dict(zip(table.sequence_R[forward].tolist(), forward.tolist(), strict=True))

    @cached_property
    def _device_ranges(self) -> dict[int, LaneRanges]:
        names = self._mask_of_names(lambda name: _OTHER_TOOLS.match(name) is None)
        return self._by_lane(self.table.rows_of(Category.DEVICE_RANGE), names)

    def steps_at(self, time_T: Int64) -> Int64:
        """The step running at each point in time, -1 where none is."""
        if not self.steps:
            return np.full(len(time_T), -1, dtype=np.int64)
        start, end, number = (np.asarray(column, dtype=np.int64) for column in zip(*self.steps, strict=True))
        index_T = np.searchsorted(start, time_T, side="right") - 1
        inside_T = (index_T >= 0) & (end[np.maximum(index_T, 0)] > time_T)
        return np.where(inside_T, number[np.maximum(index_T, 0)], -1)

    def parents_of(self, row: int) -> list[str]:
        """Names of the collective operators open where a device row was launched, innermost first."""
        launch = int(self.launch_R[row])
        if launch < 0:
            return []
        ranges = self.collective_operators.get(int(self.table.lane_R[launch]))
        if ranges is None:
            return []
        return [self.table.name_of(found) for found in ranges.open_at(int(self.table.start_R[launch]))]

    def launched_inside_nccl(self, rows: Int64) -> Bool:
        """Which device rows were launched inside a range that torch draws around a call of NCCL."""
        inside = np.zeros(len(rows), dtype=np.bool_)
        table = self.table
        calls = table.rows_of(Category.RANGE, Category.CPU_OP)
        calls = calls[self._mask_of_names(lambda name: name.startswith("nccl:"))[table.name_R[calls]]]
        if not len(calls):
            return inside
        launch = self.launch_R[rows]
        for lane in _distinct(table.lane_R[calls]):
            of_lane = calls[table.lane_R[calls] == lane]
            union = union_of(table.start_R[of_lane], table.end_R[of_lane])
            here = np.flatnonzero((launch >= 0) & (table.lane_R[np.maximum(launch, 0)] == lane))
            time_ns = table.start_R[launch[here]]
            inside[here] = covered_until(union, time_ns + 1) > covered_until(union, time_ns)
        return inside

    def place_at(self, lane: int, time_ns: int) -> Place:
        """What a host instant on one thread belongs to (sources launch, sequence and main)."""
        ranges = self.annotations.get(lane)
        opened = ranges.open_at(time_ns) if ranges is not None else []
        if opened:
            return self._place(opened, "launch", backward=False)
        linked = self._forward_ranges(lane, time_ns)
        if linked:
            return self._place(linked, "sequence", backward=True)
        if lane != self.main_lane and self.main_lane in self.annotations:
            opened = self.annotations[self.main_lane].open_at(time_ns)
            if opened:
                return self._place(opened, "main", backward=False)
        return NOWHERE

    def place_of(self, row: int) -> Place:
        """What a device row belongs to."""
        launch = int(self.launch_R[row])
        place = NOWHERE
        if launch >= 0:
            place = self.place_at(int(self.table.lane_R[launch]), int(self.table.start_R[launch]))
        if place.said_by == "":
            ranges = self._device_ranges.get(int(self.table.lane_R[row]))
            opened = ranges.open_at(int(self.table.start_R[row])) if ranges is not None else []
            if opened:
                place = self._place(opened, "device", backward=False)
        return place

    def own_range(self, row: int) -> OwnRange | None:
        """What the name of a row says if it is one of our ranges."""
        name = int(self.table.name_R[row])
        if name not in self._own:
            self._own[name] = parse_own_range(self.table.names[name])
        return self._own[name]

    def is_own_name(self, name: str, verb: str | None = None) -> bool:
        """Whether a name is one of our ranges (with this verb)."""
        own = parse_own_range(name)
        return own is not None and verb in (None, own.verb)

    def _forward_ranges(self, lane: int, time_ns: int) -> list[int]:
        ranges = self._sequenced.get(lane)
        for row in ranges.open_at(time_ns) if ranges is not None else ():
            forward = self._forward_of_sequence.get(int(self.table.sequence_R[row]))
            if forward is not None:
                annotations = self.annotations.get(int(self.table.lane_R[forward]))
                opened = annotations.open_at(int(self.table.start_R[forward])) if annotations is not None else []
                if opened:
                    return opened
        return []

    def _place(self, opened: Sequence[int], said_by: str, *, backward: bool) -> Place:
        for row in opened:
            own = self.own_range(row)
            if own is not None:
                is_backward = own.backward or backward
                phase = f"{own.stage}::backward" if is_backward else own.stage
                return Place(phase=phase, layer=own.layer, backward=is_backward, said_by=said_by)
        names = [self.table.name_of(row) for row in opened]
        layers = [int(match.group(1)) for name in names if (match := _LAYER_IN_NAME.search(name))]
        return Place(
            phase=f"{names[0]}::backward" if backward else names[0],
            layer=layers[0] if layers else -1,
            backward=backward,
            said_by=said_by,
        )

    def _mask_of_names(self, rule: Callable[[str], bool]) -> Bool:
        return np.asarray([rule(name) for name in self.table.names], dtype=np.bool_)

    def _by_lane(self, rows: Int64, name_mask: Bool) -> dict[int, LaneRanges]:
        return self._group(rows[name_mask[self.table.name_R[rows]]] if len(rows) else rows)

    def _group(self, rows: Int64) -> dict[int, LaneRanges]:
        lanes = self.table.lane_R[rows]
        return {
            int(lane): LaneRanges(
                rows[lanes == lane], self.table.start_R[rows[lanes == lane]], self.table.end_R[rows[lanes == lane]]
            )
            for lane in _distinct(lanes)
        }
