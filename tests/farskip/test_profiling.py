"""Traces of training steps: the asked ones, whole, and with ranges whose names say what the schedule says."""

import gzip
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from farskip.lanes import SideStream
from farskip.metrics import StepReport
from farskip.profiling import StepTracer, TraceSession, range_name
from farskip.schedule import Do, Instruction, build_schedule
from farskip.stage_graph import Key, build_stage_graph
from farskip.trace import inspect
from farskip.trace_attribute import parse_own_range
from farskip.wiring import DENSE, MOE, MOE_SHARED, Wiring


def report(step: int) -> StepReport:
    return StepReport(
        step=step,
        num_steps=9,
        loss=1.0,
        grad_norm=1.0,
        learning_rate=0.1,
        num_loss_tokens=1,
        tokens_per_s=1.0,
        step_s=1.0,
        exposed_share=0.0,
    )


class FakeExecutor:
    """As much of an executor as tracing touches: its observers, called around every instruction."""

    def __init__(self, instructions: Sequence[tuple[Instruction, str]] = ()) -> None:
        self.observers: list[Any] = []
        self._instructions = instructions

    def step(self) -> None:
        for instruction, direction in self._instructions:
            ends = [observer(instruction, direction) for observer in self.observers]
            torch.ones(3).add_(1)
            for end in reversed(ends):
                end()


def instructions(chunks: int = 1) -> list[tuple[Instruction, str]]:
    """Forward and backward of an overlapped schedule."""
    blocks = (DENSE, MOE_SHARED, MOE, MOE_SHARED)
    graph = build_stage_graph(Wiring.named("farskip", 4).resolve(blocks), expert_parallel=True, chunks=chunks)
    schedule = build_schedule(graph, "overlapped")
    return [(one, "forward") for one in schedule.forward] + [(one, "backward") for one in schedule.backward]


