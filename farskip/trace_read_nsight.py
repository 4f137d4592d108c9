"""Reads Nsight Systems SQLite exports (``nsys export --type sqlite``), opened read-only and immutable.

Kernels, copies, memsets, runtime calls and NVTX ranges are taken from the tables that the export documents. A database
without the table of kernels is refused with the remedy; every other table may be missing. Which stream waited for which
is not taken from it, so what compute waited for is always marked inferred.
"""

import re
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from farskip.trace_columns import ColumnStore
from farskip.trace_model import Category, TraceFile

_KERNELS = "CUPTI_ACTIVITY_KIND_KERNEL"
_COPIES = (("CUPTI_ACTIVITY_KIND_MEMCPY", "Memcpy"), ("CUPTI_ACTIVITY_KIND_MEMSET", "Memset"))
_RUNTIME = "CUPTI_ACTIVITY_KIND_RUNTIME"
_NVTX = "NVTX_EVENTS"
# CUpti_ActivityMemcpyKind, as the export stores it
_COPY_KINDS = {
    1: "HtoD",
    2: "DtoH",
    3: "HtoA",
    4: "AtoH",
    5: "AtoA",
    6: "AtoD",
    7: "DtoA",
    8: "DtoD",
    9: "HtoH",
    10: "PtoP",
}
# eventType of NVTX_EVENTS: push/pop ranges, and start/end ranges
_NVTX_RANGES = (59, 60)
_RANK_IN_NAME = re.compile(r"rank[-_. ]?(\d+)", re.IGNORECASE)


def read_nsight(path: str | Path) -> TraceFile:
    """Reads one export.

    Args:
        path: the ``.sqlite`` file.

    Returns:
        The trace; NVTX ranges stand for annotations, so our range names work as in a Kineto trace.

    Raises:
        ValueError: no SQLite database, or one without the tables needed.
    """
    uri = f"{Path(path).resolve().as_uri()}?mode=ro&immutable=1"
    try:
        connection = sqlite3.connect(uri, uri=True)
        try:
            return _read(connection, str(path))
        finally:
            connection.close()
    except sqlite3.DatabaseError as error:
        raise ValueError(
            f"{path}: no readable SQLite database ({error}); export the report again with nsys export"
        ) from None


def _read(connection: sqlite3.Connection, path: str) -> TraceFile:
    tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if _KERNELS not in tables or "StringIds" not in tables:
        missing = _KERNELS if _KERNELS not in tables else "StringIds"
        raise ValueError(
            f"{path}: the table {missing} is missing; profile with nsys profile --trace=cuda,nvtx and export with "
            "nsys export --type sqlite"
        )
    strings: dict[int, str] = dict(connection.execute("SELECT id, value FROM StringIds"))
    store = ColumnStore()
    _add_kernels(connection, store, strings)
    for table, label in _COPIES:
        if table in tables:
            _add_copies(connection, store, table, label)
    if _RUNTIME in tables:
        _add_runtime(connection, store, strings)
    if _NVTX in tables:
        _add_ranges(connection, store, strings)
    match = _RANK_IN_NAME.search(Path(path).name)
    return TraceFile(
        path=path,
        source="nsight",
        rank=int(match.group(1)) if match else None,
        rank_from="name" if match else "",
        world_size=None,
        backend="",
        base_ns=_base_ns(connection) if "TARGET_INFO_SESSION_START_TIME" in tables else None,
        thread_names={},
        stamps_are_float=False,
        notes=(),
        size_bytes=Path(path).stat().st_size,
        rows=store.finish(),
    )


def _base_ns(connection: sqlite3.Connection) -> int | None:
    if "utcEpochNs" not in _columns(connection, "TARGET_INFO_SESSION_START_TIME"):
        return None
    row = connection.execute("SELECT utcEpochNs FROM TARGET_INFO_SESSION_START_TIME").fetchone()
    return None if row is None or row[0] is None else int(row[0])


def _columns(connection: sqlite3.Connection, table: str) -> set[str]:
    return {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}


def _select(connection: sqlite3.Connection, table: str, wanted: Iterable[str]) -> list[tuple[Any, ...]]:
    """Rows of a table; a column that this version of the export lacks reads as NULL."""
    known = _columns(connection, table)
    listing = ", ".join(name if name in known else f"NULL AS {name}" for name in wanted)
    return connection.execute(f"SELECT {listing} FROM {table} WHERE start IS NOT NULL ORDER BY start").fetchall()


