"""CPU traces: what counts as compute and as communication, where waits are, what an emulated link is."""

from pathlib import Path

import pytest

from farskip.testing_traces import AUTOGRAD_THREAD, WORKER_THREAD, TraceBuilder
from farskip.trace import inspect
from farskip.trace_report import Figures, RankReport

DATA = Path(__file__).parent / "data"
LINK_THREAD = 103


def measure(trace: TraceBuilder, tmp_path: Path, *patterns: str) -> RankReport:
    return inspect(trace.write(tmp_path / "rank0.json"), communication=patterns).ranks[0]


def cpu_trace() -> TraceBuilder:
    trace = TraceBuilder(backend="gloo")
    trace.step(1, 0, 10_000)
    return trace


def overlapped_layer(trace: TraceBuilder, *, emulated: bool) -> None:
    """Launch at 100, transfer 200 to 900, compute 150 to 600, wait 600 to 910, experts 920 to 1200."""
    trace.range("farskip::L002::dispatch::launch", 100, 140)
    trace.operator("c10d::alltoall_base_", 110, 130)
    trace.range("farskip::L002::shared::run", 150, 600)
    trace.operator("aten::mm", 200, 500)
    trace.range("farskip::L002::dispatch::wait", 600, 910)
    trace.range("farskip::L002::experts::run", 920, 1_200)
    if emulated:
        trace.range("farskip::emulated_link::all_to_all", 200, 900, thread=LINK_THREAD)
        trace.range("gloo:all_to_all", 210, 260, thread=WORKER_THREAD)
    else:
        trace.range("gloo:all_to_all", 200, 900, thread=WORKER_THREAD)


@pytest.mark.parametrize("emulated", [False, True])
def test_one_layer(tmp_path: Path, emulated: bool) -> None:
    trace = cpu_trace()
    overlapped_layer(trace, emulated=emulated)
    report = measure(trace, tmp_path)
    assert report.device == "cpu"
    assert (report.communication_ns, report.compute_ns, report.hidden_ns) == (700, 450 + 280, 400)
    # The window begins with the first row that counts, the run range at 150, and ends with the last at 1200.
    assert (report.window_ns, report.idle_ns) == (1_050, 20)
    assert report.phases == {"dispatch": Figures(count=1, summed_ns=700, total_ns=700, hidden_ns=400)}
    assert set(report.layers) == {2} and set(report.steps) == {1} and set(report.collectives) == {"all_to_all"}
    assert [(s.cause, s.waits_for, s.evidence, s.length_ns) for s in report.stretches] == [
        ("waits for collective", "dispatch of layer 2 before experts", "read", 300)
    ]
    assert any("emulated" in note for note in report.notes) == emulated
    assert ("emulated" in report.event_set["communication"]) == emulated


def test_a_real_transfer_that_outlasts_its_paced_one_belongs_to_it(tmp_path: Path) -> None:
    """A late peer: the wait covers both, so the collective does too."""
    trace = cpu_trace()
    trace.range("farskip::L000::combine::launch", 0, 50)
    trace.operator("c10d::alltoall_base_", 10, 40)
    trace.range("farskip::emulated_link::all_to_all", 60, 300, thread=LINK_THREAD)
    trace.range("gloo:all_to_all", 45, 700, thread=WORKER_THREAD)
    trace.range("farskip::L000::combine::wait", 100, 710)
    trace.operator("aten::mm", 720, 800)
    report = measure(trace, tmp_path)
    assert report.collectives == {"all_to_all": Figures(count=1, summed_ns=640, total_ns=640, hidden_ns=0)}
    assert report.events.emulated_C.tolist() == [True]


def test_queued_transfers_keep_their_order(tmp_path: Path) -> None:
    """Two launches, one link: the second transfer is paced behind the first and still belongs to its own launch."""
    trace = cpu_trace()
    for layer, at in ((0, 0), (1, 200)):
        trace.range(f"farskip::L{layer:03d}::dispatch::launch", at, at + 50)
        trace.operator("c10d::alltoall_base_", at + 10, at + 40)
        trace.range("gloo:all_to_all", at + 45, at + 60, thread=WORKER_THREAD)
    trace.range("farskip::emulated_link::all_to_all", 20, 1_000, thread=LINK_THREAD)
    trace.range("farskip::emulated_link::all_to_all", 1_001, 1_900, thread=LINK_THREAD)
    trace.operator("aten::mm", 300, 1_950)
    report = measure(trace, tmp_path)
    assert {layer: (f.count, f.total_ns) for layer, f in report.layers.items()} == {0: (1, 980), 1: (1, 899)}


def test_a_launch_whose_wait_is_over_is_not_matched_any_more(tmp_path: Path) -> None:
    """The profiler dropped a transfer: the next one must not slip into its place."""
    trace = cpu_trace()
    for layer, at in ((0, 0), (1, 1_000)):
        trace.range(f"farskip::L{layer:03d}::dispatch::launch", at, at + 50)
        trace.operator("c10d::alltoall_base_", at + 10, at + 40)
        trace.range(f"farskip::L{layer:03d}::dispatch::wait", at + 100, at + 300)
    trace.range("gloo:all_to_all", 1_060, 1_290, thread=WORKER_THREAD)
    trace.operator("aten::mm", 1_400, 1_500)
    assert set(measure(trace, tmp_path).layers) == {1}


