"""What is asked of `farskip simulate`, checked: options -> `Question`, and the stage times that it implies."""

import argparse
import math
from dataclasses import dataclass, replace
from typing import Any

from farskip.launch.simulate_inputs import (
    bandwidth_of,
    given_time,
    link_rate,
    merged,
    read_times,
    shape_of,
)
from farskip.parallel.degrees import check_degrees, check_experts
from farskip.simulator import StageTimes
from farskip.stage_costs import EP, TP, Cost, Layout, LinkRate, ModelShape, Rates, stage_costs, times_of
from farskip.stage_graph import COLLECTIVES
from farskip.what_if import DIRECTIONS, Comparison, Setting, compare, needed_stages
from farskip.wiring import DENSE


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What is asked, checked.

    Attributes:
        name: of the model.
        shape: of the model.
        layout: who has what.
        rates: of machine and links.
        setting: model and ranks for the simulator.
        wirings: to be compared.
        given: times by hand.
        measured: times of a file.
        contention: see `Timeline.contended`.
    """

    name: str
    shape: ModelShape
    layout: Layout
    rates: Rates
    setting: Setting
    wirings: tuple[str, ...]
    given: StageTimes
    measured: StageTimes
    contention: float

    def costs(self, layout: Layout | None = None) -> dict[str, Cost]:
        """Of all stages whose sizes are known."""
        return stage_costs(self.shape, layout or self.layout)

    def times(self, rates: Rates | None = None, layout: Layout | None = None) -> StageTimes:
        """Milliseconds of every stage, by the order of precedence that the command's help states."""
        derived = times_of(self.costs(layout), rates or self.rates)
        link = StageTimes(forward={name: ms for name, ms in derived.forward.items() if name in COLLECTIVES})
        return merged(merged(merged(derived, self.measured), link), self.given)

    def compare(self, rates: Rates | None = None, **options: Any) -> Comparison:
        """All wirings, at other rates if given."""
        times = self.times(rates)
        plain, plain_times, missing = self.plain(rates)
        if missing:
            plain, plain_times = self.setting, times
        return compare(
            self.setting, self.wirings, times, plain=(plain, plain_times), contention=self.contention, **options
        )

    def plain(self, rates: Rates | None = None) -> tuple[Setting, StageTimes, list[str]]:
        """The same without chunks and shares of tokens, its times, and which are missing there: times measured in
        shares say nothing of all-reduces. All is then compared with ordinary blocking in chunks and shares."""
        setting = replace(self.setting, chunks=1, sequence_parallel=False)
        times = self.times(rates, replace(self.layout, chunks=1, sequence_parallel=False))
        return setting, times, missing_times(setting, "ordinary", times)


