"""Judges a report against conditions, for a gate in CI: ``overlap >= 85%``, ``dispatch.overlap >= 90%``.

A condition holds if it holds on the worst rank. What a trace cannot answer (no communication, no such layer, no steps
for a figure per step) is neither held nor broken: it cannot be judged, and a gate must not call that a success.

Grammar:  [of.]figure  op  number [unit] [/step]
    of       all (default), a collective, stage or phase ("dispatch", "all_reduce", "dispatch::backward"), layer[3],
    step[7] figure   overlap | exposed | hidden | total | summed | count | communication | compute | idle | copies |
    window op       >= <= > < == unit     % with overlap; ns, us, ms, s with times; nothing with count
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from farskip.trace_report import Figures, RankReport

HOLDS, BROKEN, UNJUDGED = "holds", "does not hold", "cannot be judged"

_CONDITION = re.compile(
    r"^\s*(?:(?P<of>.+?)\.)?(?P<figure>[a-z]+)\s*(?P<op>>=|<=|==|>|<)\s*(?P<number>\d+(?:\.\d+)?)\s*"
    r"(?P<unit>%|ns|us|µs|ms|s)?\s*(?P<per>/\s*step)?\s*$"
)
_UNIT_NS = {"ns": 1.0, "us": 1e3, "µs": 1e3, "ms": 1e6, "s": 1e9}
_RANK_FIGURES = ("communication", "compute", "idle", "copies", "window")
_FIGURES = ("overlap", "exposed", "hidden", "total", "summed", "count", *_RANK_FIGURES)


@dataclass(frozen=True, kw_only=True, slots=True)
class Condition:
    """One condition, parsed.

    Attributes:
        text: as the user wrote it.
        of: "" for everything, else a collective, stage, phase, "layer[3]" or "step[7]".
        figure: what is compared.
        op: the comparison.
        bound: percent, nanoseconds or a count.
        per_step: whether the figure is divided by the number of steps.
    """

    text: str
    of: str
    figure: str
    op: str
    bound: float
    per_step: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """What came of one condition.

    Attributes:
        condition: the condition.
        outcome: HOLDS, BROKEN or UNJUDGED.
        message: one line with the figure and the rank that decided, or why it cannot be judged.
    """

    condition: Condition
    outcome: str
    message: str


def parse_condition(text: str) -> Condition:
    """Reads one condition.

    Args:
        text: as in ``--assert``.

    Returns:
        The condition.

    Raises:
        ValueError: it is none; the message shows the form.
    """
    match = _CONDITION.match(text)
    if match is None or match["figure"] not in _FIGURES:
        raise ValueError(
            f'--assert {text!r}: no condition; write one like "overlap >= 85%", "exposed <= 2ms/step", '
            f'"dispatch.overlap >= 90%" or "layer[3].exposed <= 1ms" (figures: {", ".join(_FIGURES)})'
        )
    figure, unit, of = match["figure"], match["unit"], match["of"] or ""
    of = "" if of == "all" else of
    expected = "%" if figure == "overlap" else "" if figure == "count" else "a time (ns, us, ms, s)"
    fits = {"%": unit == "%", "": unit is None}.get(expected, unit in _UNIT_NS)
    if not fits:
        raise ValueError(f"--assert {text!r}: {figure} is compared with {expected or 'a plain number'}; add the unit")
    if match["per"] and figure == "overlap":
        raise ValueError(f"--assert {text!r}: a percentage is not counted per step; drop /step")
    if of and figure in _RANK_FIGURES:
        raise ValueError(f"--assert {text!r}: {figure} is a figure of the whole rank; drop {of!r}")
    return Condition(
        text=text.strip(),
        of=of,
        figure=figure,
        op=match["op"],
        bound=float(match["number"]) * _UNIT_NS.get(unit or "", 1.0),
        per_step=match["per"] is not None,
    )


def judge(reports: Sequence[RankReport], condition: Condition) -> Judgement:
    """Judges one condition on the worst rank.

    Args:
        reports: one per rank.
        condition: the condition.

    Returns:
        The judgement; unjudged as soon as one rank cannot answer.
    """
    values = []
    for report in reports:
        value = _value(report, condition)
        if isinstance(value, str):
            return Judgement(condition=condition, outcome=UNJUDGED, message=f"rank {report.rank}: {value}")
        values.append((value, report.rank))
    worst, rank = min(values) if condition.op in (">=", ">") else max(values)
    if condition.op == "==":
        worst, rank = max(values, key=lambda item: abs(item[0] - condition.bound))
    held = {
        ">=": worst >= condition.bound,
        "<=": worst <= condition.bound,
        ">": worst > condition.bound,
        "<": worst < condition.bound,
        "==": worst == condition.bound,
    }[condition.op]
    return Judgement(
        condition=condition,
        outcome=HOLDS if held else BROKEN,
        message=f"{_show(worst, condition)} on rank {rank}" + (" (the worst)" if len(reports) > 1 else ""),
    )


def exit_code(judgements: Sequence[Judgement]) -> int:
    """0 if all hold, 1 if one is broken, else 2 if one cannot be judged."""
    outcomes = {judgement.outcome for judgement in judgements}
    return 1 if BROKEN in outcomes else 2 if UNJUDGED in outcomes else 0


def junit(judgements: Sequence[Judgement], seconds: float) -> bytes:
    """The judgements as a JUnit file: broken is a failure, unjudged an error."""
    count = {outcome: sum(j.outcome == outcome for j in judgements) for outcome in (BROKEN, UNJUDGED)}
    suite = ElementTree.Element(
        "testsuite",
        name="farskip trace",
        tests=str(len(judgements)),
        failures=str(count[BROKEN]),
        errors=str(count[UNJUDGED]),
        time=f"{seconds:.3f}",
    )
    for judgement in judgements:
        name = judgement.condition.text
        case = ElementTree.SubElement(suite, "testcase", classname="farskip.trace", name=name, time="0")
        if judgement.outcome != HOLDS:
            tag = "failure" if judgement.outcome == BROKEN else "error"
            ElementTree.SubElement(case, tag, message=f"{judgement.outcome}: {judgement.message}")
        else:
            ElementTree.SubElement(case, "system-out").text = judgement.message
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n"


def _value(report: RankReport, condition: Condition) -> float | str:
    """The figure of one rank, or why there is none."""
    if report.device == "none":
        return "no device events"
    value: float | None
    if condition.figure in _RANK_FIGURES:
        value = {
            "communication": report.communication_ns,
            "compute": report.compute_ns,
            "idle": report.idle_ns,
            "copies": report.copies_only_ns,
            "window": report.window_ns,
        }[condition.figure]
    elif not condition.of and condition.figure == "overlap":
        value = report.overlap_percent
        if value is None:
            return "no communication"
    elif not condition.of and condition.figure in ("exposed", "hidden"):
        value = report.exposed_ns if condition.figure == "exposed" else report.hidden_ns
    else:
        figures = report.figures if not condition.of else figures_of(report, condition.of)
        if isinstance(figures, str):
            return figures
        value = _figure(figures, condition.figure)
        if value is None:
            return f"no communication time in {condition.of}"
    if condition.figure in ("exposed", "hidden") and not report.communication_ns:
        return "no communication"
    if condition.per_step:
        if not report.num_steps:
            return "the trace marks no steps (ProfilerStep#N); drop /step or profile with a schedule"
        value /= report.num_steps
    return value


def figures_of(report: RankReport, of: str) -> Figures | str:
    """The figures of one collective, stage, phase, layer or step of a rank; why not, if it has none."""
    numbered = re.fullmatch(r"(layer|step)\[(\d+)\]", of)
    if numbered:
        group = report.layers if numbered[1] == "layer" else report.steps
        known = sorted(number for number in group if number >= 0)
        figures = group.get(int(numbered[2]))
        listing = ", ".join(map(str, known[:12])) or "none"
        return figures if figures is not None else f"no communication in {of} (found: {listing})"
    if of in report.phases:
        backward = report.phases.get(f"{of}::backward")
        return report.phases[of] + backward if backward is not None else report.phases[of]
    if f"{of}::backward" in report.phases:
        return report.phases[f"{of}::backward"]
    if of in report.collectives:
        return report.collectives[of]
    listing = ", ".join([*report.collectives, *report.phases][:12]) or "none"
    return f"no communication called {of!r} (found: {listing})"


def _figure(figures: Figures, name: str) -> float | None:
    if name == "overlap":
        return figures.overlap_percent
    return {
        "exposed": figures.exposed_ns,
        "hidden": figures.hidden_ns,
        "total": figures.total_ns,
        "summed": figures.summed_ns,
        "count": figures.count,
    }[name]


def _show(value: float, condition: Condition) -> str:
    per = "/step" if condition.per_step else ""
    if condition.figure == "overlap":
        return f"{value:.2f}%"
    return f"{value:g}{per}" if condition.figure == "count" else f"{value / 1e6:.3f} ms{per}"
