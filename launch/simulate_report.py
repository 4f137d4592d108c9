"""What `farskip simulate` answers, as text, JSON and a picture. Says of every figure that it is simulated."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

from farskip.launch.simulate_question import Question
from farskip.simulator import explain
from farskip.stage_costs import EP, TP
from farskip.stage_graph import COLLECTIVES
from farskip.what_if import DIRECTIONS, Comparison, Outcome, needed_stages

_COLORS = ("#4c72b0", "#c44e52", "#55a868", "#8172b2", "#ccb974", "#64b5cd")


@dataclass(frozen=True, kw_only=True, slots=True)
class Swept:
    """Overlapped schedules at several bandwidths.

    Attributes:
        points: GB/s, and what comes out there, ascending.
        hidden_below: share of a step that may be exposed where "all is hidden".
    """

    points: tuple[tuple[float, Comparison], ...]
    hidden_below: float

    @property
    def wirings(self) -> tuple[str, ...]:
        """Whose schedules."""
        return tuple(outcome.wiring for outcome in self.points[0][1].outcomes)

    def hides_from(self, wiring: str) -> float | None:
        """The lowest bandwidth tried from which on everything hides; None: not even at the highest one."""
        found = None
        for gb_s, comparison in reversed(self.points):
            outcome = next(outcome for outcome in comparison.outcomes if outcome.wiring == wiring)
            if outcome.exposed > self.hidden_below * outcome.total:
                break
            found = gb_s
        return found


def header(question: Question) -> str:
    """What goes in, in words."""
    shape, layout, rates = question.shape, question.layout, question.rates
    kinds = Counter(" + ".join(blocks) for blocks in shape.blocks)
    layers = ", ".join(f"{count} of {kind}" for kind, count in kinds.items())
    lines = [
        "SIMULATED: nothing below was measured, but for times that say so",
        f"model       {question.name}: {len(shape.blocks)} layers ({layers})"
        + (f", hidden {shape.hidden}" if shape.hidden else "")
        + (f", {shape.num_experts} experts" if shape.num_experts else "")
        + (f", {shape.top_k} per token" if shape.top_k else ""),
        f"ranks       ep {layout.ep}, tp {layout.tp}"
        + (", sequence parallel" if layout.sequence_parallel else "")
        + f", chunks {layout.chunks}; {layout.tokens} tokens per data-parallel rank in sequences of {layout.sequence}, "
        f"{layout.number_bytes} bytes per number, balanced routing",
    ]
    if question.measured.forward:
        lines.append(
            "            measured times are of the tokens and ranks that they were measured with, whatever stands above"
        )
    if rates.tflops is not None:
        lines.append(f"machine     {rates.tflops:g} TFLOP/s, memory {rates.memory_gb_s:g} GB/s")
    lines += [
        f"link        {axis}: {link.gb_s:g} GB/s, {link.latency_us:g} us"
        for axis, link in rates.links.items()
        if {EP: layout.ep, TP: layout.tp}[axis] > 1
    ]
    missing = question.plain()[2]
    if missing:
        lines.append(
            f"baseline    in the same chunks and shares of tokens: no time for {', '.join(missing)} without them"
        )
    lines.append(f"contention  {question.contention:g}" + _meaning(question.contention))
    return "\n".join(lines)


def _meaning(contention: float) -> str:
    if contention:
        return f": both lanes take {1 + contention:g} times as long while both are busy"
    return ": compute and transfers do not slow each other down, so a real step is never better than this"


def times_table(question: Question) -> str:
    """Every stage's time and where it comes from."""
    times, costs = question.times(), question.costs()
    needed = [needed_stages(question.setting, wiring) for wiring in question.wirings]
    stages = dict.fromkeys(stage for way in DIRECTIONS for each in needed for stage in each[way])
    rows = [("stage", "GFLOP", "MB memory", "MB link", "forward ms", "backward ms", "from")]
    for stage in sorted(stages, key=lambda name: name in COLLECTIVES):
        cost = costs.get(stage)
        backward = times.of(stage, "backward") if any(stage in each["backward"] for each in needed) else None
        rows.append(
            (
                stage,
                f"{cost.flops / 1e9:.1f}" if cost and not cost.axis else "",
                f"{cost.memory_bytes / 1e6:.1f}" if cost and not cost.axis else "",
                f"{cost.link_bytes / 1e6:.2f}" if cost and cost.axis else "",
                f"{times.forward[stage]:.3f}" if stage in times.forward else "-",
                f"{backward:.3f}" if backward is not None else "-",
                _source(question, stage),
            )
        )
    return "\nper layer, all chunks together; GFLOP and MB of forward:\n" + _columns(rows, left=(0, 6))


