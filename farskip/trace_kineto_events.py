"""Decodes lists of Kineto / Chrome events into rows: one typed pass, a lenient pass for fields of unusual types, and a
pass with stamps as text where a 64-bit float would lose nanoseconds.

This file decides which events are kept (``CATEGORIES``) and which of their arguments. Spans written as a pair of begin
and end events are joined per thread.
"""

import json
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from farskip.trace_columns import ColumnStore, InexactStampError, nanoseconds_from_digits, nanoseconds_from_us
from farskip.trace_model import Category, CollectiveDetails, Int64, SyncDetails


class _Categories(dict[str, int]):
    """Category of an event's ``cat``, also where a writer capitalized it; -1 for what is not kept."""

    def __missing__(self, name: str) -> int:
        self[name] = self.get(name.lower(), -1)
        return self[name]


# Plain integers: an enum member per row would double the time to build a column.
_CATEGORIES = {
    name: int(category)
    for name, category in {
        "kernel": Category.KERNEL,
        "gpu_memcpy": Category.COPY,
        "gpu_memset": Category.COPY,
        "memcpy": Category.COPY,
        "memset": Category.COPY,
        "cuda_sync": Category.SYNC,
        "gpu_user_annotation": Category.DEVICE_RANGE,
        "cpu_op": Category.CPU_OP,
        "operator": Category.CPU_OP,
        "user_annotation": Category.RANGE,
        "cuda_runtime": Category.RUNTIME,
        "cuda_driver": Category.RUNTIME,
        "hip_runtime": Category.RUNTIME,
        "xpu_runtime": Category.RUNTIME,
        "runtime": Category.RUNTIME,
    }.items()
}
_KERNEL, _RANGE, _SYNC = int(Category.KERNEL), int(Category.RANGE), int(Category.SYNC)
_TOO_LARGE = 2**62


class _Arguments(msgspec.Struct, gc=False):
    correlation: int | str = -1
    stream: int | str = -1
    device: int | str = -1
    sequence: int | str = msgspec.field(default=-1, name="Sequence number")
    forward_thread: int | str = msgspec.field(default=-1, name="Fwd thread id")
    collective: str = msgspec.field(default="", name="Collective name")
    group: str | int = msgspec.field(default="", name="Process Group Name")
    group_ranks: str | list[int] = msgspec.field(default="", name="Process Group Ranks")
    group_size: int = msgspec.field(default=-1, name="Group size")
    in_elements: int = msgspec.field(default=-1, name="In msg nelems")
    out_elements: int = msgspec.field(default=-1, name="Out msg nelems")
    dtype: str = msgspec.field(default="", name="dtype")
    grid: msgspec.Raw = msgspec.Raw(b"")
    block: msgspec.Raw = msgspec.Raw(b"")
    input_sizes: msgspec.Raw = msgspec.field(default=msgspec.Raw(b""), name="Input Dims")
    sync_kind: str = msgspec.field(default="", name="cuda_sync_kind")
    sync_waits_on: int = msgspec.field(default=-1, name="wait_on_stream")
    name: msgspec.Raw = msgspec.Raw(b"")


class _Event(msgspec.Struct, gc=False):
    ph: str = ""
    cat: str = ""
    name: str | int | float | None = ""
    pid: int | str | float = 0
    tid: int | str | float = 0
    ts: int | float | None = None
    dur: int | float | None = None
    args: _Arguments | None = None


class _ExactEvent(msgspec.Struct, gc=False):
    exact_ts: msgspec.Raw = msgspec.field(default=msgspec.Raw(b""), name="ts")
    exact_dur: msgspec.Raw = msgspec.field(default=msgspec.Raw(b""), name="dur")


_DECODER = msgspec.json.Decoder(list[_Event], strict=False)
_EXACT_DECODER = msgspec.json.Decoder(list[_ExactEvent], strict=False)


@dataclass(kw_only=True, slots=True)
class KinetoReading:
    """What grows while one file is read."""

    path: str
    store: ColumnStore = field(default_factory=ColumnStore)
    thread_names: dict[int, str] = field(default_factory=dict)
    stamps_are_float: bool = False
    num_dropped: int = 0
    open_spans: dict[tuple[Any, Any], list[_Event]] = field(default_factory=dict)
    size_bytes: int = 0


def add_events(
    reading: KinetoReading, text: bytes | memoryview, raw_events: list[dict[str, Any]] | None = None
) -> None:
    """Decodes one list of events and appends the rows that are kept."""
    try:
        events: list[_Event] = _DECODER.decode(text)
    except msgspec.ValidationError:
        events = [_lenient(event) for event in (raw_events or json.loads(bytes(text)))]
        _append(reading, events, None)
        return
    try:
        _append(reading, events, None)
    except InexactStampError:
        _append(reading, events, _EXACT_DECODER.decode(text))


def _lenient(event: Any) -> _Event:
    """One event whose fields do not have the usual types: what cannot be read as the type needed is left out."""
    if not isinstance(event, dict):
        raise msgspec.DecodeError("an event is no object")
    known: dict[str, Any] = {}
    for name in ("ph", "cat", "name", "pid", "tid", "ts", "dur"):
        try:
            known[name] = msgspec.convert(event[name], _FIELD_TYPES[name], strict=False)
        except (KeyError, msgspec.ValidationError):
            continue
    arguments = {}
    raw = event.get("args")
    for key, value in raw.items() if isinstance(raw, dict) else ():
        try:
            msgspec.convert({key: value}, _Arguments, strict=False)
        except msgspec.ValidationError:
            continue
        arguments[key] = value
    return _Event(**known, args=msgspec.json.decode(msgspec.json.encode(arguments), type=_Arguments, strict=False))


