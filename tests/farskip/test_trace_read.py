"""Reading: exact stamps, cutting in parts, bad input in one line, inputs untouched."""

import gzip
import hashlib
import json
import os
import sqlite3
from pathlib import Path

import numpy as np
import pytest

import farskip.trace_read_kineto as reader
from farskip.testing_traces import ALL_REDUCE, GEMM, TraceBuilder, training_trace
from farskip.trace import inspect
from farskip.trace_model import Category
from farskip.trace_read import read_trace

TRICKY = 'void f<{lambda()#1}, {"ph"}, {\\"cat\\": 1}>(int)}, {"ph": "X"'


def tables_agree(a: object, b: object) -> bool:
    columns = [name for name in type(a).__slots__ if name.endswith("_R")]  # type: ignore[attr-defined]
    same = all(np.array_equal(getattr(a, name), getattr(b, name)) for name in columns)
    return same and all(getattr(a, name) == getattr(b, name) for name in ("names", "lanes", "shapes", "collectives"))


@pytest.mark.parametrize("base_ns", [0, 4_344_994_097_173_810, 1_712_195_495_505_582_988])
def test_stamps_survive_to_the_nanosecond(tmp_path: Path, base_ns: int) -> None:
    trace = TraceBuilder(base_ns=base_ns)
    stamps = [(1, 4), (988, 1_987), (1_000, 2_000), (123_457, 123_458)]
    for start, end in stamps:
        trace.kernel(GEMM, start, end, launched=False)
    rows = read_trace(trace.write(tmp_path / "rank0.json")).rows
    assert list(zip((rows.start_R - base_ns).tolist(), (rows.end_R - base_ns).tolist(), strict=True)) == stamps


@pytest.mark.parametrize("metadata_last", [False, True])
@pytest.mark.parametrize("part_bytes", [700, 1_999, 1 << 22])
def test_cutting_in_parts_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part_bytes: int, metadata_last: bool
) -> None:
    trace = training_trace(steps=2, layers=2, kernels=6)
    for at in range(0, 3_000, 300):
        trace.kernel(TRICKY, at, at + 10, launched=False)
    path = trace.write(tmp_path / "rank0.json", metadata_last=metadata_last)
    whole = read_trace(path)
    monkeypatch.setattr(reader, "PART_BYTES", part_bytes)
    parts = read_trace(path)
    assert tables_agree(whole.rows, parts.rows)
    assert (parts.rank, parts.world_size, parts.size_bytes) == (0, 8, path.stat().st_size)
    assert TRICKY in parts.rows.names


def test_parts_really_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = training_trace(steps=2, layers=2, kernels=6)
    for at in range(0, 3_000, 30):
        trace.kernel(TRICKY, at, at + 10, launched=False)
    path = trace.write(tmp_path / "rank0.json")
    monkeypatch.setattr(reader, "PART_BYTES", 4_000)
    monkeypatch.setattr(reader, "_decode_whole", lambda reading: pytest.fail("fell back to decoding the whole file"))
    assert len(read_trace(path).rows.start_R) > 50


def test_a_file_that_cannot_be_cut_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = json.loads(training_trace(steps=1, layers=1, kernels=4).text())
    # Objects inside an event's arguments look like the border between two events.
    document["traceEvents"][0]["args"]["list"] = [{"ph": number} for number in range(400)]
    path = tmp_path / "rank0.json"
    path.write_text(json.dumps(document))
    whole = read_trace(path)
    monkeypatch.setattr(reader, "PART_BYTES", 1_000)
    assert tables_agree(whole.rows, read_trace(path).rows)


def test_gzip_is_recognized_by_content(tmp_path: Path) -> None:
    trace = training_trace(steps=1, layers=1)
    plain, packed = trace.write(tmp_path / "rank0.json"), tmp_path / "rank0.trace"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert tables_agree(read_trace(plain).rows, read_trace(packed).rows)


