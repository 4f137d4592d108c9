"""What a trace file becomes once read: one table of rows in integer nanoseconds, and what the file says of its job.

This file decides which kinds of rows exist. It holds no rule about what counts as communication or compute: that is
``trace_recognize`` (device rows) and ``trace_host`` (rows of a CPU trace).

Legend: R rows of one trace file.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]
Int32 = NDArray[np.int32]
Bool = NDArray[np.bool_]

NOT_GIVEN = -1


class Category(IntEnum):
    """The kinds of rows that are kept; a reader drops all else (flow arrows, Python frames, instants)."""

    KERNEL = 0
    COPY = 1
    SYNC = 2
    DEVICE_RANGE = 3
    CPU_OP = 4
    RANGE = 5
    RUNTIME = 6


DEVICE_WORK = (Category.KERNEL, Category.COPY)


@dataclass(frozen=True, kw_only=True, slots=True)
class CollectiveDetails:
    """What the profiler wrote next to a collective: the arguments of one row, as they stand in the file."""

    collective: str = ""
    group: str = ""
    group_ranks: str = ""
    group_size: int = NOT_GIVEN
    in_elements: int = NOT_GIVEN
    out_elements: int = NOT_GIVEN
    dtype: str = ""

    def size_key(self) -> tuple[str, str, int, int, str]:
        """What has to agree between two ranks before two rows may be the same collective."""
        return (self.collective, self.group, self.in_elements, self.out_elements, self.dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncDetails:
    """A ``cuda_sync`` row: which stream (or the host, -1) waited for which stream."""

    kind: str
    waits_on_stream: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RowTable:
    """All kept rows of one trace, column by column, in file order.

    Attributes:
        category_R: int8 ``Category``.
        name_R: int32 index into ``names``.
        lane_R: int32 index into ``lanes`` (process, thread): the thread of a host row, the stream of a device row.
        start_R, end_R: int64 nanoseconds on the file's own clock; ``end >= start``.
        correlation_R: int64 id that links a kernel with its launch; -1 if the row has none.
        stream_R, device_R: int32; -1 if the row has none.
        sequence_R: int64 autograd sequence number of a cpu_op; -1 if it has none.
        forward_thread_R: int32, not 0 on the rows of a backward operator that carry a sequence number.
        shape_R: int32 index into ``shapes`` (grid and block of a kernel, input sizes of a host range); -1 if unknown.
        names: the distinct names.
        shapes: the distinct launch shapes, as text.
        lanes: the distinct (process, thread) pairs, as text.
        collectives: row -> the arguments that the profiler wrote for a collective.
        syncs: row -> what a synchronization row waited for.
    """

    category_R: NDArray[np.int8]
    name_R: Int32
    lane_R: Int32
    start_R: Int64
    end_R: Int64
    correlation_R: Int64
    stream_R: Int32
    device_R: Int32
    sequence_R: Int64
    forward_thread_R: Int32
    shape_R: Int32
    names: tuple[str, ...]
    shapes: tuple[str, ...]
    lanes: tuple[tuple[str, str], ...]
    collectives: Mapping[int, CollectiveDetails]
    syncs: Mapping[int, SyncDetails]

    def rows_of(self, *categories: Category) -> Int64:
        """Indices of the rows of these categories, in file order."""
        mask = np.zeros(len(self.category_R), dtype=np.bool_)
        for category in categories:
            mask |= self.category_R == category
        return np.flatnonzero(mask)

    def name_of(self, row: int) -> str:
        """The name of one row."""
        return self.names[int(self.name_R[row])]

    def shape_of(self, row: int) -> str:
        """The launch shape of one row, "" if unknown."""
        shape = int(self.shape_R[row])
        return self.shapes[shape] if shape >= 0 else ""


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceFile:
    """One trace file: its rows, and what it says about the job and the rank that wrote it.

    Attributes:
        path: where it was read from.
        source: "kineto" or "nsight".
        rank: of the default process group; None if neither the file nor its name says.
        rank_from: "file" if distributedInfo says so, "name" if the file's name does, "" if nothing does.
        world_size: None if the file has no distributedInfo.
        backend: of the default process group, "" if unknown.
        base_ns: what has to be added to the rows' stamps to get the time of day; None if the file does not say.
        thread_names: lane -> the name that the operating system had for the thread.
        has_steps: whether the file carries ``ProfilerStep#N`` ranges at all.
        stamps_are_float: whether any stamp was written with a fraction (the HTA-compatible mode rounds those).
        notes: one line for everything that was left out while reading.
        size_bytes: length of the JSON text (uncompressed), or of the database file.
    """

    path: str
    source: str
    rank: int | None
    rank_from: str
    world_size: int | None
    backend: str
    base_ns: int | None
    thread_names: Mapping[int, str]
    stamps_are_float: bool
    notes: tuple[str, ...]
    size_bytes: int
    rows: RowTable
