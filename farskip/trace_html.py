"""The report as one self-contained page: no network, no library, readable on a phone, usable without a mouse.

The timeline is an SVG whose view the script moves; without script it shows the whole window. For drawing only, pieces
that lie closer together than a screen could show are joined; every number on the page is exact.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from farskip.trace_assert import BROKEN, HOLDS, Judgement
from farskip.trace_compare import Comparison
from farskip.trace_html_assets import SCRIPT, STYLE
from farskip.trace_html_timeline import stretch_text, timeline
from farskip.trace_json import causes
from farskip.trace_ranks import Skew
from farskip.trace_report import Figures, RankReport, Stretch
from farskip.trace_terminal import percent

_MAX_STRETCHES = 100
_SHOWN_STRETCHES = 10


def render_html(
    reports: Sequence[RankReport], skew: Skew, comparison: Comparison | None, judgements: Sequence[Judgement]
) -> str:
    """The whole page.

    Args:
        reports: one per rank.
        skew: the ranks side by side.
        comparison: with a baseline, or None.
        judgements: of conditions, may be empty.

    Returns:
        HTML text.
    """
    body = [
        "<h1>How much communication was hidden</h1>",
        _summary(reports),
        _judgements(judgements),
        _comparison(comparison),
        _all_ranks(reports),
        *(_rank(report) for report in reports),
        _skew(skew),
        _event_set(reports),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>farskip trace: {escape(_headline(reports))}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{''.join(body)}</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _ms(nanoseconds: float) -> str:
    return f"{nanoseconds / 1e6:.3f}"


def _share(reports: Sequence[RankReport]) -> float | None:
    communication = sum(report.communication_ns for report in reports)
    return 100.0 * sum(report.hidden_ns for report in reports) / communication if communication else None


def _headline(reports: Sequence[RankReport]) -> str:
    share = _share(reports)
    return "no communication" if share is None else f"{share:.2f} % hidden"


def _tile(value: str, label: str) -> str:
    return f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>'


def _summary(reports: Sequence[RankReport]) -> str:
    share = _share(reports)
    many = len(reports) > 1
    tiles = [_tile("none" if share is None else f"{share:.2f} %", "of communication hidden")]
    if many and share is not None:
        worst = min((r for r in reports if r.overlap_percent is not None), key=lambda r: r.overlap_percent or 0.0)
        tiles.append(_tile(percent(worst.overlap_percent), f"hidden on the worst rank, {worst.rank}"))
    exposed = max(reports, key=lambda report: report.exposed_ns)
    of = f" on the worst rank, {exposed.rank}" if many else ""
    per_step = exposed.exposed_per_step_ns()
    if per_step is not None:
        tiles.append(_tile(f"{per_step / 1e6:.3f} ms", f"exposed per step{of}"))
    tiles.append(_tile(f"{_ms(exposed.exposed_ns)} ms", f"exposed in the whole window{of}"))
    steps = max(report.num_steps for report in reports)
    if steps:
        tiles.append(_tile(str(steps), "traced steps" if steps > 1 else "traced step"))
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _judgements(judgements: Sequence[Judgement]) -> str:
    if not judgements:
        return ""
    marks = {HOLDS: "ok", BROKEN: "bad"}
    rows = [
        f'<tr><td class="l">{escape(j.condition.text)}</td><td class="l"><span class="{marks.get(j.outcome, "open")}">'
        f'{escape(j.outcome)}</span></td><td class="l w">{escape(j.message)}</td></tr>'
        for j in judgements
    ]
    return f"<h2>Conditions</h2>{_table(('condition', 'outcome', 'decided by'), rows, 3)}"


def _comparison(comparison: Comparison | None) -> str:
    if comparison is None:
        return ""
    rows = [
        _row((row.kind, row.name, _ms(row.before_ns), _ms(row.after_ns), f"{row.change_ns / 1e6:+.3f}"), 2)
        for row in comparison.rows[:40]
    ]
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in comparison.sentences)
    head = ("exposed by", "name", "before ms", "after ms", "change ms")
    return (
        f'<h2>Against the baseline</h2><p class="soft">Means over ranks, per {comparison.per}.</p>'
        f"<ul>{items}</ul>{_table(head, rows, 2)}"
    )


def _table(head: Sequence[str], rows: Iterable[str], left: int = 1) -> str:
    cells = "".join(
        f'<th class="l">{escape(name)}</th>' if column < left else f"<th>{escape(name)}</th>"
        for column, name in enumerate(head)
    )
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _row(cells: Sequence[str], left: int = 1) -> str:
    inner = "".join(
        f'<td class="l" title="{escape(cell)}">{escape(cell)}</td>' if column < left else f"<td>{escape(cell)}</td>"
        for column, cell in enumerate(cells)
    )
    return f"<tr>{inner}</tr>"


def _all_ranks(reports: Sequence[RankReport]) -> str:
    parts = (
        ("compute alone", "compute", lambda r: r.compute_ns - r.hidden_ns),
        ("hidden communication", "hidden", lambda r: r.hidden_ns),
        ("exposed communication", "exposed", lambda r: r.exposed_ns),
        ("copies only", "copies", lambda r: r.copies_only_ns),
        ("idle", "idle", lambda r: r.idle_ns),
    )
    bars = []
    for report in reports:
        if not report.window_ns:
            continue
        pieces = "".join(
            f'<i style="width:{100.0 * measure(report) / report.window_ns:.4f}%;background:var(--{color})" '
            f'title="{label}: {_ms(measure(report))} ms"></i>'
            for label, color, measure in parts
        )
        bars.append(f'<p class="small soft">rank {report.rank}</p><div class="bar">{pieces}</div>')
    legend = "".join(f'<span><i style="background:var(--{color})"></i>{label}</span>' for label, color, _ in parts)
    columns = ("window", "compute", "communication", "hidden", "exposed", "copies only", "idle")
    head = ("rank", "overlap", *(f"{name} ms" for name in columns))
    rows = []
    for r in reports:
        busy = (r.window_ns, r.compute_ns, r.communication_ns, r.hidden_ns, r.exposed_ns)
        cells = "".join(f"<td>{_ms(number)}</td>" for number in (*busy, r.copies_only_ns, r.idle_ns))
        rows.append(f'<tr><td class="l">{r.rank}</td>{_meter(r.overlap_percent)}{cells}</tr>')
    drawing = f'<div class="card">{"".join(bars)}<div class="legend">{legend}</div></div>' if bars else ""
    return f"<h2>Ranks</h2>{drawing}{_table(head, rows)}"


def _meter(value: float | None) -> str:
    if value is None:
        return "<td>none</td>"
    return f'<td><span class="meter"><i style="width:{value:.2f}%"></i></span>{value:.2f} %</td>'


def _rank(report: RankReport) -> str:
    parts = [f'<h2>Rank {report.rank}</h2><p class="soft small path">{escape(report.path)}</p>']
    parts += [f'<p class="small">{escape(note)}</p>' for note in report.notes]
    if not report.communication_ns or not report.collectives:
        return "".join(parts)
    parts.append(timeline(report))
    chips = "".join(f'<span class="chip">{escape(c)} {length:.3f} ms</span>' for c, length in causes(report).items())
    inside = report.exposed_ns - report.edge_exposed_ns
    parts.append(
        f"<h3>Why exposed</h3><p>{chips or 'Nothing was exposed.'}</p>"
        f'<p class="soft small">{_ms(inside)} ms inside the window, {_ms(report.edge_exposed_ns)} ms at its edge.</p>'
    )
    parts.append(_stretches(report))
    layers = {("no layer" if n < 0 else f"layer {n}"): f for n, f in sorted(report.layers.items())}
    steps = {("no step" if n < 0 else f"step {n}"): f for n, f in sorted(report.steps.items())}
    phases = {**report.phases, **({"unattributed": report.unattributed} if report.unattributed.count else {})}
    groups = (("collective", report.collectives), ("phase", phases), ("layer", layers), ("step", steps))
    for name, group in groups:
        parts.append(f"<h3>By {name}</h3>{_figures(name, group)}")
    parts += [_price(report), _plan(report)]
    return "".join(parts)


def _figures(name: str, group: Mapping[str, Figures]) -> str:
    head = (name, "overlap", "exposed ms", "hidden ms", "total ms", "summed ms", "count")
    rows = []
    for key, f in group.items():
        numbers = "".join(f"<td>{_ms(value)}</td>" for value in (f.exposed_ns, f.hidden_ns, f.total_ns, f.summed_ns))
        rows.append(
            f'<tr><td class="l" title="{escape(key)}">{escape(key)}</td>{_meter(f.overlap_percent)}{numbers}'
            f"<td>{f.count}</td></tr>"
        )
    return _table(head, rows)


def _stretches(report: RankReport) -> str:
    if not report.stretches:
        return ""
    rows = [_stretch_row(report, stretch) for stretch in report.stretches[:_MAX_STRETCHES]]
    left_out = len(report.stretches) - _MAX_STRETCHES
    note = f'<p class="soft small">{left_out} shorter ones are left out here; --json has all.</p>'
    note, more = note if left_out > 0 else "", ""
    if len(rows) > _SHOWN_STRETCHES:
        rest = rows[_SHOWN_STRETCHES:]
        more = f"<details><summary>the next {len(rest)}</summary>{_stretch_table(rest)}{note}</details>"
    intro = f"The worst of {len(report.stretches)} exposed stretches; choose one to see it in the timeline."
    return f'<p class="small">{intro}</p>{_stretch_table(rows[:_SHOWN_STRETCHES])}{more}'


def _stretch_table(rows: Sequence[str]) -> str:
    head = '<th>ms</th><th>at ms</th><th class="l">cause</th><th class="l">waits for</th><th class="l">evidence</th>'
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _stretch_row(report: RankReport, stretch: Stretch) -> str:
    return (
        f'<tr class="jump" tabindex="0" data-rank="{report.rank}" data-at="{stretch.start_ns / 1e6!r}" '
        f'data-ms="{stretch.length_ns / 1e6!r}" data-text="{escape(stretch_text(stretch))}">'
        f"<td>{_ms(stretch.length_ns)}</td><td>{_ms(stretch.start_ns)}</td>"
        f'<td class="l">{escape(stretch.cause)}</td><td class="l w">{escape(stretch.waits_for or "-")}</td>'
        f'<td class="l">{escape(stretch.evidence)}</td></tr>'
    )


def _price(report: RankReport) -> str:
    if not report.price:
        return ""
    rows = [
        _row(
            (
                row.name,
                row.shape,
                str(row.count_alone),
                str(row.count_under),
                f"{row.alone_ns / 1e3:.1f}",
                f"{row.under_ns / 1e3:.1f}",
                _ms(row.extra_ns),
            ),
            2,
        )
        for row in report.price[:20]
    ]
    head = ("the same work", "shape", "alone", "under", "alone us", "under us", "extra ms")
    return (
        '<h3>The price of overlap</h3><p class="soft small">Median length alone and under communication.</p>'
        f"{_table(head, rows, 2)}"
    )


def _plan(report: RankReport) -> str:
    if not report.plan:
        return ""
    off = sum(line.status != "as planned" for line in report.plan)
    rows = []
    for line in report.plan:
        mark = "ok" if line.status == "as planned" else "bad"
        rows.append(
            f'<tr><td class="l">{escape(line.text)}</td><td class="l">{line.direction}</td>'
            f'<td class="l"><span class="{mark}">{line.status}</span></td><td>{line.count}</td>'
            f"<td>{line.mean_ns / 1e3:.1f}</td></tr>"
        )
    table = _table(("instruction", "direction", "status", "seen", "mean us"), rows, 3)
    return (
        f"<h3>The planned schedule</h3><details{' open' if off else ''}><summary>"
        f"{len(report.plan) - off} of {len(report.plan)} lines as planned</summary>{table}</details>"
    )


def _skew(skew: Skew) -> str:
    notes = "".join(f'<p class="small soft">{escape(note)}</p>' for note in skew.notes)
    if not skew.ranks:
        return notes
    rows = [
        _row(
            (
                str(rank.rank),
                _ms(rank.mean_late_ns),
                str(rank.times_last),
                _ms(rank.wait_ns),
                _ms(rank.transfer_ns),
                _ms(rank.clock_offset_ns),
                str(rank.matched),
                str(rank.unmatched),
            )
        )
        for rank in skew.ranks
    ]
    head = ("rank", "mean late ms", "times last", "wait ms", "transfer ms", "clock ms", "matched", "unmatched")
    unmatched = "".join(
        f'<p class="small soft">Unmatched on rank {rank.rank}: {escape(", ".join(rank.unmatched_names))}'
        f"{', ...' if rank.unmatched > len(rank.unmatched_names) else ''}</p>"
        for rank in skew.ranks
        if rank.unmatched
    )
    worst = [_row((row.name, _ms(row.spread_ns), str(row.last_rank), str(row.step))) for row in skew.worst]
    worst_head = ("collective", "spread ms", "last rank", "step")
    widest = f"<h3>Widest arrivals</h3>{_table(worst_head, worst)}" if worst else ""
    return f"<h2>Skew over ranks</h2>{notes}{_table(head, rows)}{unmatched}{widest}"


def _event_set(reports: Sequence[RankReport]) -> str:
    seen: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for report in reports:
        seen.setdefault(tuple(report.event_set.items()), []).append(report.rank)
    parts = []
    for items, ranks in seen.items():
        title = "" if len(seen) == 1 else f"<p>Rank {', '.join(map(str, ranks))}</p>"
        listing = "".join(f"<li><b>{escape(name)}</b>: {escape(value)}</li>" for name, value in items)
        parts.append(f'{title}<ul class="small">{listing}</ul>')
    return f"<h2>What counted as what</h2>{''.join(parts)}"
