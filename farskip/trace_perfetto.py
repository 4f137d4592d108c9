"""The trace itself with two lanes added: when communication was hidden, and when it was exposed and why.

A Kineto trace is copied byte for byte around the added events, so nothing of it is lost; an Nsight export, which is no
Chrome trace, gets a trace of the added lanes and its collectives only. Open the result in ui.perfetto.dev.
"""

import gzip
import re
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import BinaryIO, Protocol

import msgspec

from farskip.trace_exposed import describe
from farskip.trace_intervals import intersect
from farskip.trace_read_kineto import open_bytes
from farskip.trace_report import RankReport

PROCESS = 1_000_000
"""Process id of the added lanes: beyond the ids of devices, below the sort index of the profiler's own spans."""

_HIDDEN, _EXPOSED, _COLLECTIVES = 1, 2, 3
_EVENTS_KEY = re.compile(rb'"traceEvents"\s*:\s*\[')
_BLOCK = 1 << 20


class _Writable(Protocol):
    def write(self, data: bytes, /) -> object: ...


def added_events(report: RankReport) -> Iterator[bytes]:
    """The added events as JSON texts: names of the lanes, hidden pieces, exposed stretches, collectives."""
    yield _event({"ph": "M", "name": "process_name", "pid": PROCESS, "args": {"name": f"farskip, rank {report.rank}"}})
    yield _event({"ph": "M", "name": "process_sort_index", "pid": PROCESS, "args": {"sort_index": -1}})
    for lane, name in ((_HIDDEN, "hidden"), (_EXPOSED, "exposed"), (_COLLECTIVES, "collectives")):
        yield _event({"ph": "M", "name": "thread_name", "pid": PROCESS, "tid": lane, "args": {"name": name}})
    hidden = intersect(report.communication, report.compute)
    for start, end in zip(hidden.start_M.tolist(), hidden.end_M.tolist(), strict=True):
        yield _span("hidden", _HIDDEN, start, end, {})
    for stretch in report.stretches:
        start = report.window_start_ns + stretch.start_ns
        arguments = {"waits_for": stretch.waits_for, "evidence": stretch.evidence, "collective": stretch.collective}
        yield _span(stretch.cause, _EXPOSED, start, start + stretch.length_ns, arguments)
    events = report.events
    for index in range(len(events)):
        start, end = int(events.owned_start_C[index]), int(events.owned_end_C[index])
        if end > start:
            name = describe(events.kind_of(index), events.places[index])
            yield _span(name, _COLLECTIVES, start, end, {"kind": events.kind_of(index)})


def write_perfetto(report: RankReport, source: str, out: BinaryIO, *, compressed: bool) -> None:
    """Writes the trace with the added lanes.

    Args:
        report: of one rank.
        source: the file it was read from; opened for reading only.
        out: where to write.
        compressed: whether to write gzip.

    Raises:
        ValueError: the trace is not laid out so that events can be added in front.
    """
    with open(source, "rb") as file:
        is_database = file.read(6) == b"SQLite"
    with gzip.GzipFile(fileobj=out, mode="wb", compresslevel=5, mtime=0) if compressed else nullcontext(out) as target:
        if is_database:
            target.write(b'{"traceEvents":[\n' + b",\n".join(added_events(report)) + b"\n]}\n")
        else:
            _copy_with_lanes(report, source, target)


def _copy_with_lanes(report: RankReport, source: str, target: _Writable) -> None:
    with open_bytes(source) as file:
        head = file.read(_BLOCK)
        while not head.lstrip().startswith(b"[") and not _EVENTS_KEY.search(head):
            more = file.read(_BLOCK)
            if not more:
                raise ValueError(f"{source}: no list traceEvents to add lanes to")
            head += more
        match = _EVENTS_KEY.search(head)
        at = match.end() if match and not head.lstrip().startswith(b"[") else head.index(b"[") + 1
        target.write(head[:at] + b"\n")
        target.write(b",\n".join(added_events(report)))
        rest = head[at:]
        target.write((b"\n" if rest.lstrip().startswith(b"]") else b",\n") + rest)
        while block := file.read(_BLOCK):
            target.write(block)


def _event(value: dict[str, object]) -> bytes:
    return msgspec.json.encode(value)


def _span(name: str, lane: int, start: int, end: int, arguments: Mapping[str, object]) -> bytes:
    # Stamps are put in as text: a float would lose nanoseconds of stamps that count from 1970.
    return b'{"ph":"X","cat":"farskip","name":%s,"pid":%d,"tid":%d,"ts":%d.%03d,"dur":%d.%03d,"args":%s}' % (
        msgspec.json.encode(name),
        PROCESS,
        lane,
        start // 1000,
        start % 1000,
        (end - start) // 1000,
        (end - start) % 1000,
        msgspec.json.encode(arguments),
    )
