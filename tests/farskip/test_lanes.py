"""Schedules with a side lane: nothing but the lane changes, and what goes behind what is what the graph needs."""

import itertools
import json
from collections.abc import Callable

import pytest

from farskip.lanes import SideStream
from farskip.schedule import Do, Instruction, Schedule, build_schedule, even_segments, mirror
from farskip.simulator import StageTimes, choose_schedule, explain, placements, simulate
from farskip.stage_graph import COMBINE, DISPATCH, MERGE, ROUTE, Key, StageGraph, build_stage_graph
from farskip.wiring import DENSE, MOE, MOE_SHARED, LayerWiring, Wiring

NAMES = ("ordinary", "farskip", "attn_only", "parallel", "ladder")
MIX = (DENSE, MOE_SHARED, MOE, MOE_SHARED)
SC_MOE = Wiring((LayerWiring(routed=("attention",)),) * 4)
WIRINGS = [Wiring.named(name, 4) for name in NAMES] + [Wiring.named("farskip", 4, [1, 3]), SC_MOE]
ASIDE = (SideStream.merge, SideStream.merge_and_route)
STAGES = ("attention_in", "attention_core", "mlp", ROUTE, "experts", MERGE, "shared", DISPATCH, COMBINE)


def graph_of(wiring: Wiring, mix: tuple[tuple[str, ...], ...] = MIX, chunks: int = 1, tp: bool = False) -> StageGraph:
    return build_stage_graph(wiring.resolve(mix), expert_parallel=True, chunks=chunks, tensor_parallel=tp)


def every_schedule(wiring: Wiring, side_stream: SideStream) -> "itertools.chain[tuple[StageGraph, Schedule]]":
    graphs = [graph_of(wiring), graph_of(wiring, chunks=2), graph_of(wiring, (MOE_SHARED, DENSE, MOE, DENSE))]
    return itertools.chain(
        (graph, build_schedule(graph, "overlapped", segments=cut, placement=each, side_stream=side_stream))
        for graph, cut, each in itertools.product(graphs, (None, even_segments(4, 2)), placements())
    )


@pytest.mark.parametrize("side_stream", ASIDE)
@pytest.mark.parametrize("wiring", WIRINGS, ids=str)
def test_a_side_lane_changes_no_order(wiring: Wiring, side_stream: SideStream) -> None:
    for (_, aside), (_, plain) in zip(
        every_schedule(wiring, side_stream), every_schedule(wiring, SideStream.none), strict=True
    ):
        assert [step.bare for step in aside.forward] == list(plain.forward)
        assert [step.bare for step in aside.backward] == list(plain.backward)
        assert mirror(aside.backward) == aside.forward, "backward has lost or doubled an edge between the lanes"
        lanes = {step.key.stage for step in aside.forward if step.do is Do.RUN and step.side}
        assert lanes == set(side_stream.stages)
        assert not any(step.side or step.behind for step in (*plain.forward, *plain.backward))


def unordered(steps: tuple[Instruction, ...], graph: StageGraph, *, backward: bool) -> list[str]:
    """Pairs of stages of which one needs the other, and of which nothing says that they come one after the other.

    Known: each lane is in order, a stage is behind what it names, a collective is behind what its lane had before its
    launch, and a wait behind the collective."""
    known: dict[bool, set[Key]] = {False: set(), True: set()}
    done: dict[Key, set[Key]] = {}
    launched: dict[Key, set[Key]] = {}
    needs = {stage.key: set(stage.after) for stage in graph.stages}
    if backward:
        needs = {key: {other for other in needs if key in needs[other]} for key in needs}
    missing = []
    for step in steps:
        own = known[step.side]
        if step.behind is not None:
            own |= done[step.behind]
        if step.do is Do.WAIT:
            own |= launched[step.key] | {step.key}
            continue
        missing += [f"{step} before {key}" for key in needs[step.key] - own]
        if step.do is Do.LAUNCH:
            launched[step.key] = set(own)
        else:
            own.add(step.key)
            done[step.key] = set(own)
    return missing


@pytest.mark.parametrize("side_stream", ASIDE)
@pytest.mark.parametrize("wiring", WIRINGS, ids=str)
def test_what_needs_a_stage_of_the_other_lane_is_behind_it(wiring: Wiring, side_stream: SideStream) -> None:
    for graph, schedule in every_schedule(wiring, side_stream):
        assert not unordered(schedule.forward, graph, backward=False)
        assert not unordered(schedule.backward, graph, backward=True)


def test_that_check_sees_a_stage_that_goes_behind_nothing() -> None:
    graph = graph_of(Wiring.named("farskip", 4))
    steps = build_schedule(graph, "overlapped", side_stream=SideStream.merge_and_route).forward
    behind = [step for step in steps if step.behind is not None]
    assert behind
    for removed in behind:
        broken = tuple(Instruction(step.do, step.key, step.side) if step == removed else step for step in steps)
        if removed.key.stage in (ROUTE, "shared"):
            assert unordered(broken, graph, backward=False), removed


