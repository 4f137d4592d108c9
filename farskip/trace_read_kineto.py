"""Reads Kineto / Chrome JSON traces (plain or gzip) in parts, so that memory stays below the file's own size.

The file is cut at places where one event ends and the next begins. Such a place is recognized by a closing brace, a
comma, an opening brace, a quote and a letter: inside a JSON string a quote is either escaped or ends the string, and
the end of a string is never followed by a letter, so a cut never falls inside a name. A file that does not cut that
way is decoded whole.

Refused, each with one line: an empty file, a file that ends inside an event, JSON that is no trace.
"""

import gzip
import re
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from farskip.trace_kineto_events import KinetoReading, add_events
from farskip.trace_model import TraceFile

PART_BYTES = 4 << 20
_HEAD_LIMIT_BYTES = 64 << 20
_EVENTS_KEY = re.compile(rb'"traceEvents"\s*:\s*\[')
_CUT = re.compile(rb'\}\s*(,)\s*\{\s*"[A-Za-z]')
_RANK_IN_NAME = re.compile(r"rank[-_. ]?(\d+)", re.IGNORECASE)


def read_kineto(path: str | Path) -> TraceFile:
    """Reads one trace; the file is opened for reading only.

    Args:
        path: ``.json`` or ``.json.gz``; gzip is recognized by content, not by name.

    Returns:
        The trace.

    Raises:
        ValueError: the file is empty, truncated, no trace or one without events; names the file and the remedy.
        OSError: the path cannot be read.
    """
    reading = KinetoReading(path=str(path))
    try:
        meta = _read_parts(reading)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{path}: the gzip data is damaged or cut off ({error}); copy or export the trace again"
        ) from None
    info = meta.get("distributedInfo")
    info = info if isinstance(info, dict) else {}
    rank, rank_from = _rank(info, reading.path)
    world_size, base_ns = info.get("world_size"), meta.get("baseTimeNanoseconds")
    notes = (
        (f"{reading.num_dropped} rows without a start or with a negative duration were left out",)
        if reading.num_dropped
        else ()
    )
    rows = reading.store.finish()
    if not len(rows.start_R) and not reading.num_dropped:
        raise ValueError(
            f"{path}: traceEvents has no event with a time; profile a whole step and export the trace again"
        )
    return TraceFile(
        path=reading.path,
        source="kineto",
        rank=rank,
        rank_from=rank_from,
        world_size=world_size if isinstance(world_size, int) else None,
        backend=str(info.get("backend", "")),
        base_ns=base_ns if isinstance(base_ns, int) else None,
        thread_names=reading.thread_names,
        stamps_are_float=reading.stamps_are_float,
        notes=notes,
        size_bytes=reading.size_bytes,
        rows=rows,
    )