def ask(options: argparse.Namespace) -> Question:
    """Checks the options.

    Raises:
        ValueError: what no run could be, or what is not understood.
    """
    name, shape = shape_of(options)
    for flag in ("ep", "tp", "chunks", "tokens", "number_bytes"):
        value = getattr(options, flag)
        if value < 1:
            raise ValueError(f"--{flag.replace('_', '-')} {value} is too small; use at least 1")
    if options.sequence_parallel and options.tp == 1:
        raise ValueError("--sequence-parallel has no ranks to share tokens among; add --tp 2 or more, or leave it out")
    is_moe = any(blocks != DENSE for blocks in shape.blocks)
    check_degrees(math.lcm(options.ep, options.tp), options.ep, options.tp)
    if options.ep > 1 and not is_moe:
        raise ValueError(f"--ep {options.ep}: the model has no experts to spread; leave it out")
    if is_moe:
        check_experts(shape.num_experts, options.ep, options.chunks)
    sequence = options.tokens if options.sequence is None else options.sequence
    if not 1 <= sequence <= options.tokens:
        raise ValueError(f"--sequence {sequence} is outside 1..{options.tokens}, the tokens of a step")
    if options.chunks > options.tokens:
        raise ValueError(f"--chunks {options.chunks} of --tokens {options.tokens} would have no token each")
    if options.chunks > 1 and options.ep < 2 and not options.sequence_parallel:
        raise ValueError(f"--chunks {options.chunks}: nothing travels in chunks without --ep or --sequence-parallel")
    if not 0 <= options.contention < math.inf:
        raise ValueError(f"--contention {options.contention} makes no sense; use 0 or more, 0.3 is a usual one")
    if options.variant is not None and options.times is None:
        raise ValueError(f"--variant {options.variant} goes with --times FILE")
    layout = Layout(
        tokens=options.tokens,
        sequence=sequence,
        ep=options.ep,
        tp=options.tp,
        sequence_parallel=options.sequence_parallel,
        chunks=options.chunks,
        number_bytes=options.number_bytes,
    )
    given: dict[str, dict[str, float]] = {direction: {} for direction in DIRECTIONS}
    for stage, direction, ms in (given_time(text) for text in options.time):
        given[direction][stage] = ms
    return Question(
        name=name,
        shape=shape,
        layout=layout,
        rates=_rates(options, shape, layout),
        setting=Setting(
            blocks=shape.blocks,
            layers=options.layers,
            expert_parallel=options.ep > 1,
            tensor_parallel=options.tp > 1,
            sequence_parallel=options.sequence_parallel,
            chunks=options.chunks,
        ),
        wirings=_wirings(options.wirings),
        given=StageTimes(**given),
        measured=StageTimes(forward={}) if options.times is None else read_times(options.times, options.variant),
        contention=options.contention,
    )


def _wirings(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not names:
        raise ValueError(f"--wirings {text!r} names none; use ordinary,farskip")
    return names


def _rates(options: argparse.Namespace, shape: ModelShape, layout: Layout) -> Rates:
    links: dict[str, LinkRate] = {}
    if options.link is not None:
        links = dict.fromkeys((EP, TP), link_rate(options.link))
    if options.tp_link is not None:
        links[TP] = link_rate(options.tp_link, "--tp-link")
    if links and not (shape.hidden and (shape.top_k or layout.ep == 1)):
        raise ValueError("--link needs the bytes of a collective: give --model, or --hidden and --top-k")
    if (options.tflops is None) != (options.membw is None):
        raise ValueError("--tflops and --membw go together: a stage takes as long as the slower of the two")
    if options.tflops is None:
        return Rates(links=links)
    if options.model is None:
        raise ValueError("--tflops and --membw need the sizes of a model; give --model, or --time and --times")
    if not 0 < options.tflops < math.inf:
        raise ValueError(f"--tflops {options.tflops} has to be above 0")
    return Rates(tflops=options.tflops, memory_gb_s=bandwidth_of(options.membw, "--membw"), links=links)


def missing_times(setting: Setting, wiring: str, times: StageTimes) -> list[str]:
    """Stages of a wiring that have no time, with the direction where it is backward alone."""
    needed = needed_stages(setting, wiring)
    missing = [stage for stage in needed["forward"] if stage not in times.forward]
    known = {*times.forward, *times.backward, *missing}
    return missing + [f"{stage}.backward" for stage in needed["backward"] if stage not in known]


def what_is_missing(missing: list[str], wiring: str, question: Question) -> str:
    """The error for stages without a time."""
    collectives = [stage for stage in missing if stage.partition(".")[0] in COLLECTIVES]
    advice = []
    if len(collectives) < len(missing):
        advice.append("--tflops and --membw" + ("" if question.shape.expert or question.shape.mlp else " with --model"))
    if collectives:
        advice.append("--link" + ("" if question.shape.hidden else " with --hidden and --top-k"))
    what = f"no time for {', '.join(missing)} of {wiring}"
    return f"{what}; give {' and '.join(advice)}, or a file of --times that has them, or --time {missing[0]}=1ms"
