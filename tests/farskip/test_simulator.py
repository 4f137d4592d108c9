"""The simulator: closed forms, and what no schedule can break."""

import itertools
import random

import pytest

from farskip.schedule import Do, Instruction, Schedule, build_schedule, even_segments
from farskip.simulator import StageTimes, choose_schedule, placements, simulate
from farskip.stage_graph import COMBINE, DISPATCH, Key, StageGraph, build_stage_graph
from farskip.wiring import DENSE, MOE, MOE_SHARED, Wiring

NAMES = ("ordinary", "farskip", "attn_only", "parallel", "ladder")
STAGES = ("attention_in", "attention_core", "mlp", "route", "experts", "merge", "shared", DISPATCH, COMBINE)
MIX = (DENSE, MOE_SHARED, MOE, MOE_SHARED)


def random_times(seed: int) -> StageTimes:
    draw = random.Random(seed)
    return StageTimes(
        forward={stage: draw.choice([0.0, 1.0, draw.uniform(0, 5)]) for stage in STAGES},
        backward={stage: draw.uniform(0, 5) for stage in draw.sample(STAGES, 5)},
    )


def graph(name: str, mix: tuple[tuple[str, ...], ...] = MIX, chunks: int = 1) -> StageGraph:
    return build_stage_graph(Wiring.named(name, len(mix)).resolve(mix), expert_parallel=True, chunks=chunks)


def windows(steps: tuple[Instruction, ...], times: StageTimes, direction: str) -> dict[Key, float]:
    """Compute between launch and wait of each collective, added up by hand."""
    return {
        step.key: sum(
            times.of(between.key.stage, direction)
            for between in steps[position : steps.index(Instruction(Do.WAIT, step.key))]
            if between.do is Do.RUN
        )
        for position, step in enumerate(steps)
        if step.do is Do.LAUNCH
    }


def most_in_flight(steps: tuple[Instruction, ...]) -> int:
    count = highest = 0
    for step in steps:
        count += {Do.LAUNCH: 1, Do.WAIT: -1, Do.RUN: 0}[step.do]
        highest = max(highest, count)
    return highest


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", NAMES)
def test_exposed_is_what_the_windows_leave_over(name: str, direction: str) -> None:
    tried = 0
    for seed, placement in itertools.product(range(10), placements()):
        times = random_times(seed)
        schedule = build_schedule(graph(name), "overlapped", placement=placement)
        steps = getattr(schedule, direction)
        if most_in_flight(steps) > 1:
            continue
        tried += 1
        expected = {
            key: max(0.0, times.of(key.stage, direction) - window)
            for key, window in windows(steps, times, direction).items()
        }
        assert simulate(steps, times, direction).exposed == pytest.approx(expected, abs=1e-9)
    assert tried, "no schedule with one collective in flight"


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", NAMES)
def test_serial_takes_the_sum_of_everything(name: str, direction: str) -> None:
    for seed in range(10):
        times = random_times(seed)
        stages = [stage.key.stage for stage in graph(name).stages]
        steps = getattr(build_schedule(graph(name), "serial"), direction)
        timeline = simulate(steps, times, direction)
        assert timeline.total == pytest.approx(sum(times.of(stage, direction) for stage in stages))
        assert timeline.exposed_total == pytest.approx(timeline.communication_total)


@pytest.mark.parametrize("name", NAMES)
def test_no_placement_is_slower_than_serial(name: str) -> None:
    for seed in range(10):
        times = random_times(seed)
        serial = simulate(build_schedule(graph(name), "serial").forward, times).total
        for placement in placements():
            steps = build_schedule(graph(name), "overlapped", placement=placement).forward
            assert simulate(steps, times).total <= serial + 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_the_chosen_schedule_is_the_best_of_all(name: str) -> None:
    for seed in range(5):
        times = random_times(seed)

        def total(schedule: Schedule, times: StageTimes = times) -> float:
            return simulate(schedule.forward, times).total + simulate(schedule.backward, times, "backward").total

        best = min(total(build_schedule(graph(name), "overlapped", placement=each)) for each in placements())
        assert total(choose_schedule(graph(name), "overlapped", times=times)) == pytest.approx(best)


