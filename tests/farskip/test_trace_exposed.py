"""Why communication was exposed: one constructed trace per cause."""

from pathlib import Path

from farskip.testing_traces import ALL_REDUCE, GEMM, TraceBuilder
from farskip.trace import inspect
from farskip.trace_report import RankReport, Stretch

US = 1_000


def measure(trace: TraceBuilder, tmp_path: Path) -> RankReport:
    return inspect(trace.write(tmp_path / "rank0.json")).ranks[0]


def worst(trace: TraceBuilder, tmp_path: Path) -> Stretch:
    return measure(trace, tmp_path).stretches[0]


def waiting_trace(*, sync: bool) -> TraceBuilder:
    """A dispatch of 300 us under 100 us of attention; the experts are queued and wait for it."""
    trace = TraceBuilder()
    trace.range("farskip::L003::dispatch::launch", 0, 10 * US)
    trace.kernel(ALL_REDUCE, 100 * US, 400 * US, stream=20, launch=5 * US)
    trace.range("farskip::L003::attention_core::run", 10 * US, 20 * US)
    trace.kernel(GEMM, 100 * US, 200 * US, launch=15 * US)
    if sync:
        trace.stream_wait(25 * US, stream=7, waits_on=20)
    trace.range("farskip::L003::experts::run", 30 * US, 40 * US)
    trace.kernel(GEMM, 402 * US, 500 * US, launch=35 * US)
    return trace


def test_waits_for_a_collective_inferred_from_the_order(tmp_path: Path) -> None:
    assert worst(waiting_trace(sync=False), tmp_path) == Stretch(
        start_ns=100 * US,
        length_ns=200 * US,
        cause="waits for collective",
        waits_for="dispatch of layer 3 before experts",
        evidence="inferred",
        collective="dispatch of layer 3",
        step=-1,
    )


def test_waits_for_a_collective_read_from_a_stream_wait(tmp_path: Path) -> None:
    assert worst(waiting_trace(sync=True), tmp_path).evidence == "read"


def test_a_stream_wait_for_an_earlier_kernel_proves_nothing(tmp_path: Path) -> None:
    trace = TraceBuilder()
    trace.kernel(ALL_REDUCE, 100 * US, 400 * US, stream=20, launch=5 * US)
    trace.stream_wait(10 * US, stream=7, waits_on=20)
    trace.kernel(GEMM, 100 * US, 200 * US, launch=15 * US)
    trace.kernel(GEMM, 402 * US, 500 * US, launch=35 * US)
    found = worst(trace, tmp_path)
    assert (found.cause, found.evidence) == ("waits for collective", "inferred")


def test_a_kernel_long_after_the_collective_did_not_wait_for_it(tmp_path: Path) -> None:
    trace = TraceBuilder()
    trace.kernel(ALL_REDUCE, 100 * US, 400 * US, stream=20, launch=5 * US)
    trace.kernel(GEMM, 100 * US, 200 * US, launch=15 * US)
    trace.kernel(GEMM, 450 * US, 500 * US, launch=35 * US)
    assert worst(trace, tmp_path).cause == "kernel gap"


def test_a_stream_wait_on_another_stream_proves_nothing(tmp_path: Path) -> None:
    trace = waiting_trace(sync=False)
    trace.stream_wait(25 * US, stream=7, waits_on=99)
    assert worst(trace, tmp_path).evidence == "inferred"


def test_a_copy_on_the_compute_stream_also_waits(tmp_path: Path) -> None:
    """Seen on MI300: gradients are copied out of the bucket right after the all-reduce, kernels follow later."""
    trace = waiting_trace(sync=False)
    trace.events = [event for event in trace.events if event["ts"] != 402 * US]
    trace.copy(401 * US, 450 * US, launch=36 * US)
    trace.kernel(GEMM, 460 * US, 500 * US, launch=37 * US)
    assert worst(trace, tmp_path).cause == "waits for collective"


def test_same_stream(tmp_path: Path) -> None:
    trace = TraceBuilder()
    trace.kernel(GEMM, 0, 10 * US, launch=-30)
    trace.kernel(ALL_REDUCE, 10 * US, 40 * US, stream=7, launch=-20)
    trace.kernel(GEMM, 40 * US, 60 * US, launch=-10)
    found = worst(trace, tmp_path)
    assert (found.cause, found.waits_for, found.evidence) == (
        "same stream",
        "all_reduce before the next kernel",
        "read",
    )