def read(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") as file:
        return json.load(file)["traceEvents"]


def names(path: Path) -> list[str]:
    return [event["name"] for event in read(path) if event.get("cat") == "user_annotation"]


@pytest.fixture(autouse=True)
def quiet_profiler() -> Iterator[None]:
    """Kineto reports the start and stop of each trace on stderr."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KINETO_LOG_LEVEL", "6")
        yield


@pytest.mark.parametrize("chunks", [1, 3])
def test_the_inspector_reads_the_names_back(chunks: int) -> None:
    every = instructions(chunks)
    assert {instruction.do for instruction, _ in every} == set(Do)
    assert any(instruction.key.chunk for instruction, _ in every) is (chunks > 1)
    seen = set()
    for instruction, direction in every:
        name = range_name(instruction, direction)
        own = parse_own_range(name)
        assert own is not None, name
        read_back = Instruction(Do(own.verb), Key.from_label(own.layer, own.label))
        assert (read_back, "backward" if own.backward else "forward") == (instruction, direction)
        seen.add(name)
    assert len(seen) == len(every)


def test_a_trace_has_every_range_in_order(tmp_path: Path) -> None:
    executor = FakeExecutor(instructions())
    with TraceSession(executor, tmp_path / "trace.json.gz"):  # type: ignore[arg-type]
        executor.step()
    events = [event for event in read(tmp_path / "trace.json.gz") if event.get("name", "").startswith("farskip::")]
    events.sort(key=lambda event: event["ts"])
    assert [event["name"] for event in events] == [range_name(*each) for each in instructions()]
    assert executor.observers == []
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json.gz"]


def test_a_plan_with_a_side_lane_is_matched_line_by_line(tmp_path: Path) -> None:
    """Ranges have the schedule's names, in whichever lane an instruction is issued."""
    blocks = (DENSE, MOE_SHARED, MOE, MOE_SHARED)
    graph = build_stage_graph(Wiring.named("farskip", 4).resolve(blocks), expert_parallel=True)
    schedule = build_schedule(graph, "overlapped", side_stream=SideStream.merge_and_route)
    steps = [(one, "forward") for one in schedule.forward] + [(one, "backward") for one in schedule.backward]
    executor = FakeExecutor(steps)
    with TraceSession(executor, tmp_path / "trace.json"):  # type: ignore[arg-type]
        executor.step()
    (tmp_path / "schedule.json").write_text(json.dumps(schedule.to_dict()))
    (rank,) = inspect([tmp_path / "trace.json"], schedule=tmp_path / "schedule.json").ranks
    assert {line.status for line in rank.plan} == {"as planned"} and len(rank.plan) == len(steps)


@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
def test_the_inspector_reads_a_trace(suffix: str, tmp_path: Path) -> None:
    executor = FakeExecutor(instructions())
    with TraceSession(executor, tmp_path / f"trace{suffix}"):  # type: ignore[arg-type]
        executor.step()
    (rank,) = inspect([tmp_path / f"trace{suffix}"]).ranks
    assert list(rank.step_ns) == [1], "the step is marked, so that tables by step and the log have it"


def test_ranges_of_other_threads_are_in_the_trace(tmp_path: Path) -> None:
    """A transfer over an emulated link is seen on its helper thread, which was there before the trace began."""
    go, done = threading.Event(), threading.Event()

    def pace() -> None:
        go.wait()
        with torch.profiler.record_function("farskip::emulated_link::all_to_all"):
            torch.ones(3).add_(1)
        done.set()

    helper = threading.Thread(target=pace)
    helper.start()
    with TraceSession(FakeExecutor(), tmp_path / "trace.json.gz"):  # type: ignore[arg-type]
        go.set()
        done.wait()
    helper.join()
    assert "farskip::emulated_link::all_to_all" in names(tmp_path / "trace.json.gz")


def run(tracer: StepTracer, executor: FakeExecutor, first: int, last: int) -> None:
    for step in range(first, last + 1):
        executor.step()
        tracer(report(step))


def test_exactly_the_asked_steps_are_traced(tmp_path: Path) -> None:
    executor, written = FakeExecutor(instructions()), []
    tracer = StepTracer(executor, tmp_path / "traces", [2, 3, 5], rank=1, on_trace=written.append)  # type: ignore[arg-type]
    with tracer:
        run(tracer, executor, 1, 6)
    expected = [tmp_path / "traces" / f"rank1_step{step}.json.gz" for step in (2, 3, 5)]
    assert written == expected
    assert sorted((tmp_path / "traces").iterdir()) == expected
    for path in expected:
        ours = [name for name in names(path) if name.startswith("farskip::")]
        assert len(ours) == len(instructions())  # of one step, not of two
    assert executor.observers == []


def test_the_first_step_can_be_traced(tmp_path: Path) -> None:
    executor = FakeExecutor(instructions())
    with StepTracer(executor, tmp_path, [1], rank=0) as tracer:  # type: ignore[arg-type]
        run(tracer, executor, 1, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["rank0_step1.json.gz"]


def test_a_resumed_run_traces_its_later_steps_only(tmp_path: Path) -> None:
    """A run that goes on after step 4 never takes step 1, and its first one is 5."""
    executor = FakeExecutor(instructions())
    with StepTracer(executor, tmp_path, [1, 5], rank=0, first_step=5) as tracer:  # type: ignore[arg-type]
        run(tracer, executor, 5, 6)
    assert [path.name for path in tmp_path.iterdir()] == ["rank0_step5.json.gz"]


def test_a_step_that_never_ran_leaves_no_trace(tmp_path: Path) -> None:
    executor = FakeExecutor(instructions())
    with StepTracer(executor, tmp_path, [3], rank=0) as tracer:  # type: ignore[arg-type]
        run(tracer, executor, 1, 2)
    assert list(tmp_path.iterdir()) == []
    assert executor.observers == []


def test_a_step_that_raised_leaves_no_trace(tmp_path: Path) -> None:
    executor = FakeExecutor(instructions())
    tracer = StepTracer(executor, tmp_path, [2], rank=0)  # type: ignore[arg-type]
    tracer.__enter__()
    run(tracer, executor, 1, 1)
    executor.step()
    tracer.__exit__(KeyError, KeyError(), None)
    assert list(tmp_path.iterdir()) == []
    assert executor.observers == []


def test_steps_are_counted_from_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"profile\.steps=\[0, 2\]: steps are counted from 1"):
        StepTracer(FakeExecutor(), tmp_path, [0, 2], rank=0)  # type: ignore[arg-type]
