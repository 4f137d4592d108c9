"""The whole way from a file to figures, against an independent count of instants on generated traces."""

from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farskip.testing_traces import ALL_REDUCE, ALL_TO_ALL, GEMM, TraceBuilder, training_trace
from farskip.trace import inspect
from farskip.trace_report import Figures, RankReport, check_identities

NAMES = {
    "compute": GEMM,
    "all_reduce": ALL_REDUCE,
    "unknown": ALL_TO_ALL,
    "dispatch": "void deep_ep::intranode::dispatch<8>(int4*)",
    "notify": "void deep_ep::intranode::notify_dispatch<8>(int const*)",
    "copy": "Memcpy HtoD (Pinned -> Device)",
}
ROWS = st.lists(
    st.tuples(
        st.sampled_from(sorted(NAMES)),
        st.integers(0, 400),
        st.integers(0, 90),
        st.sampled_from([None, "a", "b"]),
        st.sampled_from([7, 20]),
    ),
    min_size=1,
    max_size=14,
)


def build(rows: list[tuple[str, int, int, str | None, int]], base_ns: int) -> TraceBuilder:
    trace = TraceBuilder(base_ns=base_ns)
    for kind, start, length, _, stream in rows:
        category = "gpu_memcpy" if kind == "copy" else "kernel"
        trace.kernel(NAMES[kind], start, start + length, stream=stream, launched=False, category=category)
    return trace


class Counted:
    """The same figures from sets of instants: no interval arithmetic, no shared code."""

    def __init__(self, rows: list[tuple[str, int, int, str | None, int]]) -> None:
        sets = [(kind, start, set(range(start, start + length))) for kind, start, length, _, _ in rows]
        compute = set().union(*(s for kind, _, s in sets if kind == "compute"))
        copies = set().union(*(s for kind, _, s in sets if kind == "copy"))
        transfers = [(kind, start, s) for kind, start, s in sets if kind not in ("compute", "copy")]
        communication = set().union(*(s for _, _, s in transfers))
        first = min(start for _, start, _, _, _ in rows)
        last = max(start + length for _, start, length, _, _ in rows)
        self.window = last - first
        self.compute = len(compute)
        self.communication = len(communication)
        self.hidden = len(communication & compute)
        self.copies_only = len(copies - compute - communication)
        self.idle = self.window - len(compute | communication | copies)
        self.total: dict[str, int] = defaultdict(int)
        self.group_hidden: dict[str, int] = defaultdict(int)
        self.summed: dict[str, int] = defaultdict(int)
        self.count: dict[str, int] = defaultdict(int)
        for kind, _, s in transfers:
            self.count[kind] += 1
            self.summed[kind] += len(s)
        for at in communication:
            owner = min((start, number, kind) for number, (kind, start, s) in enumerate(transfers) if at in s)[2]
            self.total[owner] += 1
            self.group_hidden[owner] += at in compute


def measure(trace: TraceBuilder, **options: object) -> RankReport:
    with TemporaryDirectory() as folder:
        return inspect(trace.write(Path(folder) / "rank0.json"), **options).ranks[0]  # type: ignore[arg-type]


@settings(max_examples=150, deadline=None)
@given(ROWS, st.sampled_from([0, 4_344_994_097_173_810, 1_712_195_495_505_582_988]))
def test_figures_agree_with_a_count_of_instants(
    rows: list[tuple[str, int, int, str | None, int]], base_ns: int
) -> None:
    report, counted = measure(build(rows, base_ns)), Counted(rows)
    assert report.window_ns == counted.window
    assert report.compute_ns == counted.compute
    assert report.communication_ns == counted.communication
    assert report.hidden_ns == counted.hidden
    assert report.exposed_ns == counted.communication - counted.hidden
    assert report.copies_only_ns == counted.copies_only
    assert report.idle_ns == counted.idle
    for kind, figures in report.collectives.items():
        assert figures == Figures(
            count=counted.count[kind],
            summed_ns=counted.summed[kind],
            total_ns=counted.total[kind],
            hidden_ns=counted.group_hidden[kind],
        )
    assert set(report.collectives) == set(counted.count)
    assert sum(stretch.length_ns for stretch in report.stretches) == report.exposed_ns


