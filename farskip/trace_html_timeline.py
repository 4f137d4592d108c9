"""The timeline of a page: lanes of compute, communication and exposed time as an SVG that the page's script moves."""

from html import escape

import numpy as np

from farskip.trace_exposed import describe
from farskip.trace_intervals import Union
from farskip.trace_report import RankReport, Stretch

_MAX_PIECES = 4000
_LANES = {"compute": 20, "communication": 72, "exposed": 124}
_LANE_HEIGHT = 30
_HEIGHT = 158


def _ms(nanoseconds: float) -> str:
    return f"{nanoseconds / 1e6:.3f}"


def timeline(report: RankReport) -> str:
    """One rank's timeline with its ruler, legend and buttons."""
    start, span = report.window_start_ns, max(report.window_ns, 1)
    drawn = [
        *_pieces(report.compute, start, span, "compute", _LANES["compute"], "compute"),
        *_collectives(report, start),
        *_exposed(report),
    ]
    lanes = "".join(
        f'<rect class="lane" x="0" y="{y}" width="{span / 1e6!r}" height="{_LANE_HEIGHT}"/>' for y in _LANES.values()
    )
    labels = "".join(f'<span class="lane-name" style="top:{y - 19}px">{name}</span>' for name, y in _LANES.items())
    ticks = "".join("<span></span>" for _ in range(5))
    buttons = "".join(
        f'<button type="button" data-do="{what}" aria-label="{label}">{text}</button>'
        for what, text, label in (
            ("in", "+", "zoom in"),
            ("out", "&minus;", "zoom out"),
            ("left", "&larr;", "earlier"),
            ("right", "&rarr;", "later"),
            ("all", "all", "whole window"),
        )
    )
    legend = "".join(
        f'<span><i style="background:var(--{color})"></i>{label}</span>'
        for label, color in (
            ("compute", "compute"),
            ("communication", "hidden"),
            ("notify (waits for other ranks)", "notify"),
            ("exposed", "exposed"),
        )
    )
    return (
        f'<div class="card time" data-rank="{report.rank}"><div class="plot">{labels}'
        f'<svg viewBox="0 0 {span / 1e6!r} {_HEIGHT}" preserveAspectRatio="none" data-span="{span / 1e6!r}" '
        f'tabindex="0" role="img" aria-label="timeline of rank {report.rank}: compute, communication, exposed">'
        f'{lanes}{"".join(drawn)}</svg></div><div class="ruler">{ticks}</div><div class="legend">{legend}</div>'
        f'<div class="tools">{buttons}</div><p class="at soft" aria-live="polite">Drag to move, + and &minus; to zoom. '
        "Point at a piece, or tap it, to see what it is.</p></div>"
    )


def _rect(style: str, left_ns: int, length_ns: int, y: int, text: str) -> str:
    return (
        f'<rect class="{style}" x="{left_ns / 1e6:.6f}" y="{y}" width="{length_ns / 1e6:.6f}" height="{_LANE_HEIGHT}" '
        f'data-t="{escape(text)}"/>'
    )


def _pieces(union: Union, start: int, span: int, style: str, y: int, text: str) -> list[str]:
    """Pieces of a union, joined where they lie closer together than could be seen."""
    if not len(union):
        return []
    gap = span // _MAX_PIECES
    first = np.append(True, union.start_M[1:] - union.end_M[:-1] > gap)
    last = np.append(first[1:], True)
    pairs = zip(union.start_M[first].tolist(), union.end_M[last].tolist(), strict=True)
    return [_rect(style, a - start, b - a, y, text) for a, b in pairs]


def _collectives(report: RankReport, start: int) -> list[str]:
    events = report.events
    length = events.owned_end_C - events.owned_start_C
    order = np.argsort(-length, kind="stable")[:_MAX_PIECES]
    drawn = []
    for index in np.sort(order).tolist():
        if length[index] <= 0:
            continue
        kind = events.kind_of(index)
        style = "notify" if kind == "notify" else "comm"
        hidden = int(events.hidden_C[index])
        emulated = ", emulated link" if bool(events.emulated_C[index]) else ""
        name = f"{describe(kind, events.places[index])} ({kind}{emulated})"
        text = f"{name}, {_ms(int(length[index]))} ms, {_ms(hidden)} hidden"
        left = int(events.owned_start_C[index]) - start
        drawn.append(_rect(style, left, int(length[index]), _LANES["communication"], text))
    return drawn


def _exposed(report: RankReport) -> list[str]:
    return [
        _rect("exposed", stretch.start_ns, stretch.length_ns, _LANES["exposed"], stretch_text(stretch))
        for stretch in report.stretches[:_MAX_PIECES]
    ]


def stretch_text(stretch: Stretch) -> str:
    """A stretch in words."""
    waits_for = f" ({stretch.waits_for})" if stretch.waits_for else ""
    return f"exposed {_ms(stretch.length_ns)} ms of {stretch.collective}: {stretch.cause}{waits_for}"