def test_a_bare_list_of_events_is_a_chrome_trace(tmp_path: Path) -> None:
    events = json.dumps(json.loads(training_trace(steps=1, layers=1).text())["traceEvents"])
    path = tmp_path / "rank3.json"
    # The Chrome format allows the closing bracket to be missing.
    for text in (events, events[:-1], events[:-1] + ",\n"):
        path.write_text(text)
        trace = read_trace(path)
        assert (trace.rank, trace.rank_from) == (3, "name")
        assert len(trace.rows.rows_of(Category.KERNEL)) == 22


def test_begin_and_end_events_become_ranges(tmp_path: Path) -> None:
    common = {"pid": 1, "tid": 2, "name": "forward"}
    events = [
        {"ph": "B", "cat": "user_annotation", "ts": 10, **common},
        {"ph": "B", "cat": "unknown", "ts": 11, **common},
        {"ph": "E", "ts": 12, **common},
        {"ph": "E", "ts": 20, **common},
    ]
    path = tmp_path / "rank0.json"
    path.write_text(json.dumps({"traceEvents": events}))
    rows = read_trace(path).rows
    assert [(int(rows.start_R[i]), int(rows.end_R[i])) for i in rows.rows_of(Category.RANGE)] == [(10_000, 20_000)]


def test_arguments_of_unusual_types_are_left_out_not_fatal(tmp_path: Path) -> None:
    trace = TraceBuilder()
    trace.kernel(GEMM, 0, 10_000, launched=False)
    trace.events[0]["args"].update({"Collective name": 7, "correlation": "12", "stream": "7", "In msg nelems": "many"})
    trace.events[0]["pid"] = None
    trace.operator("aten::mm", 0, 5_000, **{"Sequence number": 2**64 - 1})
    rows = read_trace(trace.write(tmp_path / "rank0.json")).rows
    assert (rows.correlation_R[0], rows.stream_R[0]) == (12, 7)
    assert rows.sequence_R[1] == -1
    assert 0 not in rows.collectives


def test_rows_without_a_start_or_with_negative_length_are_counted(tmp_path: Path) -> None:
    trace = TraceBuilder()
    trace.kernel(GEMM, 0, 10_000, launched=False)
    trace.kernel(GEMM, 20_000, 15_000, launched=False)
    report = inspect(trace.write(tmp_path / "rank0.json")).ranks[0]
    assert report.window_ns == 10_000
    assert any("1 rows without a start or with a negative duration" in note for note in report.notes)


def one_line(path: Path, expected: str) -> None:
    with pytest.raises(ValueError, match=expected) as caught:
        inspect(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and ";" in message, message


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.95, 0.999])
def test_truncated_json(tmp_path: Path, share: float) -> None:
    text = training_trace(steps=1, layers=2).text()
    path = tmp_path / "rank0.json"
    path.write_bytes(text[: int(len(text) * share)])
    one_line(path, "truncated")


def test_truncated_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = training_trace(steps=1, layers=2).text()
    path = tmp_path / "rank0.json"
    path.write_bytes(text[:-40])
    monkeypatch.setattr(reader, "PART_BYTES", 3_000)
    one_line(path, "truncated")


