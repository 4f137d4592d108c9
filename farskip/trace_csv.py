"""The report as one CSV table: one line per rank and group, for spreadsheets and data frames."""

import csv
import io
from collections.abc import Iterator, Sequence

from farskip.trace_report import Figures, RankReport

COLUMNS = ("rank", "group", "name", "count", "summed_ms", "total_ms", "hidden_ms", "exposed_ms", "overlap_percent")


def render_csv(reports: Sequence[RankReport]) -> str:
    """All tables below one another.

    Args:
        reports: one per rank.

    Returns:
        CSV with a head line; ``group`` is rank, collective, phase, layer, step or unattributed; an overlap that does
        not exist is empty.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for report in reports:
        for group, name, figures in _lines(report):
            percent = figures.overlap_percent
            writer.writerow(
                [
                    report.rank,
                    group,
                    name,
                    figures.count,
                    figures.summed_ns / 1e6,
                    figures.total_ns / 1e6,
                    figures.hidden_ns / 1e6,
                    figures.exposed_ns / 1e6,
                    "" if percent is None else percent,
                ]
            )
    return out.getvalue()


def _lines(report: RankReport) -> Iterator[tuple[str, str, Figures]]:
    # The HTA-compatible mode has no groups; its totals stand in the rank's own figures.
    total = Figures(
        count=report.figures.count,
        summed_ns=report.figures.summed_ns or report.communication_ns,
        total_ns=report.communication_ns,
        hidden_ns=report.hidden_ns,
    )
    yield "rank", str(report.rank), total
    for name, figures in report.collectives.items():
        yield "collective", name, figures
    for name, figures in report.phases.items():
        yield "phase", name, figures
    yield "unattributed", "", report.unattributed
    for layer, figures in sorted(report.layers.items()):
        yield "layer", "" if layer < 0 else str(layer), figures
    for step, figures in sorted(report.steps.items()):
        yield "step", "" if step < 0 else str(step), figures