def test_host_launched_late_up_to_the_launch_then_something_else(tmp_path: Path) -> None:
    trace = TraceBuilder()
    trace.kernel(GEMM, 0, 10 * US, launch=-30)
    trace.kernel(ALL_REDUCE, 0, 100 * US, stream=20, launch=-20)
    trace.kernel(GEMM, 110 * US, 120 * US, launch=70 * US)
    report = measure(trace, tmp_path)
    assert [(s.cause, s.start_ns, s.length_ns, s.evidence) for s in report.stretches] == [
        ("host launched late", 10 * US, 60 * US, "read"),
        ("waits for collective", 70 * US, 30 * US, "inferred"),
    ]
    assert report.stretches[0].waits_for == "the host"


def test_host_launched_late_names_the_call_that_blocked_it(tmp_path: Path) -> None:
    trace = TraceBuilder()
    trace.kernel(GEMM, 0, 10 * US, launch=-30)
    trace.kernel(ALL_REDUCE, 0, 100 * US, stream=20, launch=-20)
    trace.add("cuda_runtime", "cudaStreamSynchronize", 5 * US, 101 * US, pid=100, tid=100)
    trace.kernel(GEMM, 110 * US, 120 * US, launch=102 * US)
    assert worst(trace, tmp_path).waits_for == "the host, blocked in cudaStreamSynchronize"


def test_nothing_left_to_overlap_at_the_end_of_the_trace(tmp_path: Path) -> None:
    trace = TraceBuilder()
    trace.kernel(GEMM, 0, 10 * US)
    trace.kernel(ALL_REDUCE, 0, 100 * US, stream=20)
    assert worst(trace, tmp_path).cause == "nothing left to overlap"


def test_nothing_left_to_overlap_in_this_step(tmp_path: Path) -> None:
    trace = TraceBuilder()
    trace.step(1, -100, 12 * US)
    trace.step(2, 12 * US, 30 * US)
    trace.kernel(GEMM, 0, 10 * US, launch=-30)
    trace.kernel(ALL_REDUCE, 5 * US, 100 * US, stream=20, launch=1)
    # Queued for the next step before the collective had even begun to be exposed.
    trace.kernel(GEMM, 101 * US, 110 * US, launch=13 * US)
    report = measure(trace, tmp_path)
    assert {s.cause for s in report.stretches} == {"host launched late", "nothing left to overlap"}


def test_kernel_gap_while_the_collective_goes_on(tmp_path: Path) -> None:
    trace = TraceBuilder()
    trace.kernel(ALL_REDUCE, 0, 100 * US, stream=20, launch=-50)
    trace.kernel(GEMM, 0, 40 * US, launch=-40)
    trace.kernel(GEMM, 43 * US, 100 * US, launch=-30)
    found = measure(trace, tmp_path).stretches
    assert [(s.cause, s.start_ns, s.length_ns) for s in found] == [("kernel gap", 40 * US, 3 * US)]


def test_edge_of_the_window(tmp_path: Path) -> None:
    trace = TraceBuilder()
    trace.kernel(ALL_REDUCE, 0, 50 * US, stream=20)
    trace.kernel(GEMM, 30 * US, 60 * US)
    found = measure(trace, tmp_path).stretches
    assert [(s.cause, s.start_ns, s.length_ns) for s in found] == [("edge of the window", 0, 30 * US)]


def test_stretches_are_cut_where_the_owner_changes_and_come_worst_first(tmp_path: Path) -> None:
    trace = TraceBuilder()
    trace.kernel(GEMM, 0, 10 * US, launch=-100)
    trace.kernel(ALL_REDUCE, 10 * US, 30 * US, stream=20, launch=-90)
    trace.kernel("void deep_ep::intranode::dispatch<8>(x)", 20 * US, 80 * US, stream=21, launch=-80)
    trace.kernel(GEMM, 81 * US, 90 * US, launch=-70)
    report = measure(trace, tmp_path)
    assert [(s.collective, s.length_ns) for s in report.stretches] == [("dispatch", 50 * US), ("all_reduce", 20 * US)]
    # Compute waited for the one that ended last, also while the other one owned the time.
    assert {s.waits_for for s in report.stretches} == {"dispatch before the next kernel"}
