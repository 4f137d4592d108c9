"""What a run tells about itself: metrics.jsonl, TensorBoard events and a progress line or bar.

Decides: the form. One JSON object per line; on a terminal a bar, elsewhere plain lines. Only rank 0 writes.
Refuses: to write a NaN or an infinity (null stands for it), and to leave lines of steps that a resumed run takes again.
"""

import json
import math
import os
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

from farskip.evaluation import Evaluation

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from torch.utils.tensorboard.writer import SummaryWriter

METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """One optimizer step, seen from all ranks together.

    Attributes:
        step: counted from 1.
        num_steps: of the whole run.
        loss: mean over the counted positions of all ranks and micro-batches, in nats.
        means: the parts that the objective and the balancer measured: "cross_entropy", "kl", ...
        grad_norm: before clipping.
        learning_rate: of this step.
        num_loss_tokens: positions counted in the loss.
        tokens_per_s: input positions of all ranks per second of this step.
        step_s: seconds of this step on this rank, without evaluation and checkpoint.
        exposed_share: mean over ranks of the step's share that was spent waiting in collectives; those of a divided
            update count in the step after.
        heldout: the evaluation after this step, if there was one.
    """

    step: int
    num_steps: int
    loss: float
    means: Mapping[str, float] = field(default_factory=dict)
    grad_norm: float
    learning_rate: float
    num_loss_tokens: int
    tokens_per_s: float
    step_s: float
    exposed_share: float
    heldout: Evaluation | None = None

    def scalars(self) -> dict[str, float]:
        """Everything that goes into the metrics files."""
        values = {
            "loss": self.loss,
            **self.means,
            "grad_norm": self.grad_norm,
            "learning_rate": self.learning_rate,
            "loss_tokens": self.num_loss_tokens,
            "tokens_per_s": self.tokens_per_s,
            "step_s": self.step_s,
            "exposed_share": self.exposed_share,
        }
        if self.heldout is not None:
            values["heldout_cross_entropy"] = self.heldout.cross_entropy
            values["heldout_cross_entropy_ci95"] = self.heldout.cross_entropy_ci95
            if self.heldout.kl is not None and self.heldout.kl_ci95 is not None:
                values["heldout_kl"] = self.heldout.kl
                values["heldout_kl_ci95"] = self.heldout.kl_ci95
        return values


class MetricsFiles(AbstractContextManager["MetricsFiles"]):
    """metrics.jsonl and, when wanted, TensorBoard events in ``tensorboard/``.

    Args:
        run_folder: exists.
        first_step: steps taken before this process; lines beyond it are of a run that was cut off, and are dropped.
        tensorboard: also write events.
    """

    def __init__(self, run_folder: Path, *, first_step: int, tensorboard: bool) -> None:
        path = run_folder / METRICS_FILE
        _drop_lines_after(path, first_step)
        self._file: TextIO = path.open("a", encoding="utf-8")
        self._events = _event_writer(run_folder / "tensorboard", first_step) if tensorboard else None

    def write(self, report: StepReport) -> None:
        """One line, and one event per value."""
        values = report.scalars()
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = {"step": report.step, **finite}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                prefix = "heldout/" if name.startswith("heldout_") else "train/"
                self._events.add_scalar(prefix + name.removeprefix("heldout_"), value, report.step)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()


def _event_writer(folder: Path, first_step: int) -> "SummaryWriter":
    # Imported here: it costs a second, and is not needed to read a run.
    from torch.utils.tensorboard.writer import SummaryWriter

    return SummaryWriter(str(folder), purge_step=first_step + 1)


def _drop_lines_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            is_earlier = json.loads(line)["step"] <= step
        except ValueError:
            # The line at which the earlier process was cut off.
            is_earlier = False
        if is_earlier:
            kept.append(line + "\n")
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


class ProgressDisplay(AbstractContextManager["ProgressDisplay"]):
    """A bar on a terminal, plain lines elsewhere.

    Args:
        num_steps: of the whole run.
        first_step: steps taken before this process.
        stream: where it goes; stdout if not given.
    """

    def __init__(self, *, num_steps: int, first_step: int, stream: TextIO | None = None) -> None:
        self._num_steps = num_steps
        self._step_s_sum = 0.0
        self._num_seen = 0
        self._stream = stream or sys.stdout
        self._bar: RichProgress | None = None
        self._task: Any = None
        if self._stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            self._bar = Progress(
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                console=Console(file=self._stream),
            )
            self._task = self._bar.add_task("training", total=num_steps, completed=first_step, text="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def show(self, report: StepReport, *, log_now: bool) -> None:
        """The bar moves at every step; without a bar, a line when ``log_now``; a line for every evaluation."""
        self._step_s_sum += report.step_s
        self._num_seen += 1
        remaining_s = self._step_s_sum / self._num_seen * (self._num_steps - report.step)
        text = progress_text(report, remaining_s)
        if self._bar is not None:
            self._bar.update(self._task, completed=report.step, text=text)
        elif log_now:
            self._print(f"step {report.step}/{report.num_steps}  {text}")
        if report.heldout is not None:
            self._print(f"step {report.step}/{report.num_steps}  held-out {evaluation_text(report.heldout)}")

    def _print(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line, highlight=False, markup=False, soft_wrap=True)
        else:
            print(line, file=self._stream, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def progress_text(report: StepReport, remaining_s: float) -> str:
    """Loss, its parts, speed, exposed communication and the time that is left, in one line."""
    parts = [f"loss {report.loss:.4f}"]
    names = {"cross_entropy": "ce", "kl": "kl"}
    parts += [f"{short} {report.means[name]:.4f}" for name, short in names.items() if name in report.means]
    parts += [
        f"{report.tokens_per_s:,.0f} tokens/s",
        f"exposed {100 * report.exposed_share:.1f} %",
        f"left {_clock(remaining_s)}",
    ]
    return "  ".join(parts)


def evaluation_text(evaluation: Evaluation) -> str:
    """Cross entropy and KL with their intervals, in one line."""
    text = f"cross-entropy {evaluation.cross_entropy:.4f} ± {evaluation.cross_entropy_ci95:.4f}"
    if evaluation.kl is not None:
        text += f"  kl {evaluation.kl:.4f} ± {evaluation.kl_ci95:.4f}"
    return text + f"  ({evaluation.num_tokens:,} tokens)"


def _clock(seconds: float) -> str:
    minutes, second = divmod(int(seconds + 0.5), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"


def rank_zero_outputs(
    stack: ExitStack, rank: int, run_folder: Path, *, num_steps: int, first_step: int, tensorboard: bool
) -> tuple[MetricsFiles, ProgressDisplay] | None:
    """The two outputs, opened for the life of ``stack``; None on every rank but 0."""
    if rank != 0:
        return None
    files = stack.enter_context(MetricsFiles(run_folder, first_step=first_step, tensorboard=tensorboard))
    display = stack.enter_context(ProgressDisplay(num_steps=num_steps, first_step=first_step))
    return files, display
