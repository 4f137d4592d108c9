"""Conditions, comparison with a baseline, and the machine-readable outputs."""

import csv
import gzip
import io
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from farskip.testing_traces import ALL_REDUCE, GEMM, TraceBuilder, training_trace
from farskip.trace import TraceReport, inspect
from farskip.trace_assert import exit_code, junit, parse_condition
from farskip.trace_csv import COLUMNS, render_csv
from farskip.trace_json import encode
from farskip.trace_perfetto import PROCESS, write_perfetto
from farskip.trace_terminal import render_comparison, render_terminal

MS = 1_000_000


def build(hidden_ms: dict[str, int], *, rank: int = 0, steps: int = 2, layer: int = 3) -> TraceBuilder:
    """Per step: a dispatch and a combine of 10 ms each, of which so much runs under compute; steps of 50 ms."""
    trace = TraceBuilder(rank=rank)
    for step in range(steps):
        at = step * 50 * MS
        trace.step(step, at, at + 50 * MS)
        for stage, offset in (("dispatch", 5), ("combine", 25)):
            start = at + offset * MS
            trace.range(f"farskip::L{layer:03d}::{stage}::launch", start - 2 * MS, start - MS)
            trace.kernel(ALL_REDUCE, start, start + 10 * MS, stream=20, launch=start - MS - 500)
            if hidden_ms[stage]:
                trace.kernel(GEMM, start, start + hidden_ms[stage] * MS, launch=start - MS)
        trace.kernel(GEMM, at + 40 * MS, at + 45 * MS, launch=at + 3 * MS)
    return trace


def report_of(tmp_path: Path, *traces: TraceBuilder) -> TraceReport:
    return inspect([trace.write(tmp_path / f"{id(trace)}.json") for trace in traces])


@pytest.fixture
def one(tmp_path: Path) -> TraceReport:
    return report_of(tmp_path, build({"dispatch": 10, "combine": 8}))


@pytest.mark.parametrize(
    ("text", "outcome", "says"),
    [
        ("overlap >= 90%", "holds", "90.00%"),
        ("overlap>=90.1%", "does not hold", "90.00%"),
        ("overlap > 90%", "does not hold", "90.00%"),
        ("exposed <= 2ms/step", "holds", "2.000 ms/step"),
        ("exposed <= 1999us / step", "does not hold", "2.000 ms/step"),
        ("exposed < 0.0041s", "holds", "4.000 ms"),
        ("dispatch.overlap >= 100%", "holds", "100.00%"),
        ("combine.overlap == 80%", "holds", "80.00%"),
        ("combine.exposed <= 4ms", "holds", "4.000 ms"),
        ("layer[3].exposed <= 1ms", "does not hold", "4.000 ms"),
        ("step[1].exposed <= 2ms", "holds", "2.000 ms"),
        ("all_reduce.count == 4", "holds", "4"),
        ("all.total >= 40ms", "holds", "40.000 ms"),
        ("communication <= 20ms/step", "holds", "20.000 ms/step"),
        ("layer[4].exposed <= 1ms", "cannot be judged", "no communication in layer[4] (found: 3)"),
        ("gather.overlap >= 1%", "cannot be judged", "found: all_reduce, combine, dispatch"),
    ],
)
def test_conditions(one: TraceReport, text: str, outcome: str, says: str) -> None:
    (judgement,) = one.judge([text])
    assert judgement.outcome == outcome
    assert says in judgement.message


@pytest.mark.parametrize(
    "text",
    [
        "",
        "overlap",
        "overlap >= 85",
        "overlap >= 85ms",
        "overlap >= 85%/step",
        "exposed <= 2",
        "exposed <= 2%",
        "exposed => 2ms",
        "speed >= 2ms",
        "layer[3].window <= 1ms",
        "count >= 2ms",
    ],
)
def test_what_is_no_condition(text: str) -> None:
    with pytest.raises(ValueError, match="--assert"):
        parse_condition(text)


