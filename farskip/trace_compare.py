"""Two traces of the same program side by side: what became hidden, what got slower.

Compared are means over ranks: per step where both traces mark steps, else over the whole window, which is said. A
pair that would only give a number without a meaning is refused: different ranks, devices or modes, or one without
communication.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from farskip.trace_report import Figures, RankReport


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparedRow:
    """One line: a figure before and after, in nanoseconds per ``per``; ``kind`` is total, collective, phase, layer."""

    kind: str
    name: str
    before_ns: float
    after_ns: float

    @property
    def change_ns(self) -> float:
        """After minus before."""
        return self.after_ns - self.before_ns


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What changed from the baseline to the trace.

    Attributes:
        per: "step" or "window".
        step_ns: step time (or window) before and after.
        exposed, hidden, compute: before and after.
        rows: exposed time by collective, phase and layer, largest change first.
        overlap_percent: before and after.
        sentences: what became hidden and what got slower, in words.
    """

    per: str
    step_ns: ComparedRow
    compute: ComparedRow
    exposed: ComparedRow
    hidden: ComparedRow
    rows: tuple[ComparedRow, ...]
    overlap_percent: tuple[float, float]
    sentences: tuple[str, ...]


def compare(reports: Sequence[RankReport], baseline: Sequence[RankReport]) -> Comparison:
    """Compares a job with a baseline.

    Args:
        reports: one per rank, after.
        baseline: one per rank, before.

    Returns:
        The comparison.

    Raises:
        ValueError: the two cannot be compared; the message says why.
    """
    _refuse_incomparable(reports, baseline)
    per_step = all(report.num_steps for report in (*reports, *baseline))

    def mean(side: Sequence[RankReport], name: str) -> float:
        return sum(getattr(report, name) / _divisor(report, per_step) for report in side) / len(side)

    def row(kind: str, label: str, name: str) -> ComparedRow:
        return ComparedRow(kind=kind, name=label, before_ns=mean(baseline, name), after_ns=mean(reports, name))

    if per_step:
        step = ComparedRow(
            kind="total", name="step time", before_ns=_mean_step_ns(baseline), after_ns=_mean_step_ns(reports)
        )
    else:
        step = row("total", "window", "window_ns")
    rows = [
        item
        for kind, group in (("collective", "collectives"), ("phase", "phases"), ("layer", "layers"))
        for item in _group_rows(kind, group, reports, baseline, per_step)
    ]
    exposed, hidden = row("total", "exposed", "exposed_ns"), row("total", "hidden", "hidden_ns")
    compute = row("total", "compute", "compute_ns")
    overlap = tuple(
        100.0 * sum(report.hidden_ns for report in side) / sum(report.communication_ns for report in side)
        for side in (baseline, reports)
    )
    return Comparison(
        per="step" if per_step else "window",
        step_ns=step,
        compute=compute,
        exposed=exposed,
        hidden=hidden,
        rows=tuple(sorted(rows, key=lambda item: -abs(item.change_ns))),
        overlap_percent=(overlap[0], overlap[1]),
        sentences=_sentences(step, compute, exposed, rows),
    )


def _refuse_incomparable(reports: Sequence[RankReport], baseline: Sequence[RankReport]) -> None:
    ranks, base_ranks = [report.rank for report in reports], [report.rank for report in baseline]
    if ranks != base_ranks:
        raise ValueError(f"not comparable: ranks {ranks} against ranks {base_ranks}; give the same ranks of both runs")
    for after, before in zip(reports, baseline, strict=True):
        if after.device != before.device:
            raise ValueError(
                f"not comparable: rank {after.rank} is a {after.device} trace in {after.path} and a {before.device} "
                f"trace in {before.path}"
            )
        if after.event_set.get("mode") != before.event_set.get("mode"):
            raise ValueError("not comparable: the two were measured in different modes")
        for report in (after, before):
            if not report.communication_ns:
                raise ValueError(
                    f"not comparable: {report.path} has no communication on rank {report.rank}, so nothing can have "
                    "become hidden"
                )
        layers = [sorted(layer for layer in report.layers if layer >= 0) for report in (after, before)]
        if layers[0] and layers[1] and layers[0] != layers[1]:
            raise ValueError(
                f"not comparable: rank {after.rank} communicates in layers {layers[0]} in {after.path} and {layers[1]} "
                f"in {before.path}; these are different models"
            )


def _divisor(report: RankReport, per_step: bool) -> int:
    return report.num_steps if per_step else 1


def _mean_step_ns(side: Sequence[RankReport]) -> float:
    return sum(sum(report.step_ns.values()) / report.num_steps for report in side) / len(side)


def _group_rows(
    kind: str, group: str, reports: Sequence[RankReport], baseline: Sequence[RankReport], per_step: bool
) -> list[ComparedRow]:
    keys = {key for report in (*reports, *baseline) for key in getattr(report, group)}

    def mean(side: Sequence[RankReport], key: object) -> float:
        values = [getattr(report, group).get(key, Figures()).exposed_ns / _divisor(report, per_step) for report in side]
        return sum(values) / len(values)

    return [
        ComparedRow(kind=kind, name=_key_name(kind, key), before_ns=mean(baseline, key), after_ns=mean(reports, key))
        for key in keys
    ]


def _key_name(kind: str, key: object) -> str:
    if kind != "layer":
        return str(key)
    return "no layer" if key == -1 else f"layer {key}"


def _sentences(
    step: ComparedRow, compute: ComparedRow, exposed: ComparedRow, rows: Sequence[ComparedRow]
) -> tuple[str, ...]:
    found = [_change("exposed communication", exposed), _change(step.name, step), _change("compute", compute)]
    parts = [row for row in rows if row.kind in ("collective", "phase")]
    hidden = sorted((row for row in parts if row.change_ns < 0), key=lambda row: row.change_ns)[:3]
    worse = sorted((row for row in parts if row.change_ns > 0), key=lambda row: -row.change_ns)[:3]
    found += [f"became hidden: {row.kind} {row.name}, {-row.change_ns / 1e6:.3f} ms less exposed" for row in hidden]
    found += [f"got slower: {row.kind} {row.name}, {row.change_ns / 1e6:.3f} ms more exposed" for row in worse]
    return tuple(found)


def _change(name: str, row: ComparedRow) -> str:
    if not row.before_ns:
        return f"{name}: {row.before_ns / 1e6:.3f} ms -> {row.after_ns / 1e6:.3f} ms"
    return (
        f"{name}: {row.before_ns / 1e6:.3f} ms -> {row.after_ns / 1e6:.3f} ms "
        f"({100.0 * row.change_ns / row.before_ns:+.1f} %)"
    )