@pytest.mark.parametrize("name", NAMES)
def test_slower_parts_never_make_a_list_faster(name: str) -> None:
    steps = choose_schedule(graph(name), "overlapped").forward
    for seed, stage in itertools.product(range(5), STAGES):
        times = random_times(seed)
        slower = StageTimes(forward={**times.forward, stage: times.forward[stage] + 1.0})
        assert simulate(steps, slower).total >= simulate(steps, times).total - 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_lanes_do_one_thing_at_a_time(name: str) -> None:
    for seed, chunks in itertools.product(range(5), (1, 2)):
        timeline = simulate(choose_schedule(graph(name, chunks=chunks), "overlapped").forward, random_times(seed))
        for lane in (timeline.compute, timeline.communication):
            for span, following in itertools.pairwise(lane):
                assert following.start >= span.stop - 1e-9
        assert timeline.total == pytest.approx(
            sum(span.stop - span.start for span in timeline.compute) + timeline.exposed_total
        )


def test_free_communication_is_never_exposed() -> None:
    times = StageTimes(forward={**dict.fromkeys(STAGES, 1.0), DISPATCH: 0.0, COMBINE: 0.0})
    for name in NAMES:
        assert simulate(choose_schedule(graph(name), "overlapped").forward, times).exposed_total == 0.0


def test_farskip_exposes_only_the_last_combine_when_its_windows_are_wide_enough() -> None:
    times = StageTimes(forward={**dict.fromkeys(STAGES, 1.0), COMBINE: 2.0})
    mix = (MOE_SHARED,) * 4
    timeline = simulate(choose_schedule(graph("farskip", mix), "overlapped", times=times).forward, times)
    assert {key: seconds for key, seconds in timeline.exposed.items() if seconds} == {Key(3, COMBINE): 1.0}


def test_farskip_closed_form_of_equal_layers() -> None:
    """L layers, dispatch d under core c, combine m under shared s and the next projections p:
    total = L * (p + c + s + fixed) + (L - 1) * (max(0, d - c) + max(0, m - s - p)) + max(0, d - p - c) + max(0, m - s).
    The first dispatch has all of attention as cover, the last combine only the shared expert."""
    mix = (MOE_SHARED,) * 5
    steps = build_schedule(graph("farskip", mix), "overlapped").forward
    for seed in range(20):
        t = random_times(seed).forward
        work = sum(t[stage] for stage in ("attention_in", "attention_core", "route", "experts", "merge", "shared"))
        exposed = max(0, t[DISPATCH] - t["attention_in"] - t["attention_core"]) + max(0, t[COMBINE] - t["shared"])
        exposed += 4 * max(0, t[DISPATCH] - t["attention_core"])
        exposed += 4 * max(0, t[COMBINE] - t["shared"] - t["attention_in"])
        assert simulate(steps, StageTimes(forward=t)).total == pytest.approx(5 * work + exposed)


def test_more_segments_never_help() -> None:
    for name, seed in itertools.product(NAMES, range(5)):
        times = random_times(seed)
        totals = [
            sum(
                simulate(getattr(schedule, way), times, way).total
                for schedule in [choose_schedule(graph(name), "overlapped", segments=segments, times=times)]
                for way in ("forward", "backward")
            )
            for segments in (even_segments(4, 4), even_segments(4, 1))
        ]
        assert totals[0] <= totals[1] + 1e-6


def test_backward_times_are_derived_or_given() -> None:
    times = StageTimes(forward={"experts": 3.0, DISPATCH: 2.0, "shared": 1.0}, backward={"shared": 5.0})
    assert [times.of(stage, "backward") for stage in ("experts", DISPATCH, "shared")] == [6.0, 2.0, 5.0]


def test_an_unknown_stage_has_no_time() -> None:
    with pytest.raises(ValueError, match="no time for 'experts'; give one for each of"):
        StageTimes(forward={"route": 1.0}).of("experts", "forward")