def test_the_worst_rank_decides(tmp_path: Path) -> None:
    good, bad = build({"dispatch": 10, "combine": 10}), build({"dispatch": 10, "combine": 2}, rank=1)
    report = report_of(tmp_path, good, bad)
    overlap, exposed, least = report.judge(["overlap >= 80%", "exposed <= 1ms/step", "hidden >= 30ms"])
    assert overlap.outcome == "does not hold" and "60.00% on rank 1 (the worst)" in overlap.message
    assert exposed.outcome == "does not hold" and "8.000 ms/step on rank 1" in exposed.message
    assert least.outcome == "does not hold" and "24.000 ms on rank 1" in least.message


def test_both_directions_of_a_stage_count_together(tmp_path: Path) -> None:
    trace = TraceBuilder()
    trace.kernel(GEMM, 0, 10 * MS)
    for suffix, at in (("", 0), ("::backward", 20 * MS)):
        trace.range(f"farskip::L000::dispatch::launch{suffix}", at, at + 10)
        trace.kernel(ALL_REDUCE, at + 20, at + 10 * MS, stream=20, launch=at + 5)
    both, backward = report_of(tmp_path, trace).judge(["dispatch.overlap >= 50%", "dispatch::backward.overlap >= 1%"])
    assert both.outcome == "holds" and "50.00%" in both.message
    assert backward.outcome == "does not hold"


def test_what_cannot_be_judged_is_no_success(tmp_path: Path) -> None:
    silent, stepless, hostonly = TraceBuilder(), TraceBuilder(), TraceBuilder()
    silent.kernel(GEMM, 0, 10)
    stepless.kernel(ALL_REDUCE, 0, 10, stream=20)
    hostonly.range("nccl:all_reduce", 0, 10)
    for trace, text, says in (
        (silent, "overlap >= 0%", "no communication"),
        (silent, "exposed <= 9ms", "no communication"),
        (stepless, "exposed <= 2ms/step", "marks no steps"),
        (hostonly, "compute >= 0ms", "no device events"),
    ):
        judgements = report_of(tmp_path, trace).judge([text])
        assert judgements[0].outcome == "cannot be judged" and says in judgements[0].message
        assert exit_code(judgements) == 2


def test_exit_codes(one: TraceReport) -> None:
    assert exit_code(one.judge(["overlap >= 1%"])) == 0
    assert exit_code(one.judge(["overlap >= 1%", "overlap >= 99%"])) == 1
    assert exit_code(one.judge(["overlap >= 99%", "gather.overlap >= 1%"])) == 1
    assert exit_code(one.judge(["overlap >= 1%", "gather.overlap >= 1%"])) == 2


def test_junit(one: TraceReport) -> None:
    suite = ElementTree.fromstring(junit(one.judge(["overlap >= 1%", "overlap >= 99%", "x.overlap >= 1%"]), 0.5))[0]
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("3", "1", "1")
    assert [[child.tag for child in case] for case in suite] == [["system-out"], ["failure"], ["error"]]
    assert "90.00% on rank 0" in str(suite[1][0].get("message"))


def test_against_a_baseline(tmp_path: Path) -> None:
    before = report_of(tmp_path, build({"dispatch": 0, "combine": 8}))
    after = report_of(tmp_path, build({"dispatch": 9, "combine": 6}))
    comparison = after.against(before)
    assert comparison.per == "step"
    assert (comparison.step_ns.before_ns, comparison.step_ns.after_ns) == (50 * MS, 50 * MS)
    assert (comparison.exposed.before_ns, comparison.exposed.after_ns) == (12 * MS, 5 * MS)
    assert comparison.overlap_percent == (40.0, 75.0)
    changes = {(row.kind, row.name): row.change_ns for row in comparison.rows}
    assert changes[("phase", "dispatch")] == -9 * MS and changes[("phase", "combine")] == 2 * MS
    assert changes[("layer", "layer 3")] == -7 * MS
    text = render_comparison(comparison)
    assert "became hidden: phase dispatch, 9.000 ms less exposed" in text
    assert "got slower: phase combine, 2.000 ms more exposed" in text