def _source(question: Question, stage: str) -> str:
    if stage in question.given.forward or stage in question.given.backward:
        return "given"
    cost = question.costs().get(stage)
    if stage in COLLECTIVES and cost is not None and cost.ms(question.rates) is not None:
        return "bytes over the link"
    if stage in question.measured.forward or stage in question.measured.backward:
        return "measured"
    return "shapes at the stated rates"


def table(comparison: Comparison) -> str:
    """One line per wiring and schedule, and the bound."""
    rows: list[tuple[str, ...]] = [
        ("wiring", "schedule", "forward ms", "speedup", "fwd+bwd ms", "speedup", "hidden", "exposed ms", "links ms")
    ]

    def row(name: str, outcome: Outcome) -> tuple[str, ...]:
        hidden = comparison.hidden_share(outcome)
        return (
            name,
            outcome.mode,
            f"{outcome.forward:.2f}",
            f"{comparison.forward_speedup(outcome):.3f}x",
            f"{outcome.total:.2f}",
            f"{comparison.speedup(outcome):.3f}x",
            "-" if hidden is None else f"{100 * hidden:.1f} %",
            f"{outcome.exposed:.2f}",
            f"{outcome.communication:.2f}",
        )

    rows.append(row("ordinary, blocking", comparison.blocking))
    rows += [row(outcome.wiring, outcome) for outcome in comparison.outcomes]
    free, forward = comparison.bound, comparison.forward_bound
    best = [f"{comparison.blocking.forward / forward:.3f}x" if forward else "-"]
    best.append(f"{comparison.blocking.total / free:.3f}x" if free else "-")
    rows.append(("no communication", "", f"{forward:.2f}", best[0], f"{free:.2f}", best[1], "100.0 %", "0.00", "0.00"))
    note = "hidden: of what links cost ordinary, blocking; exposed: compute waits; links: sum of transfers"
    return f"\nsimulated, all layers, layers only; {note}\n" + _columns(rows, left=(0, 1))


def pictured(question: Question, comparison: Comparison, wiring: str) -> str:
    """Timeline of two layers in the middle, and what their collectives hide under."""
    outcome = next(each for each in comparison.outcomes if (each.wiring, each.mode) == (wiring, "overlapped"))
    layers = middle_of(question.shape.blocks)
    where = " and ".join(str(layer) for layer in layers)
    lines = []
    for direction in DIRECTIONS:
        steps = getattr(outcome.schedule, direction)
        lines += [
            f"\n{wiring}, overlapped, {direction}; layers {where}, simulated ms, sums of all layers:",
            outcome.schedule.timeline(direction, layers=layers),
            explain(steps, question.times(), direction, layers=layers),
        ]
    return "\n".join(lines)


def middle_of(blocks: Sequence[Any]) -> range:
    """Two neighboring layers near the middle, of the kind that most layers are if there are such neighbors."""
    most = Counter(blocks).most_common(1)[0][0]
    starts = range(max(len(blocks) - 1, 1))
    best = min(starts, key=lambda start: (set(blocks[start : start + 2]) != {most}, abs(2 * start + 2 - len(blocks))))
    return range(best, min(best + 2, len(blocks)))


