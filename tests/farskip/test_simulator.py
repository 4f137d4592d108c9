"""The simulator: closed forms, and what no schedule can break."""

import itertools
import random

import pytest

from farskip.schedule import Do, Instruction, Schedule, build_schedule, even_segments
from farskip.simulator import StageTimes, choose_schedule, explain, placements, simulate
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


def fluid(steps: tuple[Instruction, ...], times: StageTimes, direction: str, contention: float) -> float:
    """The definition of contention, played out: two lanes, each at rate 1 / (1 + F) while both are busy."""
    now, queue = 0.0, list[list]()  # of the link: key and work left

    def advance(work: float, until: Key | None) -> None:
        """Do `work` of compute, or with none wait until a collective is done."""
        nonlocal now
        while work > 0 or any(key == until for key, _ in queue):
            part = min(left for left in (work or float("inf"), queue[0][1] if queue else float("inf")))
            now += part * (1 + contention if work and queue else 1)
            work -= part if work else 0
            if queue:
                queue[0][1] -= part
                if queue[0][1] <= 0:
                    queue.pop(0)

    for step in steps:
        duration = times.of(step.key.stage, direction)
        if step.do is Do.LAUNCH:
            queue.append([step.key, duration])
        else:
            advance(duration if step.do is Do.RUN else 0, None if step.do is Do.RUN else step.key)
    return now


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", NAMES)
def test_contention_is_what_two_lanes_at_a_lower_rate_take(name: str, direction: str) -> None:
    tried = 0
    for seed, contention in itertools.product(range(6), (0.0, 0.3, 1.0)):
        draw = random.Random(seed)
        times = StageTimes(forward={stage: float(draw.randint(1, 9)) for stage in STAGES})
        steps = getattr(choose_schedule(graph(name), "overlapped", times=times), direction)
        timeline = simulate(steps, times, direction)
        tried += timeline.hidden_total > 0
        assert timeline.contended(contention) == pytest.approx(fluid(steps, times, direction, contention))
        if contention == 0.0:
            assert timeline.contended(contention) == timeline.total
    assert tried or name == "ordinary"


def test_contention_takes_its_share_of_what_overlap_gains() -> None:
    """Overlapped gains 1 - F of what it gains without contention, and serial schedules do not feel it."""
    times = random_times(3)
    serial = simulate(build_schedule(graph("farskip"), "serial").forward, times)
    timeline = simulate(build_schedule(graph("farskip"), "overlapped").forward, times)
    assert serial.contended(0.3) == serial.total
    gain = serial.total - timeline.total
    assert gain > 0
    assert serial.total - timeline.contended(0.3) == pytest.approx(0.7 * gain)
    assert timeline.contended(1.0) == pytest.approx(serial.total)


def dense_total(name: str, num_layers: int, attention: float, mlp: float, links: tuple[float, float]) -> float:
    """Forward time of a dense model under tensor parallelism."""
    times = StageTimes(
        forward={
            "attention_in": attention / 2,
            "attention_core": attention / 2,
            "mlp": mlp,
            "reduce_attention": links[0],
            "reduce_mlp": links[1],
        }
    )
    inputs = Wiring.named(name, num_layers).resolve((DENSE,) * num_layers)
    stages = build_stage_graph(inputs, expert_parallel=False, tensor_parallel=True)
    return simulate(choose_schedule(stages, "overlapped", times=times).forward, times).total


@pytest.mark.parametrize(("compute", "link"), [(1.0, 2.0), (2.0, 1.0), (3.0, 3.0), (5.0, 0.0)])
def test_closed_forms_of_equal_sub_blocks_under_tensor_parallelism(compute: float, link: float) -> None:
    """2L sub-blocks of compute c, each with an all-reduce m (arXiv 2501.06589): standard 2L(c + m), ladder
    2L max(c, m) + min(c, m), parallel L(2c + m)."""
    layers = 5
    totals = {n: dense_total(n, layers, compute, compute, (link, link)) for n in ("ordinary", "ladder", "parallel")}
    assert totals == {
        "ordinary": 2 * layers * (compute + link),
        "ladder": 2 * layers * max(compute, link) + min(compute, link),
        "parallel": layers * (2 * compute + link),
    }


def test_ladders_period_of_unequal_sub_blocks() -> None:
    draw = random.Random(0)
    for _ in range(10):
        a, m, link_a, link_m = (float(draw.randint(1, 9)) for _ in range(4))
        longer, shorter = (dense_total("ladder", layers, a, m, (link_a, link_m)) for layers in (16, 8))
        assert (longer - shorter) / 8 == max(a + link_a, m + link_m, a + m, link_a + link_m)


def test_parallel_beats_ladder_over_slow_links() -> None:
    """It has half the all-reduces. By the closed forms, L(2c + m) < 2Lm + c from m = (2 - 1/L) c on."""
    for link, beats in ((1.0, False), (1.8, False), (1.9, True), (5.0, True)):
        parallel, ladder = (dense_total(name, 8, 1.0, 1.0, (link, link)) for name in ("parallel", "ladder"))
        assert (parallel < ladder) is beats


def test_explain_shows_only_the_layers_asked_for() -> None:
    steps, times = build_schedule(graph("farskip"), "overlapped").forward, StageTimes()
    whole, part = explain(steps, times).splitlines(), explain(steps, times, layers=range(2, 3)).splitlines()
    assert [line.split()[0] for line in part] == ["collective", "dispatch.2", "combine.2", "sum"]
    assert part[-1].split() == whole[-1].split()
