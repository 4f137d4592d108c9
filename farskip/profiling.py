"""Profiler ranges that carry the schedule's names, so that a trace can be compared with the plan line by line.

    farskip::L003::dispatch::launch              layer, stage or collective, run | launch | wait
    farskip::L003::dispatch::launch::backward    the same in the backward pass

Everything is in the name: arguments of a range do not reach an exported trace.
"""

import gzip
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from farskip.async_autograd import Ended
from farskip.executor import Executor
from farskip.metrics import StepReport
from farskip.schedule import Instruction


def range_name(instruction: Instruction, direction: str) -> str:
    """Name of the profiler range of one instruction."""
    suffix = "" if direction == "forward" else "::backward"
    return f"farskip::L{instruction.key.layer:03d}::{instruction.key.label}::{instruction.do}{suffix}"


def profiler_ranges(instruction: Instruction, direction: str) -> Ended:
    """An observer of the executor that opens a profiler range, and on CUDA an nvtx range, for every instruction."""
    name = range_name(instruction, direction)
    record: Any = torch.autograd.profiler.record_function(name)
    record.__enter__()
    if not torch.cuda.is_available():
        return lambda: record.__exit__(None, None, None)
    torch.cuda.nvtx.range_push(name)

    def end() -> None:
        torch.cuda.nvtx.range_pop()
        record.__exit__(None, None, None)

    return end


class TraceSession:
    """Profile one step of one executor and write a Kineto trace. A context manager around the step.

    Args:
        executor: whose instructions become ranges.
        path: trace file, ``.json`` or ``.json.gz``.
        step: number of the step, as the trace shows it.
    """

    def __init__(self, executor: Executor, path: Path, step: int = 1) -> None:
        self._executor = executor
        self._path = path
        # the profiler writes this mark itself only under a schedule of its own
        self._step: Any = torch.autograd.profiler.record_function(f"ProfilerStep#{step}")
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        # other threads too: the worker threads of gloo and of an emulated link are where transfers are seen
        self._profiler = torch.profiler.profile(
            activities=activities,
            experimental_config=torch._C._profiler._ExperimentalConfig(profile_all_threads=True),
        )

    def __enter__(self) -> "TraceSession":
        self._executor.observers.append(profiler_ranges)
        self._profiler.__enter__()
        self._step.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._step.__exit__(None, None, None)
        self._profiler.__exit__(*exception)
        self._executor.observers.remove(profiler_ranges)
        if exception[0] is None:
            self._write()

    def _write(self) -> None:
        part = self._path.with_name(f".{self._path.name}.part")
        plain = part.with_suffix(".json")
        self._profiler.export_chrome_trace(str(plain))
        if self._path.suffix == ".gz":
            with plain.open("rb") as source, gzip.open(part, "wb") as target:
                shutil.copyfileobj(source, target)
            plain.unlink()
        else:
            plain.rename(part)
        part.rename(self._path)


class StepTracer:
    """Traces chosen optimizer steps of a training loop; a callback for its end of step.

    Args:
        executor: whose instructions become ranges.
        folder: gets ``rank<r>_step<n>.json.gz``.
        steps: optimizer steps to trace, counted from 1.
        rank: this rank.
        first_step: the step that comes first; a resumed run starts later than at 1.
        on_trace: called with each finished trace file.
    """

    def __init__(
        self,
        executor: Executor,
        folder: Path,
        steps: Sequence[int],
        *,
        rank: int,
        first_step: int = 1,
        on_trace: Callable[[Path], None] | None = None,
    ) -> None:
        if any(step < 1 for step in steps):
            raise ValueError(f"profile.steps={list(steps)}: steps are counted from 1")
        self._executor = executor
        self._folder = folder
        self._steps = frozenset(steps)
        self._rank = rank
        self._first_step = first_step
        self._on_trace = on_trace
        self._session: TraceSession | None = None

    def __enter__(self) -> "StepTracer":
        self._begin(self._first_step)
        return self

    def __call__(self, report: StepReport) -> None:
        """A step has ended: close its trace, open that of the next one."""
        self._end()
        self._begin(report.step + 1)

    def __exit__(self, *exception: Any) -> None:
        # The step that was begun last never ran: its trace is thrown away.
        if self._session is not None:
            self._session.__exit__(RuntimeError, RuntimeError("not finished"), None)
            self._session = None

    def _begin(self, step: int) -> None:
        if step in self._steps:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._path = self._folder / f"rank{self._rank}_step{step}.json.gz"
            self._session = TraceSession(self._executor, self._path, step)
            self._session.__enter__()

    def _end(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.__exit__(None, None, None)
            if self._on_trace is not None:
                self._on_trace(self._path)