_FIELD_TYPES: dict[str, Any] = {
    "ph": str,
    "cat": str,
    "name": str,
    "pid": int | str,
    "tid": int | str,
    "ts": int | float,
    "dur": int | float,
}


def _append(reading: KinetoReading, events: list[_Event], exact: list[_ExactEvent] | None) -> None:
    """Turns decoded events into columns; ``exact`` holds the same events with their stamps as text."""
    kept_as = _Categories(_CATEGORIES)
    is_span = [event.ph == "X" for event in events]
    spans = list(compress(events, is_span))
    categories = np.array([kept_as[event.cat] for event in spans], dtype=np.int8)
    is_kept = (categories >= 0) & np.array([event.ts is not None for event in spans], dtype=np.bool_)
    if exact is None:
        starts, float_starts = nanoseconds_from_us([event.ts or 0 for event in spans])
        durations, float_durations = nanoseconds_from_us([event.dur or 0 for event in spans])
    else:
        texts = list(compress(exact, is_span))
        starts, float_starts = nanoseconds_from_digits([bytes(text.exact_ts) or b"0" for text in texts])
        durations, float_durations = nanoseconds_from_digits([bytes(text.exact_dur) or b"0" for text in texts])
    # From here on nothing raises: a part that has to be decoded again has left no trace.
    is_kept &= durations >= 0
    reading.num_dropped += int(((categories >= 0) & ~is_kept).sum())
    reading.stamps_are_float = reading.stamps_are_float or float_starts or float_durations
    kept = list(compress(spans, is_kept.tolist()))
    _store(reading, kept, categories[is_kept], starts[is_kept], (starts + durations)[is_kept])
    if len(spans) < len(events):
        _append_others(reading, [event for event in events if event.ph in ("M", "B", "E")])


def _append_others(reading: KinetoReading, events: list[_Event]) -> None:
    """Names of threads, and spans written as a begin and an end."""
    joined = []
    kept_as = _Categories(_CATEGORIES)
    for event in events:
        if event.ph == "M":
            if event.name == "thread_name" and event.args is not None:
                lane = reading.store.lanes[(event.pid, event.tid)]
                reading.thread_names[lane] = str(msgspec.json.decode(bytes(event.args.name) or b'""'))
        elif event.ts is not None:
            stack = reading.open_spans.setdefault((event.pid, event.tid), [])
            if event.ph == "B":
                stack.append(event)
            elif stack:
                begin = stack.pop()
                begin.dur = event.ts - (begin.ts or 0)
                if kept_as[begin.cat] >= 0 and begin.dur >= 0:
                    joined.append(begin)
    if joined:
        starts, _ = nanoseconds_from_us([event.ts or 0 for event in joined])
        durations, _ = nanoseconds_from_us([event.dur or 0 for event in joined])
        categories = np.asarray([kept_as[event.cat] for event in joined], dtype=np.int8)
        _store(reading, joined, categories, starts, starts + durations)


def _store(
    reading: KinetoReading, kept: list[_Event], categories: NDArray[np.int8], starts: Int64, ends: Int64
) -> None:
    store, none = reading.store, _Arguments()
    arguments = [event.args or none for event in kept]
    names, lanes, shapes = store.names, store.lanes, store.shapes
    shape_R = np.full(len(kept), -1, dtype=np.int32)
    is_kernel, is_range = categories == _KERNEL, categories == _RANGE
    shape_R[is_kernel] = [
        shapes[bytes(a.grid) + b" x " + bytes(a.block)] for a in compress(arguments, is_kernel.tolist())
    ]
    shape_R[is_range] = [shapes[bytes(a.input_sizes)] for a in compress(arguments, is_range.tolist())]
    store.add(
        {
            "category": categories,
            "name": [names[event.name] for event in kept],
            "lane": [lanes[(event.pid, event.tid)] for event in kept],
            "start": starts,
            "end": ends,
            "correlation": _integers([argument.correlation for argument in arguments]),
            "stream": _integers([argument.stream for argument in arguments]),
            "device": _integers([argument.device for argument in arguments]),
            "sequence": _integers([argument.sequence for argument in arguments]),
            "forward_thread": _integers([argument.forward_thread for argument in arguments]),
            "shape": shape_R,
        },
        {row: _details(arguments[row]) for row, argument in enumerate(arguments) if argument.collective},
        {
            row: SyncDetails(kind=arguments[row].sync_kind, waits_on_stream=arguments[row].sync_waits_on)
            for row in np.flatnonzero(categories == _SYNC).tolist()
            if arguments[row].sync_kind
        },
    )


def _details(argument: _Arguments) -> CollectiveDetails:
    return CollectiveDetails(
        collective=argument.collective,
        group=str(argument.group),
        group_ranks=str(argument.group_ranks),
        group_size=argument.group_size,
        in_elements=argument.in_elements,
        out_elements=argument.out_elements,
        dtype=argument.dtype,
    )


def _integers(values: list[int | str]) -> Int64:
    """Arguments as numbers; -1 for what is no number or does not fit (autograd writes 2**64 - 1 for none)."""
    try:
        return np.array(values, dtype=np.int64)
    except (ValueError, OverflowError):
        fitting = [v if type(v) is int and v < _TOO_LARGE else _integer(v) for v in values]
        return np.array(fitting, dtype=np.int64)


def _integer(value: int | str) -> int:
    try:
        number = int(value)
    except ValueError:
        return -1
    return number if number < _TOO_LARGE else -1