def _number(value: Any) -> int:
    return -1 if value is None else int(value)


def _correlation(number: Any, global_id: Any) -> int:
    """A correlation id unique over the processes of one export; a global id has the process in bits 24 to 47."""
    if number is None:
        return -1
    return (((int(global_id) >> 24) & 0xFFFFFF) << 32) + int(number) if global_id is not None else int(number)


def _add_kernels(connection: sqlite3.Connection, store: ColumnStore, strings: dict[int, str]) -> None:
    sizes = ("gridX", "gridY", "gridZ", "blockX", "blockY", "blockZ")
    names_of = ("demangledName", "shortName")
    wanted = ("start", "end", "deviceId", "streamId", "correlationId", "globalPid", *names_of, *sizes)
    rows = _select(connection, _KERNELS, wanted)
    names = [strings.get(row[6]) or strings.get(row[7]) or "unnamed kernel" for row in rows]
    shapes = [f"{list(row[8:11])} x {list(row[11:14])}" for row in rows]
    _add_device_rows(store, Category.KERNEL, rows, names, shapes)


def _add_copies(connection: sqlite3.Connection, store: ColumnStore, table: str, label: str) -> None:
    wanted = ("start", "end", "deviceId", "streamId", "correlationId", "globalPid", "copyKind")
    rows = _select(connection, table, wanted)
    names = [f"{label} {_COPY_KINDS.get(row[6], '')}".strip() for row in rows]
    _add_device_rows(store, Category.COPY, rows, names, None)


def _add_device_rows(
    store: ColumnStore, category: Category, rows: list[tuple[Any, ...]], names: list[str], shapes: list[str] | None
) -> None:
    if not rows:
        return
    start = np.asarray([row[0] for row in rows], dtype=np.int64)
    end = np.asarray([row[0] if row[1] is None else row[1] for row in rows], dtype=np.int64)
    store.add(
        {
            "category": np.full(len(rows), int(category)),
            "name": [store.names[name] for name in names],
            "lane": [store.lanes[(f"device {_number(row[2])}", f"stream {_number(row[3])}")] for row in rows],
            "start": start,
            "end": np.maximum(start, end),
            "correlation": [_correlation(row[4], row[5]) for row in rows],
            "stream": [_number(row[3]) for row in rows],
            "device": [_number(row[2]) for row in rows],
            **({} if shapes is None else {"shape": [store.shapes[shape.encode()] for shape in shapes]}),
        },
        {},
        {},
    )


def _add_runtime(connection: sqlite3.Connection, store: ColumnStore, strings: dict[int, str]) -> None:
    rows = _select(connection, _RUNTIME, ("start", "end", "globalTid", "correlationId", "nameId"))
    if not rows:
        return
    # The export appends a version to names of the API, as in cudaLaunchKernel_v7000.
    names = [re.sub(r"_v\d+$", "", strings.get(row[4], "runtime call")) for row in rows]
    _add_host_rows(store, Category.RUNTIME, rows, names, [_correlation(row[3], row[2]) for row in rows])


def _add_ranges(connection: sqlite3.Connection, store: ColumnStore, strings: dict[int, str]) -> None:
    rows = _select(connection, _NVTX, ("start", "end", "globalTid", "eventType", "text", "textId"))
    rows = [row for row in rows if row[3] in _NVTX_RANGES and row[1] is not None]
    if rows:
        names = [row[4] or strings.get(row[5]) or "unnamed range" for row in rows]
        _add_host_rows(store, Category.RANGE, rows, names, None)


def _add_host_rows(
    store: ColumnStore,
    category: Category,
    rows: list[tuple[Any, ...]],
    names: list[str],
    correlations: list[int] | None,
) -> None:
    start = np.asarray([row[0] for row in rows], dtype=np.int64)
    end = np.asarray([row[0] if row[1] is None else row[1] for row in rows], dtype=np.int64)
    store.add(
        {
            "category": np.full(len(rows), int(category)),
            "name": [store.names[name] for name in names],
            "lane": [store.lanes[("host", f"thread {_number(row[2])}")] for row in rows],
            "start": start,
            "end": np.maximum(start, end),
            **({} if correlations is None else {"correlation": correlations}),
        },
        {},
        {},
    )