def second_segment(name: str, side_stream: SideStream) -> list[str]:
    """Its stages, of four layers."""
    graph = graph_of(Wiring.named(name, 4), (MOE_SHARED,) * 4)
    schedule = build_schedule(graph, "overlapped", segments=even_segments(4, 2), side_stream=side_stream)
    return [str(step) for step in schedule.of_segment(schedule.segments[1]) if step.do is Do.RUN]


@pytest.mark.parametrize("side_stream", ASIDE)
def test_a_segment_begins_behind_both_lanes_of_the_one_before_it(side_stream: SideStream) -> None:
    """Also where its first stage could do without: leaving a segment forms the whole stream."""
    assert second_segment("attn_only", side_stream)[0] == "run(attention_in.2) behind merge.1"


def test_compute_that_reads_the_stream_goes_behind_the_router_before_it() -> None:
    assert second_segment("farskip", SideStream.merge)[:2] == ["run(route.2) behind merge.1", "run(attention_in.2)"]
    assert second_segment("farskip", SideStream.merge_and_route)[:2] == [
        "run(route.2) aside behind shared.1",
        "run(attention_in.2) behind route.2",
    ]


@pytest.mark.parametrize("side_stream", ASIDE)
def test_snapshot(side_stream: SideStream, check_snapshot: Callable[[str, str], None]) -> None:
    schedule = choose_schedule(graph_of(Wiring.named("farskip", 4)), "overlapped", side_stream=side_stream)
    text = f"farskip, side_stream={side_stream}: dense, shared + routed, routed, shared + routed\n"
    text += f"\nforward\n{schedule.timeline()}\n\nbackward\n{schedule.timeline('backward')}\n"
    text += "\nforward, as a list\n" + "\n".join(map(str, schedule.forward)) + "\n"
    lines = "\n".join(line.rstrip() for line in text.splitlines()) + "\n"
    check_snapshot(lines, f"schedules/farskip_side_{side_stream}.txt")


@pytest.mark.parametrize("side_stream", ASIDE)
def test_a_schedule_survives_a_dict_and_json(side_stream: SideStream) -> None:
    graph = graph_of(Wiring.named("farskip", 4), chunks=2)
    schedule = choose_schedule(graph, "overlapped", segments=even_segments(4, 2), side_stream=side_stream)
    assert Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule


def test_without_a_side_lane_a_dict_has_no_word_of_it() -> None:
    data = build_schedule(graph_of(Wiring.named("farskip", 4)), "overlapped").to_dict()
    assert {key for row in (*data["forward"], *data["backward"]) for key in row} == {"do", "layer", "stage"}


def test_serial_has_no_side_lane() -> None:
    graph = graph_of(Wiring.named("farskip", 4))
    assert build_schedule(graph, "serial", side_stream=SideStream.merge) == build_schedule(graph, "serial")


def test_what_cannot_be_put_aside_is_refused() -> None:
    farskip = Wiring.named("farskip", 4)
    with pytest.raises(ValueError, match="side_stream 'merges' is unknown; use merge"):
        SideStream.named("merges")
    with pytest.raises(ValueError, match=r"side_stream='merge' with tensor parallelism: .* use side_stream='none'"):
        build_schedule(graph_of(farskip, tp=True), "overlapped", side_stream=SideStream.merge)
    local = build_stage_graph(farskip.resolve(MIX), expert_parallel=False)
    for mode in ("serial", "overlapped"):
        with pytest.raises(ValueError, match="side_stream='merge' has nothing to put aside: no rows travel"):
            choose_schedule(local, mode, side_stream=SideStream.merge)


# -- the clock

ONE_EACH = dict.fromkeys(STAGES, 1.0)


def total(schedule: Schedule, times: StageTimes) -> float:
    return simulate(schedule.forward, times).total + simulate(schedule.backward, times, "backward").total


@pytest.mark.parametrize("side_stream", ASIDE)
@pytest.mark.parametrize("wiring", WIRINGS, ids=str)
def test_three_lanes_do_one_thing_at_a_time_and_account_for_all_time(wiring: Wiring, side_stream: SideStream) -> None:
    times = StageTimes(forward=ONE_EACH | {COMBINE: 2.5, DISPATCH: 0.75, MERGE: 0.5})
    for _, schedule in every_schedule(wiring, side_stream):
        for direction in ("forward", "backward"):
            timeline = simulate(getattr(schedule, direction), times, direction)
            for lane in (timeline.compute, timeline.communication, timeline.side):
                for span, following in itertools.pairwise(lane):
                    assert following.start >= span.stop - 1e-9
            stood_still = sum(timeline.held.values()) + timeline.exposed_total
            worked = sum(span.stop - span.start for span in timeline.compute)
            assert timeline.compute[-1].stop == pytest.approx(worked + stood_still)
            assert timeline.total == max(span.stop for span in (*timeline.compute, *timeline.side))