def test_gloo_has_no_event_of_its_own_for_reduce_scatter(tmp_path: Path) -> None:
    trace = cpu_trace()
    trace.operator("c10d::allreduce_", 10, 20)
    trace.range("gloo:all_reduce", 30, 50, thread=WORKER_THREAD)
    trace.operator("c10d::_reduce_scatter_base_", 60, 70)
    trace.range("gloo:all_reduce", 80, 95, thread=WORKER_THREAD)
    trace.operator("aten::mm", 100, 110)
    report = measure(trace, tmp_path)
    assert {kind: figures.total_ns for kind, figures in report.collectives.items()} == {
        "all_reduce": 20,
        "reduce_scatter": 15,
    }


def test_a_wait_that_is_not_recorded_is_not_compute(tmp_path: Path) -> None:
    """A blocking collective inside one of our run ranges: the profiler records the launch and then nothing."""
    trace = cpu_trace()
    trace.range("farskip::L000::route::run", 0, 1_000)
    trace.operator("aten::topk", 0, 100)
    trace.operator("c10d::allreduce_", 100, 120)
    trace.range("gloo:all_reduce", 110, 700, thread=WORKER_THREAD)
    trace.operator("aten::cumsum", 710, 800)
    report = measure(trace, tmp_path)
    assert report.compute_ns == 1_000 - 20 - 580
    assert report.hidden_ns == 0
    assert (
        report.stretches[0].waits_for == "all_reduce in route before route"
        or report.stretches[0].evidence == "inferred"
    )


def test_an_asynchronous_launch_hides_its_transfer(tmp_path: Path) -> None:
    trace = cpu_trace()
    trace.operator("c10d::alltoall_base_", 0, 20)
    trace.range("gloo:all_to_all", 10, 500, thread=WORKER_THREAD)
    trace.operator("aten::mm", 22, 400)
    report = measure(trace, tmp_path)
    assert (report.compute_ns, report.hidden_ns) == (378, 378)


def test_autograd_frames_count_only_through_the_operators_inside(tmp_path: Path) -> None:
    trace = cpu_trace()
    frame = "autograd::engine::evaluate_function: ExchangeBackward"
    linked = {"Sequence number": 4, "Fwd thread id": 1}
    trace.operator(frame, 0, 1_000, thread=AUTOGRAD_THREAD, **linked)
    trace.operator("ExchangeBackward", 10, 990, thread=AUTOGRAD_THREAD, **linked)
    trace.operator("aten::mul", 100, 150, thread=AUTOGRAD_THREAD)
    trace.range("gloo:all_to_all", 200, 900, thread=WORKER_THREAD)
    report = measure(trace, tmp_path)
    assert (report.compute_ns, report.hidden_ns) == (50, 0)


def test_work_inside_a_transfer_s_thread_is_not_compute(tmp_path: Path) -> None:
    trace = cpu_trace()
    trace.operator("aten::mm", 0, 100)
    trace.range("gloo:all_gather", 0, 500, thread=WORKER_THREAD)
    trace.operator("aten::copy_", 300, 450, thread=WORKER_THREAD)
    report = measure(trace, tmp_path)
    assert report.compute_ns == 100
    names = {name.name: name.counted_as for name in report.recognized}
    assert names["aten::copy_"] == "inside a transfer's thread: not counted"


def test_threads_without_a_mark_do_not_run_the_model(tmp_path: Path) -> None:
    trace = cpu_trace()
    trace.operator("aten::mm", 0, 100)
    trace.operator("aten::stack", 200, 300, thread=777)
    report = measure(trace, tmp_path)
    assert report.compute_ns == 100
    assert any("no communication" in note for note in report.notes)


def test_transfers_on_the_main_thread_are_not_compute(tmp_path: Path) -> None:
    trace = cpu_trace()
    trace.operator("c10d::send", 0, 50)
    trace.range("gloo:send", 40, 90)
    trace.operator("aten::mm", 100, 200)
    report = measure(trace, tmp_path)
    assert (report.compute_ns, report.communication_ns, report.hidden_ns) == (100, 50, 0)


def test_user_patterns_reach_host_rows(tmp_path: Path) -> None:
    trace = cpu_trace()
    trace.operator("aten::mm", 0, 100)
    trace.range("my_wire: push", 50, 250, thread=WORKER_THREAD)
    assert measure(trace, tmp_path).communication_ns == 0
    assert measure(trace, tmp_path, "send_recv=my_wire").collectives == {
        "send_recv": Figures(count=1, summed_ns=200, total_ns=200, hidden_ns=50)
    }


def test_recorded_traces_of_two_ranks() -> None:
    """Traces that benchmarks/record_traces.py recorded with torch and gloo on two ranks."""
    report = inspect(sorted(DATA.glob("gloo_rank*.json.gz")))
    assert [rank.rank for rank in report.ranks] == [0, 1]
    for rank in report.ranks:
        assert rank.device == "cpu" and rank.num_steps == 2
        kinds = {kind: figures.count for kind, figures in rank.collectives.items()}
        # Per step: dispatch and combine of two layers forward and backward, and one of each other kind.
        assert kinds == {
            "all_to_all": 2 * 2 * 2 * 2,
            "all_reduce": 2,
            "reduce_scatter": 2,
            "all_gather": 2,
            "broadcast": 2,
            "send_recv": 2,
            "notify": 2,
        }
        assert set(rank.layers) == {0, 1, -1}
        assert set(rank.phases) == {"dispatch", "combine", "dispatch::backward", "combine::backward"}
        assert {rank.phases[name].count for name in rank.phases} == {4}
        assert rank.unattributed.count == 12
        assert rank.overlap_percent is not None and rank.phases["dispatch"].hidden_ns > 0
        reasons = {(s.cause, s.evidence) for s in rank.stretches if s.waits_for and "of layer" in s.waits_for}
        assert ("waits for collective", "read") in reasons
        assert int(rank.events.emulated_C.sum()) == 16
    assert all(rank.unmatched == 0 for rank in report.skew.ranks)