def open_bytes(path: str | Path) -> BinaryIO:
    """Opens a trace for reading, through gzip if its first two bytes say so."""
    with open(path, "rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if is_gzip else open(path, "rb")  # type: ignore[return-value]


def _rank(info: dict[str, Any], path: str) -> tuple[int | None, str]:
    if isinstance(info.get("rank"), int):
        return info["rank"], "file"
    match = _RANK_IN_NAME.search(Path(path).name)
    return (int(match.group(1)), "name") if match else (None, "")


def _read_parts(reading: KinetoReading) -> dict[str, Any]:
    """Decodes the file part by part and returns what stands outside ``traceEvents``."""
    with open_bytes(reading.path) as file:
        buffer = file.read(PART_BYTES)
        reading.size_bytes = len(buffer)
        if not buffer.strip():
            raise ValueError(f"{reading.path}: the file is empty; the run ended before the profiler exported its trace")
        opening = None
        is_list = buffer.lstrip().startswith(b"[")
        while not is_list:
            opening = _EVENTS_KEY.search(buffer)
            if opening or len(buffer) > _HEAD_LIMIT_BYTES:
                break
            more = file.read(PART_BYTES)
            reading.size_bytes += len(more)
            if not more:
                break
            buffer += more
        if opening is None and not is_list:
            _refuse_without_events(reading.path, buffer)
        head = b"" if opening is None else buffer[: opening.start()] + b'"traceEvents":[]}'
        rest = buffer.lstrip()[1:] if opening is None else buffer[opening.end() :]
        del buffer
        try:
            return _decode_stream(reading, file, head, rest, is_list)
        except msgspec.DecodeError:
            pass
    fresh = KinetoReading(path=reading.path)
    meta = _decode_whole(fresh)
    for name in ("store", "thread_names", "stamps_are_float", "num_dropped", "size_bytes"):
        setattr(reading, name, getattr(fresh, name))
    return meta


def _refuse_without_events(path: str, buffer: bytes) -> None:
    try:
        msgspec.json.decode(buffer)
    except msgspec.DecodeError as error:
        reason = "truncated" if "truncated" in str(error) else f"no JSON ({_position(error)})"
        raise ValueError(f"{path}: {reason} before any trace event; export the trace again") from None
    raise ValueError(
        f"{path}: JSON without the list traceEvents; give a Kineto / Chrome trace (profiler.export_chrome_trace) "
        "or an Nsight Systems SQLite export"
    )


def _decode_stream(reading: KinetoReading, file: BinaryIO, head: bytes, rest: bytes, is_list: bool) -> dict[str, Any]:
    """Decodes part by part in one buffer: the comma where a part ends becomes its closing bracket for the moment."""
    meta = msgspec.json.decode(head) if head else {}
    buffer = bytearray(max(2 * PART_BYTES, len(rest) + PART_BYTES) + 1)
    buffer[0:1] = b"["
    buffer[1 : 1 + len(rest)] = rest
    filled = 1 + len(rest)
    with memoryview(buffer) as view:
        while (count := file.readinto(view[filled : filled + PART_BYTES])) > 0:  # type: ignore[attr-defined]
            reading.size_bytes += count
            filled += count
            cut = _last_cut(buffer, filled)
            if cut is None:
                if filled + PART_BYTES > len(buffer):
                    raise msgspec.DecodeError("no cut")
                continue
            view[cut : cut + 1] = b"]"
            add_events(reading, view[: cut + 1])
            left = bytes(view[cut + 1 : filled])
            view[1 : 1 + len(left)] = left
            filled = 1 + len(left)
            if filled + PART_BYTES > len(buffer):
                raise msgspec.DecodeError("one event as long as a part")
    rest = bytes(buffer[1:filled])
    if is_list:
        text = rest.rstrip().rstrip(b",")
        add_events(reading, b"[" + (text if text.endswith(b"]") else text + b"]"))
        return {}
    tail = msgspec.json.decode(b'{"traceEvents":[' + rest, type=dict[str, msgspec.Raw])
    add_events(reading, bytes(tail.pop("traceEvents")))
    return {**meta, **{key: msgspec.json.decode(value) for key, value in tail.items()}}


def _last_cut(text: bytearray, length: int) -> int | None:
    """Where the last comma between two events stands, or None."""
    reach = 1 << 12
    while True:
        found = None
        for match in _CUT.finditer(text, max(length - reach, 0), length):
            found = match.start(1)
        if found is not None or reach >= length:
            return found
        reach *= 16


def _decode_whole(reading: KinetoReading) -> dict[str, Any]:
    """The slow way, for a file that the cutting rule does not fit, or that is damaged: says where."""
    with open_bytes(reading.path) as file:
        text = file.read()
    reading.size_bytes = len(text)
    try:
        document = msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        count = len(re.findall(rb'"ph"\s*:', text))
        if "truncated" in str(error):
            raise ValueError(
                f"{reading.path}: truncated after {len(text)} bytes, inside or behind event {count}; "
                "wait until the profiler has finished writing, or export the trace again"
            ) from None
        raise ValueError(f"{reading.path}: not valid JSON ({_position(error)}); export the trace again") from None
    events = document.get("traceEvents") if isinstance(document, dict) else document
    if not isinstance(events, list):
        raise ValueError(f"{reading.path}: traceEvents is not a list; give a Kineto / Chrome trace")
    if not all(isinstance(event, dict) for event in events):
        raise ValueError(f"{reading.path}: traceEvents holds entries that are no events; give a Kineto / Chrome trace")
    raw = msgspec.json.decode(text, type=dict[str, msgspec.Raw])["traceEvents"] if isinstance(document, dict) else text
    add_events(reading, bytes(raw), raw_events=events)
    return {k: v for k, v in document.items() if k != "traceEvents"} if isinstance(document, dict) else {}


def _position(error: Exception) -> str:
    match = re.search(r"byte (\d+)", str(error))
    return f"at byte {match.group(1)}" if match else "at its start"
