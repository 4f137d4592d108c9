"""The HTA-compatible mode: its rules by hand, and (slow) the tool itself on the same files."""

import json
import random
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from farskip.testing_traces import ALL_REDUCE, ALL_TO_ALL, GEMM, TraceBuilder, training_trace
from farskip.trace import inspect
from farskip.trace_report import RankReport


def measure(path: Path, *, include_last_step: bool = False) -> RankReport:
    return inspect(path, mode="hta", include_last_step=include_last_step).ranks[0]


def test_stamps_are_rounded_inward_and_negative_lengths_are_summed(tmp_path: Path) -> None:
    trace = TraceBuilder()
    trace.kernel(ALL_REDUCE, 1_200, 9_900, stream=20)  # becomes 2 to 9
    trace.kernel(GEMM, 3_100, 6_900)  # 4 to 6
    trace.kernel(GEMM, 20_300, 20_700)  # 21 to 20: minus one
    report = measure(trace.write(tmp_path / "rank0.json"))
    assert (report.communication_ns, report.hidden_ns, report.compute_ns) == (7_000, 2_000, 1_000)
    assert report.overlap_percent == round(100 * 2 / 7, 2)
    exact = inspect(tmp_path / "rank0.json").ranks[0]
    assert (exact.communication_ns, exact.hidden_ns, exact.compute_ns) == (8_700, 3_800, 4_200)


def test_whole_microseconds_are_left_alone(tmp_path: Path) -> None:
    trace = TraceBuilder()
    trace.kernel(ALL_REDUCE, 1_000, 9_000, stream=20)
    report = measure(trace.write(tmp_path / "rank0.json", whole_microseconds=True))
    assert report.communication_ns == 8_000


def test_only_nccl_is_communication_and_copies_count_neither_way(tmp_path: Path) -> None:
    trace = TraceBuilder()
    trace.kernel("void deep_ep::intranode::dispatch<8>(x)", 0, 5_000, stream=20)
    trace.copy(6_000, 9_000, name="Memcpy PtoP (Device -> Device)")
    report = measure(trace.write(tmp_path / "rank0.json", whole_microseconds=True))
    assert report.overlap_percent is None and report.compute_ns == 5_000
    assert report.copies_only_ns == 3_000


def test_the_last_step_and_rows_without_a_launch_are_dropped(tmp_path: Path) -> None:
    trace = TraceBuilder()
    trace.step(1, 0, 10_000)
    trace.step(2, 10_000, 20_000)
    trace.kernel(ALL_REDUCE, 3_000, 5_000, stream=20, launch=1_000)
    trace.kernel(ALL_REDUCE, 12_000, 16_000, stream=20, launch=11_000)
    trace.kernel(ALL_REDUCE, 30_000, 38_000, stream=20, launch=25_000)
    trace.kernel(ALL_REDUCE, 50_000, 66_000, stream=20, launched=False)
    path = trace.write(tmp_path / "rank0.json", whole_microseconds=True)
    assert measure(path).communication_ns == 2_000
    assert measure(path, include_last_step=True).communication_ns == 6_000
    assert inspect(path).ranks[0].communication_ns == 30_000


def test_with_one_step_nothing_is_dropped(tmp_path: Path) -> None:
    trace = TraceBuilder()
    trace.step(1, 0, 10_000)
    trace.kernel(ALL_REDUCE, 50_000, 66_000, stream=20, launched=False)
    assert measure(trace.write(tmp_path / "rank0.json", whole_microseconds=True)).communication_ns == 16_000


def test_an_operator_of_the_host_that_names_a_stream_is_counted(tmp_path: Path) -> None:
    """Inductor writes a stream next to its operators; the tool takes such a row for a kernel, and so does this mode."""
    trace = TraceBuilder()
    trace.operator("triton_poi_fused_add_0", 0, 7_000, stream=0)
    trace.kernel(GEMM, 10_000, 12_000)
    path = trace.write(tmp_path / "rank0.json", whole_microseconds=True)
    assert measure(path).compute_ns == 9_000
    assert inspect(path).ranks[0].compute_ns == 2_000


def test_last_step_belongs_to_this_mode(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="include_last_step belongs to --mode hta"):
        inspect(tmp_path / "rank0.json", include_last_step=True)


HTA_SCRIPT = """
import json, logging, sys
logging.disable(logging.CRITICAL)
from hta.trace_analysis import TraceAnalysis
result = []
for path in json.loads(sys.argv[1]):
    for include in (False, True):
        t = TraceAnalysis(trace_files={0: path}, trace_dir="/", include_last_profiler_step=include)
        overlap = t.get_comm_comp_overlap(visualize=False)["comp_comm_overlap_pctg"][0]
        times = t.get_temporal_breakdown(visualize=False)
        result.append([path, include, float(overlap), float(times["idle_time(us)"][0]),
                       float(times["compute_time(us)"][0]), float(times["kernel_time(us)"][0])])
print(json.dumps(result))
"""


def messy_trace(seed: int) -> TraceBuilder:
    """Kernels at random, many inside one microsecond, copies, rows without a launch, three steps."""
    numbers = random.Random(seed)
    trace = TraceBuilder(base_ns=4_344_994_097_173_810 if seed % 2 else 0)
    for step in range(3):
        trace.step(step, step * 400_000, (step + 1) * 400_000)
    for _ in range(300):
        start = numbers.randrange(5_000, 1_400_000)
        length = numbers.choice([300, 900, 4_321, 25_000])
        launch = max(start - numbers.randrange(2_000, 200_000), 1_000)
        kind = numbers.choice([GEMM, GEMM, GEMM, ALL_REDUCE, ALL_TO_ALL, "copy"])
        options = {"stream": numbers.choice([7, 20, 24]), "launch": launch, "launched": numbers.random() < 0.95}
        if kind == "copy":
            trace.copy(start, start + length, **options)
        else:
            trace.kernel(kind, start, start + length, **options)
    return trace


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_figures_agree_with_the_tool_itself(tmp_path: Path) -> None:
    """Installs HolisticTraceAnalysis from the package index into an environment of its own."""
    venv.create(tmp_path / "hta", with_pip=True)
    python = tmp_path / "hta" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "HolisticTraceAnalysis"], check=True, timeout=800)
    traces = [training_trace(steps=3, layers=3), *(messy_trace(seed) for seed in range(6))]
    paths = [str(trace.write(tmp_path / f"{number}.json")) for number, trace in enumerate(traces)]
    paths.append(str(messy_trace(9).write(tmp_path / "whole.json", whole_microseconds=True)))
    finished = subprocess.run(
        [python, "-c", HTA_SCRIPT, json.dumps(paths)], check=True, capture_output=True, text=True, timeout=600
    )
    compared = json.loads(finished.stdout.splitlines()[-1])
    assert len(compared) == 2 * len(paths)
    for path, include, overlap, idle_us, compute_us, window_us in compared:
        report = measure(Path(path), include_last_step=include)
        found = (report.overlap_percent, report.idle_ns / 1e3, report.compute_ns / 1e3, report.window_ns / 1e3)
        assert found == (overlap, idle_us, compute_us, window_us), (path, include)


def test_nothing_here_imports_torch() -> None:
    """The inspector runs where torch is not installed."""
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "import farskip.trace, farskip.trace_html, farskip.trace_perfetto, farskip.launch.trace\n"
    )
    subprocess.run([sys.executable, "-P", "-c", script], check=True, timeout=60)