def test_truncated_gzip(tmp_path: Path) -> None:
    path = tmp_path / "rank0.json.gz"
    path.write_bytes(gzip.compress(training_trace(steps=1, layers=2).text())[:-200])
    one_line(path, "gzip data is damaged")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty"),
        (" \n ", "is empty"),
        ("{}", "without the list traceEvents"),
        ('{"nodes": []}', "without the list traceEvents"),
        ("42", "without the list traceEvents"),
        ("not json", "no JSON"),
        ('{"traceEvents": {"a": 1}}', "without the list traceEvents"),
        ('{"traceEvents": [1, 2]}', "no events"),
        ('{"traceEvents": [{"ph": "X"},]}', "not valid JSON"),
    ],
)
def test_wrong_schema(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "rank0.json"
    path.write_text(text)
    one_line(path, expected)


@pytest.mark.parametrize(
    "text", ['{"traceEvents": []}', "[]", '{"traceEvents": [{"ph": "M", "name": "process_name"}]}']
)
def test_a_trace_without_any_row(text: str, tmp_path: Path) -> None:
    path = tmp_path / "rank0.json"
    path.write_text(text)
    one_line(path, "traceEvents has no event with a time; profile a whole step")


def test_unreadable_paths(tmp_path: Path) -> None:
    one_line(tmp_path / "absent.json", "cannot be read")
    one_line(tmp_path, "cannot be read")


def test_mixed_jobs_and_ranks(tmp_path: Path) -> None:
    small = {"steps": 1, "layers": 1, "kernels": 2}
    a = training_trace(rank=0, world_size=8, **small).write(tmp_path / "a.json")
    b = training_trace(rank=1, world_size=16, **small).write(tmp_path / "b.json")
    c = training_trace(rank=0, world_size=8, **small).write(tmp_path / "c.json")
    d = training_trace(rank=9, world_size=8, **small).write(tmp_path / "d.json")
    with pytest.raises(ValueError, match=r"mixed jobs.*world_size 8.*16"):
        inspect([a, b])
    with pytest.raises(ValueError, match="rank 0 twice"):
        inspect([a, c])
    with pytest.raises(ValueError, match="rank 9 does not fit world_size 8"):
        inspect([a, d])
    with pytest.raises(ValueError, match="given twice"):
        inspect([a, a])
    with pytest.raises(ValueError, match="no trace given"):
        inspect([])


def test_a_missing_rank_comes_from_the_name_or_is_asked_for(tmp_path: Path) -> None:
    trace = TraceBuilder(rank=None)
    trace.kernel(GEMM, 0, 10)
    alone = trace.write(tmp_path / "trace.json")
    assert inspect(alone).ranks[0].rank == 0
    named = [trace.write(tmp_path / f"run-rank_{rank}.json") for rank in (5, 2)]
    assert [report.rank for report in inspect(named).ranks] == [2, 5]
    with pytest.raises(ValueError, match=r"trace\.json: neither its distributedInfo nor its name"):
        inspect([alone, *named])


def test_ranks_in_processes_of_their_own_give_the_same_figures(tmp_path: Path) -> None:
    paths = [training_trace(rank=rank, steps=1).write(tmp_path / f"rank{rank}.json") for rank in range(2)]
    assert inspect(paths, processes=2).to_json() == inspect(paths, processes=1).to_json()


def test_inputs_stay_byte_identical(tmp_path: Path) -> None:
    path = training_trace(steps=1).write(tmp_path / "rank0.json.gz")
    database = nsight_export(tmp_path / "rank0.sqlite")
    before = {p: (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns) for p in (path, database)}
    listing = sorted(os.listdir(tmp_path))
    inspect(path)
    inspect(database)
    assert {p: (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns) for p in before} == before
    assert sorted(os.listdir(tmp_path)) == listing, "reading a database must leave no journal behind"


def test_a_database_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(connection: sqlite3.Connection, path: str) -> None:
        connection.execute("CREATE TABLE written (a INT)")

    monkeypatch.setattr("farskip.trace_read_nsight._read", write)
    with pytest.raises(ValueError, match="readonly database"):
        read_trace(nsight_export(tmp_path / "rank0.sqlite"))


def nsight_export(path: Path, *, without: str = "") -> Path:
    """A small export: one kernel, one all-reduce under it, launched inside one of our ranges."""
    connection = sqlite3.connect(path)
    tables = {
        "StringIds": "id INTEGER PRIMARY KEY, value TEXT NOT NULL",
        "CUPTI_ACTIVITY_KIND_KERNEL": "start INT, end INT, deviceId INT, contextId INT, streamId INT, "
        "correlationId INT, globalPid INT, demangledName INT, shortName INT, gridX INT, gridY INT, gridZ INT, "
        "blockX INT, blockY INT, blockZ INT",
        "CUPTI_ACTIVITY_KIND_MEMCPY": "start INT, end INT, deviceId INT, streamId INT, correlationId INT, copyKind INT",
        "CUPTI_ACTIVITY_KIND_RUNTIME": "start INT, end INT, globalTid INT, correlationId INT, nameId INT",
        "NVTX_EVENTS": "start INT, end INT, eventType INT, text TEXT, textId INT, globalTid INT",
        "TARGET_INFO_SESSION_START_TIME": "utcEpochNs INT, utcTime TEXT, localTime TEXT",
    }
    process = 4_242 << 24
    rows = {
        "StringIds": [(1, GEMM), (2, ALL_REDUCE), (3, "cudaLaunchKernel_v7000"), (4, "ProfilerStep#3")],
        "CUPTI_ACTIVITY_KIND_KERNEL": [
            (100, 200, 0, 1, 7, 11, process, 1, 1, 8, 1, 1, 128, 1, 1),
            (150, 260, 0, 1, 20, 12, process, 2, 2, 8, 1, 1, 128, 1, 1),
        ],
        "CUPTI_ACTIVITY_KIND_MEMCPY": [(270, 290, 0, 7, 13, 8)],
        "CUPTI_ACTIVITY_KIND_RUNTIME": [(50, 55, process + 7, 11, 3), (60, 65, process + 7, 12, 3)],
        "NVTX_EVENTS": [
            (40, 90, 59, None, 4, process + 7),
            (58, 70, 59, "farskip::L004::dispatch::launch", None, process + 7),
            (61, None, 34, "a mark", None, process + 7),
        ],
        "TARGET_INFO_SESSION_START_TIME": [(1_000, "", "")],
    }
    for table, columns in tables.items():
        if table == without:
            continue
        connection.execute(f"CREATE TABLE {table} ({columns})")
        for row in rows[table]:
            connection.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(row))})", row)
    connection.commit()
    connection.close()
    return path


