"""The trace inspector's Python entry: ``inspect`` measures the traces of one job: how much was hidden, and why not.

The way through: trace_read_* (a file becomes rows) -> trace_recognize, trace_attribute (what each row is, and for
whom) -> trace_activity, trace_host (one rank's activity) -> trace_intervals, trace_tables, trace_exposed (figures) ->
trace_report -> trace_json, trace_terminal, trace_csv, trace_html, trace_perfetto. No file of the inspector imports
torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farskip.trace_assert import Judgement, judge, parse_condition
from farskip.trace_compare import Comparison, compare
from farskip.trace_json import details_json, report_json
from farskip.trace_options import InspectOptions
from farskip.trace_plan import read_plan
from farskip.trace_ranks import Skew, skew_over_ranks
from farskip.trace_read import measure_files
from farskip.trace_recognize import parse_user_pattern
from farskip.trace_report import RankReport


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceReport:
    """The figures of one job.

    Attributes:
        ranks: one report per rank, by rank.
        skew: the ranks side by side.
    """

    ranks: tuple[RankReport, ...]
    skew: Skew

    def to_json(self) -> dict[str, Any]:
        """The fixed schema of ``farskip trace --json``, as values for any JSON encoder."""
        return report_json(self.ranks)

    def details(self, comparison: Comparison | None = None) -> dict[str, Any]:
        """What the fixed schema has no place for: edges, price, plan, names, skew, comparison."""
        return details_json(self.ranks, self.skew, comparison)

    def against(self, baseline: "TraceReport") -> Comparison:
        """Compares with a baseline; raises ValueError if the two cannot be compared."""
        return compare(self.ranks, baseline.ranks)

    def judge(self, conditions: Sequence[str]) -> list[Judgement]:
        """Judges conditions like ``overlap >= 85%`` on the worst rank; raises ValueError for what is no condition."""
        return [judge(self.ranks, parse_condition(text)) for text in conditions]

    @property
    def overlap_percent(self) -> float | None:
        """Hidden in percent of communication over all ranks; None without communication."""
        communication = sum(report.communication_ns for report in self.ranks)
        return 100.0 * sum(report.hidden_ns for report in self.ranks) / communication if communication else None

    def line(self) -> str:
        """The whole in one line, for a training log that traces one step per file; figures are means over ranks."""
        count = len(self.ranks)
        window, communication, exposed = (
            sum(getattr(report, name) for report in self.ranks) / count / 1e6
            for name in ("window_ns", "communication_ns", "exposed_ns")
        )
        overlap = self.overlap_percent
        hidden = "no communication" if overlap is None else f"{overlap:.1f}% hidden"
        return (
            f"trace: window {window:.3f} ms, communication {communication:.3f} ms, exposed {exposed:.3f} ms, {hidden}"
        )

    def step_lines(self) -> list[str]:
        """One line per traced step, for a training log; the figures are means over ranks."""
        lines = []
        for step in sorted({step for report in self.ranks for step in report.step_ns}):
            ranks = [report for report in self.ranks if step in report.step_ns]
            figures = [report.steps[step] for report in ranks if step in report.steps]
            total, hidden = sum(f.total_ns for f in figures), sum(f.hidden_ns for f in figures)
            length = sum(report.step_ns[step] for report in ranks) / len(ranks)
            overlap = f"{100.0 * hidden / total:.1f}% hidden" if total else "no communication"
            lines.append(
                f"trace step {step}: {length / 1e6:.3f} ms, communication {total / len(ranks) / 1e6:.3f} ms, "
                f"exposed {(total - hidden) / len(ranks) / 1e6:.3f} ms, {overlap}"
            )
        return lines


def inspect(
    paths: Sequence[str | Path] | str | Path,
    *,
    mode: str = "exact",
    include_last_step: bool = False,
    communication: Sequence[str] = (),
    device: int | None = None,
    schedule: str | Path | None = None,
    processes: int | None = None,
) -> TraceReport:
    """Reads the traces of one job, one file per rank, and measures them.

    Args:
        paths: Kineto / Chrome JSON (plain or gzip) or Nsight Systems SQLite exports.
        mode: "exact", or "hta" for the figures of HolisticTraceAnalysis.
        include_last_step: in the "hta" mode, keep the last ProfilerStep.
        communication: further names that are communication, as ``REGEX`` or ``KIND=REGEX``.
        device: the device to measure where a file has rows of several.
        schedule: the schedule.json of the run, to be compared line by line.
        processes: how many files to read at the same time; None decides by size and processor cores.

    Returns:
        The report; ``to_json()`` gives the fixed schema.

    Raises:
        ValueError: a file is bad or the files are not one job; one line that says what to do.
    """
    options = InspectOptions(
        mode=mode,
        include_last_step=include_last_step,
        patterns=tuple(parse_user_pattern(text) for text in communication),
        device=device,
        plan=None if schedule is None else read_plan(schedule),
    )
    listed = [paths] if isinstance(paths, str | Path) else list(paths)
    ranks = tuple(measure_files(listed, options, processes=processes))
    return TraceReport(ranks=ranks, skew=skew_over_ranks(ranks))
