"""The report as JSON: the fixed schema of ``--json``, and everything else under ``--details``."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import msgspec

from farskip.trace_compare import Comparison
from farskip.trace_ranks import Skew
from farskip.trace_report import Figures, RankReport


def ms(nanoseconds: float) -> float:
    """Nanoseconds as milliseconds."""
    return nanoseconds / 1e6


def report_json(reports: Sequence[RankReport]) -> dict[str, Any]:
    """The fixed schema; see docs/trace.md.

    Args:
        reports: one per rank.

    Returns:
        Values that any JSON encoder takes; times are milliseconds, an unknown layer or step is null.
    """
    return {"event_set": _event_set(reports), "ranks": [_rank(report) for report in reports]}


def details_json(reports: Sequence[RankReport], skew: Skew, comparison: Comparison | None) -> dict[str, Any]:
    """What the fixed schema has no place for: edges, price, plan, names, skew, comparison and notes."""
    return {
        "ranks": [
            {
                "rank": report.rank,
                "path": report.path,
                "device": report.device,
                "num_steps": report.num_steps,
                "step_ms": {str(step): ms(length) for step, length in report.step_ns.items()},
                "exposed_at_the_edge_ms": ms(report.edge_exposed_ns),
                "exposed_inside_ms": ms(report.exposed_ns - report.edge_exposed_ns),
                "causes": causes(report),
                "price": [_milliseconds(asdict(row)) for row in report.price],
                "plan": [_milliseconds(asdict(line)) for line in report.plan],
                "names": [_milliseconds(asdict(name)) for name in report.recognized],
                "notes": list(report.notes),
            }
            for report in reports
        ],
        "skew": {
            "reference": skew.reference,
            "ranks": [_milliseconds(asdict(rank)) for rank in skew.ranks],
            "worst": [_milliseconds(asdict(row)) for row in skew.worst],
            "notes": list(skew.notes),
        },
        "comparison": None if comparison is None else _comparison(comparison),
    }


def causes(report: RankReport) -> dict[str, float]:
    """Exposed milliseconds per cause, largest first."""
    found: dict[str, int] = {}
    for stretch in report.stretches:
        found[stretch.cause] = found.get(stretch.cause, 0) + stretch.length_ns
    return {cause: ms(length) for cause, length in sorted(found.items(), key=lambda item: -item[1])}


def encode(value: dict[str, Any]) -> bytes:
    """JSON text, indented, ending in a newline."""
    return msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n"


def _event_set(reports: Sequence[RankReport]) -> dict[str, Any]:
    """What counted as what, once where all ranks agree, else rank by rank."""
    first = dict(reports[0].event_set)
    if all(dict(report.event_set) == first for report in reports):
        return first
    common = {key: value for key, value in first.items() if all(r.event_set.get(key) == value for r in reports)}
    return {
        **common,
        "by_rank": {
            str(report.rank): {key: value for key, value in report.event_set.items() if key not in common}
            for report in reports
        },
    }


def _rank(report: RankReport) -> dict[str, Any]:
    return {
        "rank": report.rank,
        "window_ms": ms(report.window_ns),
        "compute_ms": ms(report.compute_ns),
        "communication_ms": ms(report.communication_ns),
        "hidden_ms": ms(report.hidden_ns),
        "exposed_ms": ms(report.exposed_ns),
        "copies_only_ms": ms(report.copies_only_ns),
        "idle_ms": ms(report.idle_ns),
        "overlap_percent": report.overlap_percent,
        "collectives": [{"name": name, **_figures(figures)} for name, figures in report.collectives.items()],
        "phases": [{"phase": phase, **_figures(figures)} for phase, figures in report.phases.items()],
        "layers": _numbered("layer", report.layers),
        "steps": _numbered("step", report.steps),
        "unattributed": _figures(report.unattributed),
        "exposed_stretches": [
            {
                "start_ms": ms(stretch.start_ns),
                "ms": ms(stretch.length_ns),
                "cause": stretch.cause,
                "waits_for": stretch.waits_for,
                "evidence": stretch.evidence,
            }
            for stretch in report.stretches
        ],
    }


def _numbered(key: str, group: Mapping[int, Figures]) -> list[dict[str, Any]]:
    """Layers or steps by number, the unknown last."""
    numbers = sorted(group, key=lambda number: (number < 0, number))
    return [{key: number if number >= 0 else None, **_figures(group[number])} for number in numbers]


def _figures(figures: Figures) -> dict[str, Any]:
    return {
        "count": figures.count,
        "summed_ms": ms(figures.summed_ns),
        "total_ms": ms(figures.total_ns),
        "hidden_ms": ms(figures.hidden_ns),
        "exposed_ms": ms(figures.exposed_ns),
        "overlap_percent": figures.overlap_percent,
    }


def _comparison(comparison: Comparison) -> dict[str, Any]:
    totals = (comparison.step_ns, comparison.compute, comparison.exposed, comparison.hidden)
    return {
        "per": comparison.per,
        "overlap_percent": list(comparison.overlap_percent),
        "totals": [{"name": row.name, "before_ms": ms(row.before_ns), "after_ms": ms(row.after_ns)} for row in totals],
        "exposed": [
            {"kind": row.kind, "name": row.name, "before_ms": ms(row.before_ns), "after_ms": ms(row.after_ns)}
            for row in comparison.rows
        ],
        "sentences": list(comparison.sentences),
    }


def _milliseconds(values: dict[str, Any]) -> dict[str, Any]:
    """A record's fields with every ``_ns`` turned into ``_ms``."""
    return {
        (f"{key[:-3]}_ms" if key.endswith("_ns") else key): (ms(value) if key.endswith("_ns") else value)
        for key, value in values.items()
    }