def test_an_nsight_export(tmp_path: Path) -> None:
    report = inspect(nsight_export(tmp_path / "rank5.sqlite")).ranks[0]
    assert report.rank == 5 and report.base_ns == 1_000
    assert (report.window_ns, report.compute_ns, report.communication_ns, report.hidden_ns) == (190, 100, 110, 50)
    assert (report.copies_only_ns, report.idle_ns) == (20, 10)
    assert set(report.phases) == {"dispatch"} and set(report.layers) == {4} and set(report.steps) == {3}
    assert all(
        stretch.evidence == "inferred" or stretch.cause != "waits for collective" for stretch in report.stretches
    )


@pytest.mark.parametrize("table", ["CUPTI_ACTIVITY_KIND_KERNEL", "StringIds"])
def test_an_export_without_the_tables_needed(tmp_path: Path, table: str) -> None:
    one_line(nsight_export(tmp_path / "rank0.sqlite", without=table), f"the table {table} is missing")


@pytest.mark.parametrize("table", ["CUPTI_ACTIVITY_KIND_MEMCPY", "CUPTI_ACTIVITY_KIND_RUNTIME", "NVTX_EVENTS"])
def test_an_export_without_the_other_tables(tmp_path: Path, table: str) -> None:
    assert inspect(nsight_export(tmp_path / "rank0.sqlite", without=table)).ranks[0].communication_ns == 110


def test_a_damaged_database(tmp_path: Path) -> None:
    path = nsight_export(tmp_path / "rank0.sqlite")
    path.write_bytes(path.read_bytes()[:100] + b"\x00" * 3_000)
    one_line(path, "no readable SQLite database")


def test_correlations_of_two_processes_in_one_export_stay_apart(tmp_path: Path) -> None:
    path = nsight_export(tmp_path / "rank0.sqlite")
    connection = sqlite3.connect(path)
    other = 4_243 << 24
    row = (40, 45, other + 9, 12, 3)
    connection.execute("INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME VALUES (?, ?, ?, ?, ?)", row)
    connection.execute("INSERT INTO NVTX_EVENTS VALUES (30, 300, 59, 'wrong', NULL, ?)", (other + 9,))
    connection.commit()
    connection.close()
    assert set(inspect(path).ranks[0].phases) == {"dispatch"}
