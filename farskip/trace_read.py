"""From paths to one report per rank: which reader a file needs, which rank it is, and whether the files are one job.

Ranks are measured one by one, or in processes of their own where that pays. A file is opened for reading only.
"""

import gc
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from farskip.trace_model import TraceFile
from farskip.trace_options import InspectOptions
from farskip.trace_read_kineto import read_kineto
from farskip.trace_read_nsight import read_nsight
from farskip.trace_report import RankReport
from farskip.trace_tables import rank_report

PARALLEL_FROM_BYTES = 48 << 20
"""Below this, starting processes costs more than they save."""

_SQLITE_MAGIC = b"SQLite format 3\x00"


@dataclass(frozen=True, kw_only=True, slots=True)
class _FileResult:
    """What comes back from the measuring of one file."""

    path: str
    rank: int | None
    rank_from: str
    world_size: int | None
    backend: str
    num_steps: int
    report: RankReport


def read_trace(path: str | Path) -> TraceFile:
    """Reads one trace of any known kind; the kind is recognized by content.

    Args:
        path: Kineto / Chrome JSON, plain or gzip, or an Nsight Systems SQLite export.

    Returns:
        The trace.

    Raises:
        ValueError: the path cannot be read, or is no trace; one line that says what to do.
    """
    try:
        with open(path, "rb") as file:
            magic = file.read(len(_SQLITE_MAGIC))
        if magic.startswith(b"SQLite"):
            return read_nsight(path)
        return read_kineto(path)
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read ({error.strerror or error}); check the path and its permissions"
        ) from None


def measure_files(
    paths: Sequence[str | Path], options: InspectOptions, *, processes: int | None = None
) -> list[RankReport]:
    """Measures every file.

    Args:
        paths: one per rank.
        options: what the user asked for.
        processes: how many files to read at the same time; None decides by size and processor cores.

    Returns:
        One report per rank, by rank.

    Raises:
        ValueError: a file is bad, or the files are not one job.
    """
    if not paths:
        raise ValueError("no trace given; name one file per rank")
    names = [str(path) for path in paths]
    duplicates = sorted({name for name in names if names.count(name) > 1})
    if duplicates:
        raise ValueError(f"{duplicates[0]}: given twice; name every rank's file once")
    count = _num_processes(names) if processes is None else processes
    if count > 1 and len(names) > 1:
        # Spawned, not forked: the caller may hold threads.
        with ProcessPoolExecutor(min(count, len(names)), multiprocessing.get_context("spawn")) as pool:
            results = list(pool.map(_measure, names, [options] * len(names)))
    else:
        results = [_measure(name, options) for name in names]
    _refuse_mixed_jobs(results)
    return sorted(_with_ranks(results), key=lambda report: report.rank)


def _num_processes(names: Sequence[str]) -> int:
    try:
        total = sum(os.stat(name).st_size * (8 if name.endswith(".gz") else 1) for name in names)
    except OSError:
        return 1
    return (os.cpu_count() or 1) if total >= PARALLEL_FROM_BYTES else 1


def _measure(path: str, options: InspectOptions) -> _FileResult:
    # Millions of small objects are made and none of them in a cycle: looking for cycles takes a seventh of the time.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        trace = read_trace(path)
        report = rank_report(trace, trace.rank if trace.rank is not None else 0, options)
    finally:
        if was_enabled:
            gc.enable()
    return _FileResult(
        path=path,
        rank=trace.rank,
        rank_from=trace.rank_from,
        world_size=trace.world_size,
        backend=trace.backend,
        num_steps=report.num_steps,
        report=report,
    )


def _refuse_mixed_jobs(results: Sequence[_FileResult]) -> None:
    """Files of several jobs have no common figures."""
    for name in ("world_size", "backend"):
        known = [(getattr(result, name), result.path) for result in results if getattr(result, name) not in (None, "")]
        for value, path in known[1:]:
            if value != known[0][0]:
                raise ValueError(
                    f"mixed jobs: {known[0][1]} says {name} {known[0][0]}, {path} says {value}; "
                    "give the files of one job"
                )
    devices = [(result.report.device, result.path) for result in results if result.report.device != "none"]
    for device, path in devices[1:]:
        if device != devices[0][0]:
            raise ValueError(
                f"mixed jobs: {devices[0][1]} is a {devices[0][0]} trace, {path} a {device} trace; "
                "give the files of one job"
            )
    for result in results:
        if result.rank is not None and result.world_size is not None and result.rank >= result.world_size:
            raise ValueError(
                f"{result.path}: rank {result.rank} does not fit world_size {result.world_size}; "
                "its distributedInfo is damaged"
            )


def _with_ranks(results: Sequence[_FileResult]) -> list[RankReport]:
    """Settles the ranks: from the file, else from its name; a single file may go without."""
    if len(results) == 1 and results[0].rank is None:
        note = "the file does not say its rank; it is shown as rank 0"
        return [replace(results[0].report, rank=0, notes=(*results[0].report.notes, note))]
    seen: dict[int, str] = {}
    reports = []
    for result in results:
        if result.rank is None:
            raise ValueError(
                f"{result.path}: neither its distributedInfo nor its name says which rank it is; "
                "put rank<N> into the file's name"
            )
        if result.rank in seen:
            raise ValueError(f"rank {result.rank} twice: {seen[result.rank]} and {result.path}; give one file per rank")
        seen[result.rank] = result.path
        report = result.report
        if result.rank_from == "name":
            report = replace(report, notes=(*report.notes, "the rank is read from the file's name"))
        reports.append(report)
    return reports