def swept_table(swept: Swept) -> str:
    """Speedups by bandwidth, and from where on everything hides."""
    rows = [("GB/s", *(f"{wiring} {what}" for wiring in swept.wirings for what in ("speedup", "exposed ms")))]
    for gb_s, comparison in swept.points:
        cells = [(f"{comparison.speedup(each):.3f}x", f"{each.exposed:.2f}") for each in comparison.outcomes]
        rows.append((f"{gb_s:.4g}", *(cell for pair in cells for cell in pair)))
    lines = ["\nsimulated, overlapped, forward and backward, by bandwidth of the link:", _columns(rows, left=())]
    for wiring in swept.wirings:
        found = swept.hides_from(wiring)
        limit = f"less than {100 * swept.hidden_below:g} % of the step exposed"
        lines.append(
            f"{wiring}: {limit} from {found:.4g} GB/s on (of those tried)"
            if found is not None
            else f"{wiring}: at no bandwidth tried {limit}"
        )
    return "\n".join(lines)


def to_json(question: Question, comparison: Comparison, swept: Swept | None) -> dict[str, Any]:
    """The figures and what went in."""
    times = question.times()

    def figures(comparison: Comparison) -> dict[str, Any]:
        return {
            "no_communication": {"forward_ms": comparison.forward_bound, "forward_backward_ms": comparison.bound},
            "ordinary_blocking": _figures(comparison, comparison.blocking),
            "wirings": {
                wiring: {each.mode: _figures(comparison, each) for each in comparison.outcomes if each.wiring == wiring}
                for wiring in question.wirings
            },
        }

    return {
        "simulated": True,
        "model": {"name": question.name, **asdict(question.shape)},
        "layout": asdict(question.layout),
        "layers": question.setting.layers,
        "rates": asdict(question.rates),
        "contention": question.contention,
        "baseline_lacks": question.plain()[2],
        "stage_ms": {"forward": dict(times.forward), "backward": dict(times.backward)},
        **figures(comparison),
        "sweep": None
        if swept is None
        else {
            "points": [{"gb_s": gb_s, **figures(each)} for gb_s, each in swept.points],
            "hides_from_gb_s": {wiring: swept.hides_from(wiring) for wiring in swept.wirings},
        },
    }


def draw(question: Question, swept: Swept, file: BinaryIO) -> None:
    """Speedup over bandwidth, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    bandwidths = [gb_s for gb_s, _ in swept.points]
    for number, wiring in enumerate(swept.wirings):
        speedups = [comparison.speedup(comparison.outcomes[number]) for _, comparison in swept.points]
        axes.plot(bandwidths, speedups, marker="o", markersize=3, color=_COLORS[number % len(_COLORS)], label=wiring)
    bound = [each.blocking.total / each.bound if each.bound else math.nan for _, each in swept.points]
    axes.plot(bandwidths, bound, color="black", linestyle="--", linewidth=1, label="no communication")
    axes.set_xscale("log")
    axes.set_xticks(bandwidths[::3], labels=[f"{gb_s:.3g}" for gb_s in bandwidths[::3]])
    axes.minorticks_off()
    axes.set_xlabel("bandwidth of the link, GB/s", fontsize=8)
    axes.set_ylabel("speedup over ordinary blocking, forward and backward", fontsize=8)
    axes.set_title(f"SIMULATED, overlapped: {question.name}, contention {question.contention:g}", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=8)
    figure.savefig(file, format="png", dpi=130)


def _figures(comparison: Comparison, outcome: Outcome) -> dict[str, Any]:
    return {
        "forward_ms": outcome.forward,
        "forward_speedup": comparison.forward_speedup(outcome),
        "forward_backward_ms": outcome.total,
        "speedup": comparison.speedup(outcome),
        "hidden_share": comparison.hidden_share(outcome),
        "exposed_ms": outcome.exposed,
        "communication_ms": outcome.communication,
    }


def _columns(rows: Sequence[Sequence[str]], left: Sequence[int]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