def test_without_steps_the_window_is_compared(tmp_path: Path) -> None:
    traces = []
    for length in (10, 20):
        trace = TraceBuilder()
        trace.kernel(ALL_REDUCE, 0, length * MS, stream=20)
        traces.append(report_of(tmp_path, trace))
    comparison = traces[1].against(traces[0])
    assert comparison.per == "window" and comparison.step_ns.name == "window"


def test_incomparable_pairs_are_refused(tmp_path: Path, one: TraceReport) -> None:
    silent, cpu = TraceBuilder(), TraceBuilder(backend="gloo")
    silent.kernel(GEMM, 0, 10)
    cpu.operator("aten::mm", 0, 10)
    cpu.range("gloo:all_reduce", 0, 10, thread=5)
    other_rank = report_of(tmp_path, build({"dispatch": 1, "combine": 1}, rank=1))
    other_layer = report_of(tmp_path, build({"dispatch": 1, "combine": 1}, layer=4))
    hta = inspect(one.ranks[0].path, mode="hta")
    for baseline, says in (
        (other_rank, "the same ranks"),
        (report_of(tmp_path, cpu), "gpu trace"),
        (report_of(tmp_path, silent), "no communication"),
        (other_layer, "different models"),
        (hta, "different modes"),
    ):
        with pytest.raises(ValueError, match=f"not comparable.*{says}"):
            one.against(baseline)


FIGURES = {"count", "summed_ms", "total_ms", "hidden_ms", "exposed_ms", "overlap_percent"}


def test_the_json_schema(tmp_path: Path) -> None:
    report = inspect(training_trace(steps=2, layers=2).write(tmp_path / "rank0.json"))
    document = json.loads(encode(report.to_json()))
    assert set(document) == {"event_set", "ranks"}
    (rank,) = document["ranks"]
    assert set(rank) == {
        "rank",
        "window_ms",
        "compute_ms",
        "communication_ms",
        "hidden_ms",
        "exposed_ms",
        "copies_only_ms",
        "idle_ms",
        "overlap_percent",
        "collectives",
        "phases",
        "layers",
        "steps",
        "unattributed",
        "exposed_stretches",
    }
    for group, key in (("collectives", "name"), ("phases", "phase"), ("layers", "layer"), ("steps", "step")):
        assert rank[group] and all(set(row) == FIGURES | {key} for row in rank[group])
    assert set(rank["unattributed"]) == FIGURES
    stretch = {"start_ms", "ms", "cause", "waits_for", "evidence"}
    assert all(set(row) == stretch for row in rank["exposed_stretches"])
    assert all(isinstance(rank[key], float) for key in rank if key.endswith("_ms"))
    assert [row["layer"] for row in rank["layers"]] == [0, 1]
    # Sums of milliseconds in floating point: a thousand parts of 1e2 ms lose at most 1e-10.
    assert sum(row["total_ms"] for row in rank["layers"]) == pytest.approx(rank["communication_ms"], abs=1e-9)
    assert sum(row["ms"] for row in rank["exposed_stretches"]) == pytest.approx(rank["exposed_ms"], abs=1e-9)


def test_unknown_layers_and_missing_percentages_are_null(tmp_path: Path) -> None:
    trace = TraceBuilder()
    trace.kernel(ALL_REDUCE, 5, 5, stream=20)
    trace.kernel(GEMM, 0, 10)
    (rank,) = report_of(tmp_path, trace).to_json()["ranks"]
    assert rank["overlap_percent"] is None and rank["layers"][0]["layer"] is None and rank["steps"][0]["step"] is None