def test_a_training_trace_adds_up_and_attributes_everything(tmp_path: Path) -> None:
    report = inspect(training_trace(steps=3, layers=5).write(tmp_path / "rank0.json.gz")).ranks[0]
    assert set(report.layers) == set(range(5))
    assert set(report.steps) == {0, 1, 2}
    assert set(report.phases) == {"dispatch", "combine"}
    assert set(report.collectives) == {"all_to_all"}
    assert report.unattributed == Figures()
    assert report.figures.count == 3 * 5 * 2
    assert report.overlap_percent is not None and 0.0 < report.overlap_percent < 100.0


def test_no_communication_is_an_answer() -> None:
    trace = TraceBuilder()
    trace.kernel(GEMM, 0, 100)
    report = measure(trace)
    assert report.overlap_percent is None
    assert report.collectives == {}
    assert any("no communication" in note for note in report.notes)


def test_communication_of_no_length_has_no_percentage() -> None:
    trace = TraceBuilder()
    trace.kernel(GEMM, 0, 100)
    trace.kernel(ALL_REDUCE, 50, 50, stream=20)
    report = measure(trace)
    assert report.figures.count == 1
    assert report.overlap_percent is None
    assert any("no length" in note for note in report.notes)


def test_no_device_events_is_an_answer() -> None:
    trace = TraceBuilder()
    trace.operator("aten::mm", 0, 50)
    trace.range("nccl:all_to_all", 60, 70)
    report = measure(trace)
    assert report.device == "none"
    assert report.overlap_percent is None
    assert any("no device events" in note for note in report.notes)


def test_peer_copies_are_communication_and_other_copies_are_nothing() -> None:
    trace = TraceBuilder()
    trace.kernel(GEMM, 0, 40)
    trace.copy(20, 60, name="Memcpy PtoP (Device -> Device)", stream=20)
    trace.copy(70, 100)
    report = measure(trace)
    assert report.collectives == {"send_recv": Figures(count=1, summed_ns=40, total_ns=40, hidden_ns=20)}
    assert (report.copies_only_ns, report.idle_ns) == (30, 10)


def test_synchronization_rows_are_no_device_work() -> None:
    trace = TraceBuilder()
    trace.kernel(GEMM, 0, 40)
    trace.stream_wait(500, stream=7, waits_on=20)
    assert measure(trace).window_ns == 40


def test_the_edge_of_the_window_is_told_apart() -> None:
    trace = TraceBuilder()
    trace.kernel(ALL_REDUCE, 0, 30, stream=20)
    trace.kernel(GEMM, 30, 50)
    trace.kernel(ALL_REDUCE, 50, 65, stream=20)
    trace.kernel(GEMM, 65, 80)
    trace.kernel(ALL_REDUCE, 80, 100, stream=20)
    report = measure(trace)
    assert (report.exposed_ns, report.edge_exposed_ns) == (65, 50)


def test_identities_are_asserted() -> None:
    trace = TraceBuilder()
    trace.kernel(ALL_REDUCE, 0, 30, stream=20)
    report = measure(trace)
    from dataclasses import replace

    with pytest.raises(AssertionError, match="parts"):
        check_identities(replace(report, idle_ns=report.idle_ns + 1))
    with pytest.raises(AssertionError, match="phases"):
        check_identities(replace(report, unattributed=Figures()))


def test_several_devices_in_one_file_need_a_choice() -> None:
    trace = TraceBuilder()
    trace.kernel(GEMM, 0, 40, device=0)
    trace.kernel(GEMM, 0, 90, device=3)
    with pytest.raises(ValueError, match=r"several devices \(0, 3\); choose one with --device"):
        measure(trace)
    assert measure(trace, device=3).window_ns == 90
    with pytest.raises(ValueError, match="no rows of device 1; the file has 0, 3"):
        measure(trace, device=1)