def test_compute_does_not_wait_for_a_late_combine_until_it_needs_it() -> None:
    """Combine 2.5, under shared 1, attention 2 and merge 0.5, if that is aside: the router starts no later for it."""
    graph = graph_of(Wiring.named("farskip", 4), (MOE_SHARED,) * 4)
    times = StageTimes(forward=ONE_EACH | {COMBINE: 2.5, MERGE: 0.5})
    whole_attention = next(each for each in placements() if each.attention_core.collective == COMBINE)
    timelines = {
        each: simulate(build_schedule(graph, "overlapped", placement=whole_attention, side_stream=each).forward, times)
        for each in SideStream
    }
    spans = {
        each: {span.key: span for lane in (found.compute, found.side) for span in lane}
        for each, found in timelines.items()
    }
    core, merge, route = Key(2, "attention_core"), Key(1, MERGE), Key(2, ROUTE)
    assert spans[SideStream.none][merge].start == spans[SideStream.none][core].stop
    for each in ASIDE:
        assert spans[each][merge].start < spans[each][core].stop
        assert not timelines[each].held.get(route)
    assert spans[SideStream.merge][route].start == spans[SideStream.merge][core].stop
    assert spans[SideStream.merge_and_route][route].start == spans[SideStream.merge_and_route][merge].stop


@pytest.mark.parametrize("side_stream", ASIDE)
def test_by_the_clock_a_side_lane_never_costs_and_helps_a_late_combine(side_stream: SideStream) -> None:
    for wiring in WIRINGS:
        graph = graph_of(wiring)
        for combine in (0.0, 1.0, 2.0, 4.0, 8.0):
            times = StageTimes(forward=ONE_EACH | {COMBINE: combine, MERGE: 0.5})
            plain = total(choose_schedule(graph, "overlapped", times=times), times)
            aside = total(choose_schedule(graph, "overlapped", times=times, side_stream=side_stream), times)
            assert aside <= plain + 1e-9, (str(wiring), combine)
    times = StageTimes(forward=ONE_EACH | {COMBINE: 4.0})
    graph = graph_of(Wiring.named("farskip", 4), (MOE_SHARED,) * 4)
    plain = total(choose_schedule(graph, "overlapped", times=times), times)
    assert total(choose_schedule(graph, "overlapped", times=times, side_stream=side_stream), times) < plain - 1


def test_a_router_aside_holds_the_host() -> None:
    """So compute that was issued before it goes on, and what is issued after it starts when it is done."""
    graph = graph_of(Wiring.named("farskip", 4), (MOE_SHARED,) * 4)
    times = StageTimes(forward=ONE_EACH | {COMBINE: 6.0, DISPATCH: 0.0})
    early, late = (
        build_schedule(graph, "overlapped", placement=each, side_stream=SideStream.merge_and_route)
        for each in (
            next(each for each in placements() if each.attention_core.collective == COMBINE),
            next(placements()),
        )
    )
    for schedule, waits in ((late, True), (early, False)):
        timeline = simulate(schedule.forward, times)
        (core,) = (span for span in timeline.compute if span.key == Key(2, "attention_core"))
        (route,) = (span for span in timeline.side if span.key == Key(2, ROUTE))
        assert (core.start >= route.stop) is waits
    assert total(early, times) < total(late, times)
    chosen = choose_schedule(graph, "overlapped", times=times, side_stream=SideStream.merge_and_route)
    assert total(chosen, times) <= total(early, times)


def test_the_arithmetic_is_explained() -> None:
    graph = graph_of(Wiring.named("farskip", 3), (MOE_SHARED,) * 3)
    times = StageTimes(forward=ONE_EACH | {COMBINE: 4.0})
    schedule = choose_schedule(graph, "overlapped", times=times, side_stream=SideStream.merge)
    lines = explain(schedule.forward, times).splitlines()
    row = next(line.split(maxsplit=4) for line in lines if line.startswith("combine.0"))
    assert row[1:4] == ["4.00", "3.00", "0.00"] and row[4] == "shared.0, attention_in.1, attention_core.1"
    assert any(line.startswith("side lane") for line in lines)
    for direction in ("forward", "backward"):
        steps = getattr(schedule, direction)
        named = [line.split()[0] for line in explain(steps, times, direction).splitlines()]
        assert sorted(named[1:-2]) == sorted(str(step.key) for step in steps if step.do is Do.LAUNCH)
