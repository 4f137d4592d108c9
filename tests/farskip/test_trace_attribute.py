"""Phase, layer and step: from the ranges open at the launch, and what answers where there are none."""

from pathlib import Path

import pytest

from farskip.testing_traces import ALL_REDUCE, AUTOGRAD_THREAD, GEMM, MAIN_THREAD, TraceBuilder
from farskip.trace import inspect
from farskip.trace_attribute import parse_own_range
from farskip.trace_report import Figures, RankReport


def measure(trace: TraceBuilder, tmp_path: Path) -> RankReport:
    return inspect(trace.write(tmp_path / "rank0.json")).ranks[0]


def collective(trace: TraceBuilder, launch: int, *, thread: int = MAIN_THREAD, name: str = ALL_REDUCE) -> None:
    trace.kernel(name, launch + 1_000, launch + 1_010, stream=20, launch=launch, thread=thread)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("farskip::L003::dispatch::launch", (3, "dispatch", "launch", False)),
        ("farskip::L127::attention_in::run::backward", (127, "attention_in", "run", True)),
        ("farskip::L000::combine::wait", (0, "combine", "wait", False)),
    ],
)
def test_our_names(name: str, expected: tuple[int, str, str, bool]) -> None:
    own = parse_own_range(name)
    assert own is not None and (own.layer, own.label, own.verb, own.backward) == expected


def test_chunks_of_a_collective_are_one_phase(tmp_path: Path) -> None:
    trace = TraceBuilder()
    for at, label in ((0, "dispatch"), (100, "dispatch_1"), (200, "dispatch_12")):
        trace.range(f"farskip::L003::{label}::launch", at, at + 50)
        collective(trace, at + 20)
    report = measure(trace, tmp_path)
    assert {phase: figures.count for phase, figures in report.phases.items()} == {"dispatch": 3}


@pytest.mark.parametrize(
    "name", ["farskip::dispatch", "farskip::L3::x", "xfarskip::L003::a::run", "farskip::L003::a::stop"]
)
def test_other_names_are_not_ours(name: str) -> None:
    assert parse_own_range(name) is None


def test_ours_wins_over_an_annotation_inside_it(tmp_path: Path) -> None:
    trace = TraceBuilder()
    trace.range("farskip::L003::dispatch::launch", 0, 100)
    trace.range("library: exchange", 10, 90)
    collective(trace, 50)
    report = measure(trace, tmp_path)
    assert set(report.phases) == {"dispatch"} and set(report.layers) == {3}


def test_the_phase_is_not_read_from_the_kernel(tmp_path: Path) -> None:
    """The gradient of a combine runs a kernel called dispatch."""
    trace = TraceBuilder()
    trace.range("farskip::L001::combine::launch::backward", 0, 100)
    collective(trace, 50, name="void deep_ep::intranode::dispatch<8>(x)")
    report = measure(trace, tmp_path)
    assert set(report.collectives) == {"dispatch"} and set(report.phases) == {"combine::backward"}


def test_foreign_ranges_count_by_the_innermost(tmp_path: Path) -> None:
    trace = TraceBuilder()
    trace.range("forward", 0, 1_000)
    trace.range("model.layers.12.mlp", 10, 500)
    trace.range("combine(F)", 20, 100)
    trace.range("nccl:all_reduce", 40, 60)
    trace.range("ProfilerStep#7", 0, 2_000)
    collective(trace, 50)
    collective(trace, 700)
    report = measure(trace, tmp_path)
    assert {phase: figures.count for phase, figures in report.phases.items()} == {"combine(F)": 1, "forward": 1}
    assert {layer: figures.count for layer, figures in report.layers.items()} == {12: 1, -1: 1}
    assert set(report.steps) == {7}


def test_backward_is_linked_by_the_sequence_number(tmp_path: Path) -> None:
    trace = TraceBuilder()
    trace.range("farskip::L005::combine::launch", 0, 100)
    trace.operator("aten::op", 10, 20, **{"Sequence number": 77, "Fwd thread id": 0})
    trace.range("## backward ##", 150, 500)
    node = "autograd::engine::evaluate_function: OpBackward"
    trace.operator(node, 200, 400, thread=AUTOGRAD_THREAD, **{"Sequence number": 77, "Fwd thread id": 1})
    collective(trace, 300, thread=AUTOGRAD_THREAD)
    report = measure(trace, tmp_path)
    assert set(report.phases) == {"combine::backward"} and set(report.layers) == {5}


def test_without_a_link_the_main_thread_answers(tmp_path: Path) -> None:
    """DDP launches its reductions from hooks on the autograd thread; backward() blocks the main thread meanwhile."""
    trace = TraceBuilder()
    trace.step(1, 0, 1_000)
    trace.range("## backward ##", 150, 500)
    collective(trace, 300, thread=AUTOGRAD_THREAD)
    assert set(measure(trace, tmp_path).phases) == {"## backward ##"}


def test_replayed_graphs_are_answered_by_the_device_rows(tmp_path: Path) -> None:
    trace = TraceBuilder()
    collective(trace, 300)
    trace.add("gpu_user_annotation", "decode", 1_000, 2_000, pid=0, tid=20)
    assert set(measure(trace, tmp_path).phases) == {"decode"}


def test_unattributed_has_a_row_of_its_own(tmp_path: Path) -> None:
    trace = TraceBuilder()
    trace.range("farskip::L003::dispatch::launch", 0, 100)
    collective(trace, 50)
    collective(trace, 400)
    trace.kernel(ALL_REDUCE, 3_000, 3_007, stream=20, launched=False)
    report = measure(trace, tmp_path)
    assert report.unattributed == Figures(count=2, summed_ns=17, total_ns=17, hidden_ns=0)
    assert report.layers[-1].count == 2 and report.steps[-1].count == 3
    assert any("1 of 3 device rows have no launch record" in note for note in report.notes)


def test_steps_come_from_the_launch_not_from_the_kernel(tmp_path: Path) -> None:
    trace = TraceBuilder()
    trace.step(3, 0, 1_000)
    trace.step(4, 1_000, 2_000)
    trace.kernel(ALL_REDUCE, 1_500, 1_600, stream=20, launch=900)
    trace.kernel(GEMM, 1_600, 1_700)
    report = measure(trace, tmp_path)
    assert set(report.steps) == {3} and report.step_ns == {3: 1_000, 4: 1_000}


def test_clocks_that_disagree_inside_a_file_are_noted(tmp_path: Path) -> None:
    trace = TraceBuilder()
    trace.kernel(GEMM, 100, 200, launch=150)
    assert any("1 device rows start before their launch" in note for note in measure(trace, tmp_path).notes)
