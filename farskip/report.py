"""`report.md`: what a conversion cost, what was repaired, what was hidden; as tables, sentences and pictures.

Every figure is handed in as measured; this file computes nothing but the share of the damage that was closed, and
prints no share where the damage is within its own noise.
"""

import json
import math
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farskip.evaluation import DAMAGE_NOISE_FACTOR, NORMAL_95, Evaluation, damage_closed, paired_difference
from farskip.metrics import METRICS_FILE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COMPUTE, _COMMUNICATION, _EXPOSED = "#4c72b0", "#55a868", "#c44e52"


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One model on the held-out text.

    Attributes:
        name: original, rewired or repaired.
        evaluation: cross entropy, and KL to the original where there is one.
        prompt: what the model was given to continue.
        continuation: what it wrote, greedily.
    """

    name: str
    evaluation: Evaluation
    prompt: str
    continuation: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Overlap:
    """One schedule over a link, as the trace inspector and the clock saw it.

    Attributes:
        schedule: ``serial`` or ``overlapped``.
        step_ms: wall time of each timed step on the slowest rank, in the order they ran.
        communication_ms: time on the clock with communication, of the traced step; mean over ranks.
        hidden_ms: of that, under compute.
        exposed_ms: of that, not under compute.
    """

    schedule: str
    step_ms: tuple[float, ...]
    communication_ms: float
    hidden_ms: float
    exposed_ms: float


def machine_line() -> str:
    """Processor count, Python, torch and transformers, for the foot of a report."""
    import os
    from importlib.metadata import version

    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {libraries}"


def write_conversion_report(
    folder: Path,
    measured: Sequence[Measured],
    wiring: str,
    *,
    link: str | None = None,
    overlaps: Sequence[Overlap] = (),
    same_bits: bool = False,
    metrics: Mapping[str, Path] | None = None,
    minutes: Mapping[str, float] | None = None,
    schedule: str = "",
) -> Path:
    """Write report.md and its pictures.

    Args:
        folder: run folder.
        measured: original, rewired and repaired model.
        wiring: what was converted to, in words.
        link: what the overlap was measured over, in words.
        overlaps: serial and overlapped, timed in turn.
        same_bits: loss and gradients of the two were compared, and equal.
        metrics: name of a training run -> its run folder, for the loss curves.
        minutes: name of a stage -> how long it took.
        schedule: the printed timeline.

    Returns:
        Path of the report.
    """
    pictures = [_draw_damage(folder, measured)]
    runs = metrics if metrics is not None else {"distill": folder}
    pictures += [_draw_losses(folder, runs)]
    if overlaps:
        pictures.append(_draw_overlap(folder, overlaps, link or ""))
    lines = [f"# Conversion to {wiring}", "", *_damage_lines(measured), "", *_choice_lines(runs), ""]
    lines += [f"![{picture.stem}]({picture.name})" for picture in pictures if picture.stem != "overlap"]
    lines += ["", "## What the three models write", "", "Greedy continuation of", "", _fence(measured[0].prompt)]
    for model in measured:
        lines += ["", f"{model.name}:", "", _fence(model.continuation)]
    if overlaps:
        lines += ["", *_overlap_lines(overlaps, link or "", same_bits), "", "![overlap](overlap.png)"]
    if schedule:
        lines += [
            "",
            "Layers 1 and 2 in the schedule of the repair, forward (whole in its schedule.txt):",
            "",
        ]
        lines.append(_fence(schedule.rstrip()))
    if minutes:
        lines += ["", "## Where the time went", "", "| stage | minutes |", "|---|--:|"]
        lines += [f"| {name} | {value:.1f} |" for name, value in minutes.items()]
    lines += ["", f"Machine: {machine_line()}.", ""]
    report = folder / "report.md"
    part = folder / ".report.md.part"
    part.write_text("\n".join(lines))
    part.rename(report)
    return report


def damage_sentence(measured: Sequence[Measured]) -> str:
    """How much of the damage was closed, or why that is not said. Intervals are of paired differences."""
    original, rewired, repaired = (model.evaluation for model in measured)
    damage, damage_ci95 = paired_difference(original, rewired)
    share = damage_closed(original, rewired, repaired)
    if share is None and damage < -damage_ci95 * DAMAGE_NOISE_FACTOR / NORMAL_95:
        return (
            f"Rewiring changed the held-out loss by {damage:+.4f} ± {damage_ci95:.4f} nats per token (paired): there "
            "is no damage of which a share could be closed."
        )
    if share is None:
        return (
            f"Rewiring changed the held-out loss by {damage:+.4f} ± {damage_ci95:.4f} nats per token (paired), which "
            "is within three standard errors of nothing: no share of a damage is given."
        )
    left, left_ci95 = paired_difference(original, repaired)
    return (
        f"Rewiring cost {damage:.4f} ± {damage_ci95:.4f} nats per token; distillation closed {100 * share:.0f} % of "
        f"it, {left:+.4f} ± {left_ci95:.4f} remain (differences to the original, paired by sequence)."
    )


def _damage_lines(measured: Sequence[Measured]) -> list[str]:
    tokens = measured[0].evaluation.num_tokens
    lines = [
        f"Held-out text, {tokens} predicted tokens, 95 % intervals over sequences.",
        "",
        "| model | cross entropy (nats/token) | perplexity | KL(original, model) (nats/token) |",
        "|---|--:|--:|--:|",
    ]
    for model in measured:
        result = model.evaluation
        kl = "-" if result.kl is None or result.kl_ci95 is None else f"{result.kl:.4f} ± {result.kl_ci95:.4f}"
        lines.append(
            f"| {model.name} | {result.cross_entropy:.4f} ± {result.cross_entropy_ci95:.4f} "
            f"| {math.exp(result.cross_entropy):.2f} | {kl} |"
        )
    return [*lines, "", damage_sentence(measured)]


def _choice_lines(runs: Mapping[str, Path]) -> list[str]:
    """Said where the repaired model was picked by the text that it is reported on."""
    evaluations = max(
        (sum("heldout_kl" in row for row in _read_metrics(run / METRICS_FILE)) for run in runs.values()), default=0
    )
    if evaluations < 2:
        return []
    return [
        f"The repaired model is the best of {evaluations} evaluations on this held-out text, so its row is a little "
        "better than it would be on other text."
    ]


def speed_sentence(serial: Overlap, overlapped: Overlap) -> str:
    """How much faster the overlapped step is, or why that is not said. Steps are compared pairwise, as they ran."""
    ratios = sorted(s / o for s, o in zip(serial.step_ms, overlapped.step_ms, strict=True))
    spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f} in {len(ratios)} pairs of steps"
    if ratios[0] <= 1.0 <= ratios[-1]:
        return f"Serial over overlapped step time is {spread}: no difference in speed is claimed."
    return f"Overlapped is {_median(ratios):.2f} times as fast as serial ({spread})."


def _overlap_lines(overlaps: Sequence[Overlap], link: str, same_bits: bool) -> list[str]:
    lines = [
        "## What was hidden",
        "",
        f"One training step (forward and backward, teacher left out) over {link}. Step times are medians over "
        f"{len(overlaps[0].step_ms)} steps of each, on the slowest rank; communication, hidden and exposed are the "
        "trace inspector's figures of one further step, mean over ranks.",
        "",
        "| schedule | step (ms), min - max | communication (ms) | hidden (ms) | exposed (ms) | hidden (%) |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for overlap in overlaps:
        steps = sorted(overlap.step_ms)
        share = f"{100 * overlap.hidden_ms / overlap.communication_ms:.0f}" if overlap.communication_ms else "-"
        lines.append(
            f"| {overlap.schedule} | {_median(steps):.0f}, {steps[0]:.0f} - {steps[-1]:.0f} "
            f"| {overlap.communication_ms:.0f} | {overlap.hidden_ms:.0f} | {overlap.exposed_ms:.0f} | {share} |"
        )
    compared = (
        "Loss and gradients of the two were compared: equal, bit for bit."
        if same_bits
        else "Loss and gradients of the two differ, which they must not."
    )
    return [*lines, "", f"{speed_sentence(*overlaps)} {compared}"]


def _median(values: Sequence[float]) -> float:
    middle = len(values) // 2
    return values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) / 2


def _fence(text: str) -> str:
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _figure(width: float, height: float) -> "tuple[Figure, Axes]":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: "Figure", path: Path) -> Path:
    part = path.with_name(f".{path.name}.part")
    figure.savefig(part, dpi=130, format="png")
    part.rename(path)
    return path


def _draw_damage(folder: Path, measured: Sequence[Measured]) -> Path:
    figure, axes = _figure(5.2, 2.0)
    original, *others = measured
    differences = [paired_difference(original.evaluation, model.evaluation) for model in others]
    bars = axes.barh(
        [model.name for model in others],
        [difference for difference, _ in differences],
        xerr=[ci95 for _, ci95 in differences],
        color=[_EXPOSED, _COMMUNICATION],
        height=0.55,
        capsize=4,
    )
    axes.bar_label(bars, fmt="%+.3f", padding=6)
    axes.margins(x=0.15)
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("held-out loss above the original's (nats/token)")
    return _save(figure, folder / "damage.png")


def _draw_losses(folder: Path, runs: Mapping[str, Path]) -> Path:
    """One panel per run: loss of every logged step, and the held-out cross entropy (or KL) between them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(runs) + 0.4, 3.0), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(runs), squeeze=False)[0]
    for axes, (name, run) in zip(panels, runs.items(), strict=True):
        rows = _read_metrics(run / METRICS_FILE)
        is_distillation = any("kl" in row for row in rows)
        what = "KL to the original" if is_distillation else "cross entropy"
        heldout_key = "heldout_kl" if is_distillation else "heldout_cross_entropy"
        heldout = [row for row in rows if heldout_key in row]
        axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], color=_COMPUTE, label="training")
        axes.errorbar(
            [row["step"] for row in heldout],
            [row[heldout_key] for row in heldout],
            yerr=[row[f"{heldout_key}_ci95"] for row in heldout],
            fmt="o",
            markersize=4,
            capsize=3,
            color=_EXPOSED,
            label="held out",
        )
        axes.set_ylim(bottom=0.0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(f"{name}: {what}", fontsize=10)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("nats/token")
        axes.legend(frameon=False, fontsize=8)
    return _save(figure, folder / "loss.png")


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _draw_overlap(folder: Path, overlaps: Sequence[Overlap], link: str) -> Path:
    figure, axes = _figure(6.4, 2.2)
    names = [overlap.schedule for overlap in overlaps]
    hidden = [overlap.hidden_ms for overlap in overlaps]
    axes.barh(names, hidden, color=_COMMUNICATION, label="hidden under compute")
    axes.barh(names, [overlap.exposed_ms for overlap in overlaps], left=hidden, color=_EXPOSED, label="exposed")
    axes.invert_yaxis()
    axes.set_xlabel(f"ms of communication in one step over\n{link}")
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.3), ncols=2)
    return _save(figure, folder / "overlap.png")