def test_details_hold_the_rest(one: TraceReport) -> None:
    details = json.loads(encode(one.details(one.against(one))))
    assert set(details) == {"ranks", "skew", "comparison"}
    assert details["ranks"][0]["step_ms"] == {"0": 50.0, "1": 50.0}
    assert details["ranks"][0]["exposed_inside_ms"] + details["ranks"][0]["exposed_at_the_edge_ms"] == 4.0
    assert {name["counted_as"] for name in details["ranks"][0]["names"]} == {"compute", "communication: all_reduce"}


def test_csv(one: TraceReport) -> None:
    rows = list(csv.DictReader(io.StringIO(render_csv(one.ranks))))
    assert tuple(rows[0]) == COLUMNS
    found = {(row["group"], row["name"]): row for row in rows}
    assert float(found[("phase", "combine")]["exposed_ms"]) == 4.0
    assert float(found[("rank", "0")]["overlap_percent"]) == 90.0
    assert found[("unattributed", "")]["overlap_percent"] == ""
    assert ("layer", "3") in found and ("step", "1") in found


def test_terminal(one: TraceReport) -> None:
    text = render_terminal(one.ranks, one.skew, show_names=True)
    first = text.splitlines()[1].split()
    assert first[0] == "0" and first[-2:] == ["90.00", "%"]
    for expected in (
        "event set: mode = exact",
        "why exposed: kernel gap 4.000 ms",
        "layer 3",
        "names (counted as",
        "alone us",
    ):
        assert expected in text
    assert max(len(line) for line in render_terminal(one.ranks, one.skew).splitlines() if "event set" not in line) < 200


def test_the_whole_in_one_line(one: TraceReport) -> None:
    assert one.line() == "trace: window 90.000 ms, communication 40.000 ms, exposed 4.000 ms, 90.0% hidden"


def test_one_line_per_traced_step(one: TraceReport) -> None:
    assert one.step_lines() == [
        "trace step 0: 50.000 ms, communication 20.000 ms, exposed 2.000 ms, 90.0% hidden",
        "trace step 1: 50.000 ms, communication 20.000 ms, exposed 2.000 ms, 90.0% hidden",
    ]


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("source", ["rank0.json", "rank0.json.gz"])
def test_perfetto_keeps_the_trace_and_adds_lanes(tmp_path: Path, source: str, compressed: bool) -> None:
    base_ns = 1_712_195_495_505_582_988
    trace = TraceBuilder(base_ns=base_ns)
    trace.kernel(GEMM, 0, 1_500)
    trace.kernel(ALL_REDUCE, 1_000, 2_001, stream=20)
    path = trace.write(tmp_path / source)
    out = io.BytesIO()
    write_perfetto(inspect(path).ranks[0], str(path), out, compressed=compressed)
    written = gzip.decompress(out.getvalue()) if compressed else out.getvalue()
    events = json.loads(written)["traceEvents"]
    assert [event for event in events if event["pid"] != PROCESS] == json.loads(trace.text())["traceEvents"]
    # As text: a float of this size cannot hold the nanoseconds.
    assert f'"ts":{(base_ns + 1_000) // 1000}.{(base_ns + 1_000) % 1000:03d},"dur":0.500'.encode() in written
    assert f'"ts":{(base_ns + 1_500) // 1000}.{(base_ns + 1_500) % 1000:03d},"dur":0.501'.encode() in written
    spans = [(event["name"], event["tid"]) for event in events if event["pid"] == PROCESS and event["ph"] == "X"]
    assert spans == [("hidden", 1), ("nothing left to overlap", 2), ("all_reduce", 3)]


def test_perfetto_of_an_empty_list_of_events(tmp_path: Path) -> None:
    path = tmp_path / "rank0.json"
    path.write_text(
        '{"traceEvents": [{"ph": "X", "cat": "cpu_op", "name": "a", "ts": 1, "dur": 1, "pid": 1, "tid": 1}]}'
    )
    report = inspect(path).ranks[0]
    path.write_text('{"traceEvents": [ ]}')  # nothing to put a comma behind
    out = io.BytesIO()
    write_perfetto(report, str(path), out, compressed=False)
    assert len(json.loads(out.getvalue())["traceEvents"]) == 5
