"""The report as text for a terminal: aligned columns, no color, the answer first."""

from collections.abc import Mapping, Sequence

from farskip.trace_compare import ComparedRow, Comparison
from farskip.trace_json import causes
from farskip.trace_ranks import Skew
from farskip.trace_report import Figures, RankReport

MAX_ROWS = 16
_HEAD = ("count", "summed ms", "total ms", "hidden ms", "exposed ms", "overlap")


def percent(value: float | None) -> str:
    """A percentage, "none" where there is no communication."""
    return "none" if value is None else f"{value:.2f} %"


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> list[str]:
    """Aligned columns: the first ``left`` to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        aligned = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return ("  " + "  ".join(aligned)).rstrip()

    return [line(head), *(line(row) for row in rows)]


def render_terminal(
    reports: Sequence[RankReport], skew: Skew, *, show_names: bool = False, max_stretches: int = MAX_ROWS
) -> str:
    """The whole report.

    Args:
        reports: one per rank.
        skew: the ranks side by side.
        show_names: also list what every name was counted as.
        max_stretches: how many stretches of each rank to list.

    Returns:
        Text that ends in a newline.
    """
    lines = _rank_table(reports)
    lines += ["", *_event_set(reports)]
    for report in reports:
        lines += _rank_details(report, max_stretches)
        if show_names:
            lines += _names(report)
    lines += _skew(skew)
    return "\n".join(lines) + "\n"


def render_comparison(comparison: Comparison) -> str:
    """A comparison as text: the sentences first, then the rows that changed most."""
    lines = [f"against the baseline (means over ranks, per {comparison.per}):"]
    lines += [f"  {sentence}" for sentence in comparison.sentences]
    before, after = comparison.overlap_percent
    lines += [f"  overlap: {before:.2f} % -> {after:.2f} %", ""]
    rows = [_compared(row) for row in comparison.rows[:MAX_ROWS]]
    lines += text_table(("exposed by", "", "before ms", "after ms", "change ms"), rows, left=2)
    return "\n".join(lines) + "\n"


def _compared(row: ComparedRow) -> tuple[str, ...]:
    numbers = (row.before_ns, row.after_ns, row.change_ns)
    return (row.kind, row.name, *(f"{number / 1e6:.3f}" for number in numbers))


def _ms(nanoseconds: float) -> str:
    return f"{nanoseconds / 1e6:.3f}"


def _rank_table(reports: Sequence[RankReport]) -> list[str]:
    head = ("rank", "window ms", "compute", "communication", "hidden", "exposed", "copies only", "idle", "overlap")
    rows = [
        (
            str(report.rank),
            _ms(report.window_ns),
            _ms(report.compute_ns),
            _ms(report.communication_ns),
            _ms(report.hidden_ns),
            _ms(report.exposed_ns),
            _ms(report.copies_only_ns),
            _ms(report.idle_ns),
            percent(report.overlap_percent),
        )
        for report in reports
    ]
    return text_table(head, rows)


def _event_set(reports: Sequence[RankReport]) -> list[str]:
    """What counted as what, once for ranks that agree."""
    lines: list[str] = []
    seen: set[tuple[tuple[str, str], ...]] = set()
    for report in reports:
        key = tuple(report.event_set.items())
        if key in seen:
            continue
        seen.add(key)
        rank = "" if all(tuple(r.event_set.items()) == key for r in reports) else f", rank {report.rank}"
        lines.append(f"event set{rank}: " + "; ".join(f"{name} = {value}" for name, value in key))
    return lines


def _rank_details(report: RankReport, max_stretches: int) -> list[str]:
    lines = ["", f"rank {report.rank}   {report.path}"]
    lines += [f"  note: {note}" for note in report.notes]
    if not report.communication_ns or not report.collectives:
        return lines
    inside = report.exposed_ns - report.edge_exposed_ns
    lines.append(f"  exposed: {_ms(inside)} ms inside the window, {_ms(report.edge_exposed_ns)} ms at its edge")
    lines += ["", *_figures_table("collective", report.collectives)]
    lines += ["", *_figures_table("phase", {**report.phases, **_unattributed(report)})]
    layers = {("no layer" if layer < 0 else f"layer {layer}"): f for layer, f in sorted(report.layers.items())}
    lines += ["", *_figures_table("layer", layers)]
    steps = {("no step" if step < 0 else f"step {step}"): f for step, f in sorted(report.steps.items())}
    lines += ["", *_figures_table("step", steps)]
    lines += ["", *_causes(report), *_stretches(report, max_stretches)]
    lines += _price(report)
    lines += _plan(report)
    return lines


def _unattributed(report: RankReport) -> dict[str, Figures]:
    return {"unattributed": report.unattributed} if report.unattributed.count else {}


def _figures_table(name: str, group: Mapping[str, Figures]) -> list[str]:
    rows = [
        (
            _short(key),
            str(f.count),
            _ms(f.summed_ns),
            _ms(f.total_ns),
            _ms(f.hidden_ns),
            _ms(f.exposed_ns),
            percent(f.overlap_percent),
        )
        for key, f in list(group.items())[:MAX_ROWS]
    ]
    more = [f"  ... and {len(group) - MAX_ROWS} more (--json has all)"] if len(group) > MAX_ROWS else []
    return text_table((name, *_HEAD), rows) + more


def _short(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _causes(report: RankReport) -> list[str]:
    found = causes(report)
    if not found:
        return ["  nothing exposed"]
    return ["  why exposed: " + ", ".join(f"{cause} {length:.3f} ms" for cause, length in found.items())]


def _stretches(report: RankReport, limit: int) -> list[str]:
    if not report.stretches or limit < 1:
        return []
    rows = [
        (
            f"{stretch.start_ns / 1e6:.3f}",
            _ms(stretch.length_ns),
            stretch.cause,
            _short(stretch.waits_for or stretch.collective, 72),
            stretch.evidence,
        )
        for stretch in report.stretches[:limit]
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = ["  worst stretches (at ms, ms, cause, waits for, evidence):"]
    for at, length, cause, waits_for, evidence in rows:
        lines.append(
            f"  {at.rjust(widths[0])}  {length.rjust(widths[1])}  {cause.ljust(widths[2])}  "
            f"{waits_for.ljust(widths[3])}  {evidence}".rstrip()
        )
    if len(report.stretches) > limit:
        lines.append(f"  ... and {len(report.stretches) - limit} more (--json has all)")
    return lines


def _price(report: RankReport) -> list[str]:
    if not report.price:
        return []
    rows = [
        (
            _short(row.name, 48),
            _short(row.shape, 36),
            str(row.count_alone),
            str(row.count_under),
            f"{row.alone_ns / 1e3:.1f}",
            f"{row.under_ns / 1e3:.1f}",
            _ms(row.extra_ns),
        )
        for row in report.price[:8]
    ]
    head = ("price of overlap", "shape", "alone", "under", "alone us", "under us", "extra ms")
    return ["", *text_table(head, rows, left=2)]


def _plan(report: RankReport) -> list[str]:
    if not report.plan:
        return []
    off = [line for line in report.plan if line.status != "as planned"]
    lines = ["", f"  planned schedule: {len(report.plan) - len(off)} of {len(report.plan)} lines as planned"]
    rows = [
        (line.direction, line.text, line.status, str(line.count), f"{line.mean_ns / 1e3:.1f}") for line in report.plan
    ]
    return lines + text_table(("direction", "instruction", "status", "seen", "mean us"), rows, left=3)


def _names(report: RankReport) -> list[str]:
    rows = [
        (name.counted_as, name.said_by or "-", str(name.count), _ms(name.summed_ns), _short(name.name, 90))
        for name in report.recognized
    ]
    if not rows:
        return []
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ["", "  names (counted as, said by, count, summed ms, name):"]
    for label, said_by, count, length, name in rows:
        lines.append(
            f"  {label.ljust(widths[0])}  {said_by.ljust(widths[1])}  {count.rjust(widths[2])}  "
            f"{length.rjust(widths[3])}  {name}"
        )
    return lines


def _skew(skew: Skew) -> list[str]:
    lines = ["", *(f"note: {note}" for note in skew.notes)] if skew.notes else []
    if not skew.ranks:
        return lines
    rows = [
        (
            str(rank.rank),
            str(rank.matched),
            str(rank.unmatched),
            _ms(rank.clock_offset_ns),
            _ms(rank.mean_late_ns),
            str(rank.times_last),
            _ms(rank.wait_ns),
            _ms(rank.transfer_ns),
        )
        for rank in skew.ranks
    ]
    head = ("rank", "matched", "unmatched", "clock ms", "mean late ms", "times last", "wait ms", "transfer ms")
    lines += ["", f"skew over ranks (matched with rank {skew.reference}):", *text_table(head, rows)]
    for rank in skew.ranks:
        if rank.unmatched:
            more = "" if rank.unmatched <= len(rank.unmatched_names) else ", ..."
            lines.append(f"  unmatched on rank {rank.rank}: {', '.join(rank.unmatched_names)}{more}")
    worst = [(row.name, str(row.step), _ms(row.spread_ns), str(row.last_rank)) for row in skew.worst[:8]]
    if worst:
        lines += ["", *text_table(("widest arrivals", "step", "spread ms", "last rank"), worst)]
    return lines
