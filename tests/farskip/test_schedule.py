"""Schedules: snapshots, happens-before under every placement, the mirror, drained segments."""

import itertools
import json
from collections.abc import Callable

import pytest

from farskip.recorder import check_order
from farskip.schedule import (
    Do,
    Instruction,
    Placement,
    Schedule,
    Segment,
    build_schedule,
    even_segments,
    mirror,
)
from farskip.simulator import choose_schedule, placements
from farskip.stage_graph import (
    ATTENTION_CORE,
    ATTENTION_IN,
    COMBINE,
    DISPATCH,
    ROUTE,
    Key,
    StageGraph,
    build_stage_graph,
)
from farskip.wiring import DENSE, MOE, MOE_SHARED, SHARED, LayerBlocks, LayerWiring, Wiring

NAMES = ("ordinary", "farskip", "attn_only", "parallel", "ladder")
SNAPSHOT_MIX = (DENSE, MOE_SHARED, MOE, MOE_SHARED)
MIXES = [(DENSE,) * 3, (MOE,) * 3, (MOE_SHARED,) * 3, (DENSE, MOE_SHARED, MOE), (MOE_SHARED, DENSE, MOE_SHARED)]
SC_MOE = Wiring((LayerWiring(routed=("attention",)),) * 3)
EVERYTHING_PARTIAL = Wiring(
    (
        LayerWiring(
            attention=("previous.routed",),
            mlp=("previous.routed", "attention"),
            shared=("previous.routed", "attention"),
            routed=("previous.routed", "attention"),
        ),
    )
    * 3
)
WIRINGS = [Wiring.named(name, 3) for name in NAMES] + [Wiring.named("farskip", 3, [1]), SC_MOE, EVERYTHING_PARTIAL]


def graph_of(
    wiring: Wiring, mix: tuple[LayerBlocks, ...], *, expert_parallel: bool = True, chunks: int = 1
) -> StageGraph:
    return build_stage_graph(wiring.resolve(mix), expert_parallel=expert_parallel, chunks=chunks)


def cuts(num_layers: int) -> list[tuple[Segment, ...]]:
    """Every way to cut the layers into segments."""
    found = []
    for inner in itertools.chain.from_iterable(
        itertools.combinations(range(1, num_layers), k) for k in range(num_layers)
    ):
        edges = [0, *inner, num_layers]
        found.append(tuple(Segment(*pair) for pair in itertools.pairwise(edges)))
    return found


def in_flight_at_ends(steps: tuple[Instruction, ...], layers_of_segments: list[range]) -> list[set[Key]]:
    """What is still in flight when a list has done the last instruction of each segment."""
    flying: set[Key] = set()
    found = []
    for position, step in enumerate(steps):
        if step.do is Do.LAUNCH:
            flying.add(step.key)
        elif step.do is Do.WAIT:
            flying.remove(step.key)
        following = steps[position + 1] if position + 1 < len(steps) else None
        here = next(layers for layers in layers_of_segments if step.key.layer in layers)
        if following is None or following.key.layer not in here:
            found.append(set(flying))
    return found


@pytest.mark.parametrize("mode", ["serial", "overlapped", "chunked"])
@pytest.mark.parametrize("name", NAMES)
def test_snapshot(name: str, mode: str, check_snapshot: Callable[[str, str], None]) -> None:
    graph = graph_of(Wiring.named(name, 4), SNAPSHOT_MIX, chunks=2 if mode == "chunked" else 1)
    schedule = choose_schedule(graph, "overlapped" if mode == "chunked" else mode)
    text = f"{name}, {mode}: dense, shared + routed, routed, shared + routed\n"
    text += f"\nforward\n{schedule.timeline()}\n\nbackward\n{schedule.timeline('backward')}\n"
    check_snapshot("\n".join(line.rstrip() for line in text.splitlines()) + "\n", f"schedules/{name}_{mode}.txt")


@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: "-".join(str(len(blocks)) + blocks[-1] for blocks in mix))
@pytest.mark.parametrize("wiring", WIRINGS, ids=str)
def test_nothing_runs_before_what_it_needs(wiring: Wiring, mix: tuple[LayerBlocks, ...]) -> None:
    for chunks in (0, 1, 2, 3):
        graph = graph_of(wiring, mix, expert_parallel=bool(chunks), chunks=chunks)
        for segments in cuts(3):
            check_order(build_schedule(graph, "serial", segments=segments).forward, graph)
            for placement in placements():
                schedule = build_schedule(graph, "overlapped", segments=segments, placement=placement)
                check_order(schedule.forward, graph)


@pytest.mark.parametrize("wiring", WIRINGS, ids=str)
def test_the_graph_needs_what_the_wiring_reads(wiring: Wiring) -> None:
    """A stage needs the output of a sub-block exactly if its input holds that output."""
    mix = (MOE_SHARED,) * 3
    inputs = wiring.resolve(mix)
    after = {stage.key: set(stage.after) for stage in graph_of(wiring, mix).stages}
    previous = {"attention": ATTENTION_CORE, "shared": SHARED, "routed": "merge"}
    for layer in (1, 2):
        for stage, block in ((ATTENTION_IN, "attention"), (ROUTE, "routed"), (SHARED, "shared")):
            left_out = inputs[layer].left_out if inputs[layer].source(block) == "n" else ()
            needed = {Key(layer - 1, previous[output]) for output in previous if output not in left_out}
            if stage != ATTENTION_IN and inputs[layer].source(block) == "y":
                needed.add(Key(layer, ATTENTION_CORE))
            recent = {key for key in after[Key(layer, stage)] if key.layer >= layer - 1}
            assert recent - {Key(layer - 1, ATTENTION_CORE)} == needed - {Key(layer - 1, ATTENTION_CORE)}


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("mode", ["serial", "overlapped"])
@pytest.mark.parametrize("wiring", WIRINGS, ids=str)
def test_backward_is_the_mirror(wiring: Wiring, mode: str, chunks: int) -> None:
    schedule = choose_schedule(graph_of(wiring, (MOE_SHARED,) * 3, chunks=chunks), mode)
    assert mirror(schedule.backward) == schedule.forward
    exchanged = {Do.RUN: Do.RUN, Do.LAUNCH: Do.WAIT, Do.WAIT: Do.LAUNCH}
    assert [(exchanged[step.do], step.key) for step in reversed(schedule.forward)] == [
        (step.do, step.key) for step in schedule.backward
    ]


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("wiring", WIRINGS, ids=str)
def test_segments_are_drained_in_both_directions(wiring: Wiring, chunks: int) -> None:
    graph = graph_of(wiring, (MOE_SHARED,) * 3, chunks=chunks)
    for segments in cuts(3):
        schedule = choose_schedule(graph, "overlapped", segments=segments)
        layers = [range(segment.start, segment.stop) for segment in segments]
        assert not any(in_flight_at_ends(schedule.forward, layers))
        assert not any(in_flight_at_ends(schedule.backward, layers))
        assert len(in_flight_at_ends(schedule.forward, layers)) == len(segments), "segments are interleaved"
        assert sum((schedule.of_segment(segment) for segment in segments), ()) == schedule.forward


@pytest.mark.parametrize("wiring", WIRINGS, ids=str)
def test_serial_waits_at_once_and_keeps_program_order(wiring: Wiring) -> None:
    graph = graph_of(wiring, (DENSE, MOE_SHARED, MOE))
    steps = build_schedule(graph, "serial").forward
    for step, following in itertools.pairwise(steps):
        if step.do is Do.LAUNCH:
            assert following == Instruction(Do.WAIT, step.key)
    assert [step.key for step in steps if step.do is not Do.WAIT] == [stage.key for stage in graph.stages]


@pytest.mark.parametrize("wiring", WIRINGS, ids=str)
def test_overlapped_does_what_serial_does_in_another_order(wiring: Wiring) -> None:
    graph = graph_of(wiring, (MOE_SHARED, MOE, MOE_SHARED), chunks=2)
    serial = build_schedule(graph, "serial")
    for placement in placements():
        assert sorted(map(str, build_schedule(graph, "overlapped", placement=placement).forward)) == sorted(
            map(str, serial.forward)
        )


def test_farskip_hides_each_collective_under_what_the_paper_says() -> None:
    """Dispatch under the core of attention; combine under the shared expert and the next projections."""
    steps = build_schedule(graph_of(Wiring.named("farskip", 3), (MOE_SHARED,) * 3), "overlapped").forward
    for layer in range(3):
        for collective, cover in (
            # Layer 0 has n = x: its router waits for nothing, so that all of attention is cover.
            (DISPATCH, ([] if layer else [Key(0, ATTENTION_IN)]) + [Key(layer, ATTENTION_CORE)]),
            (COMBINE, [Key(layer, SHARED)] + ([Key(layer + 1, ATTENTION_IN)] if layer < 2 else [])),
        ):
            key = Key(layer, collective)
            between = steps[steps.index(Instruction(Do.LAUNCH, key)) + 1 : steps.index(Instruction(Do.WAIT, key))]
            assert [step.key for step in between if step.do is Do.RUN] == cover


def test_without_expert_parallelism_nothing_is_launched() -> None:
    graph = graph_of(Wiring.named("farskip", 3), (MOE_SHARED,) * 3, expert_parallel=False)
    assert all(step.do is Do.RUN for step in choose_schedule(graph, "overlapped").forward)


@pytest.mark.parametrize("mode", ["serial", "overlapped"])
def test_a_schedule_survives_a_dict_and_json(mode: str) -> None:
    graph = graph_of(Wiring.named("farskip", 3), (MOE_SHARED,) * 3, chunks=2)
    schedule = choose_schedule(graph, mode, segments=even_segments(3, 2))
    assert Schedule.from_dict(schedule.to_dict()) == schedule
    assert Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule


def test_even_segments_end_with_a_shorter_one() -> None:
    assert even_segments(5, 2) == (Segment(0, 2), Segment(2, 4), Segment(4, 5))
    assert even_segments(2, 9) == (Segment(0, 2),)


def test_an_unknown_mode_gets_the_near_miss() -> None:
    with pytest.raises(ValueError, match="schedule 'overlaped' is unknown; use overlapped"):
        build_schedule(graph_of(SC_MOE, (MOE,) * 3), "overlaped")


@pytest.mark.parametrize("edges", [[(0, 2)], [(1, 3)], [(0, 1), (2, 3)], [(0, 2), (1, 3)], []])
def test_segments_with_a_hole_are_refused(edges: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="do not cover layers"):
        build_schedule(graph_of(SC_MOE, (MOE,) * 3), "serial", segments=[Segment(*pair) for pair in edges])


def broken(steps: tuple[Instruction, ...], change: str) -> list[Instruction]:
    first_wait = next(position for position, step in enumerate(steps) if step.do is Do.WAIT)
    first_launch = next(position for position, step in enumerate(steps) if step.do is Do.LAUNCH)
    changed = list(steps)
    if change == "no wait":
        del changed[first_wait]
    elif change == "no launch":
        del changed[first_launch]
    elif change == "late wait":
        changed.append(changed.pop(first_wait))
    else:
        changed.insert(0, changed.pop(first_launch))
    return changed


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("no wait", "is in flight"),
        ("no launch", "it was not launched"),
        ("late wait", "is in flight"),
        ("early launch", "is not done"),
    ],
)
def test_the_happens_before_check_can_fail(change: str, reason: str) -> None:
    graph = graph_of(Wiring.named("farskip", 3), (MOE_SHARED,) * 3)
    with pytest.raises(RuntimeError, match=reason):
        check_order(broken(choose_schedule(graph, "overlapped").forward, change), graph)


def test_the_happens_before_check_wants_everything_finished() -> None:
    graph = graph_of(Wiring.named("farskip", 3), (MOE_SHARED,) * 3)
    with pytest.raises(RuntimeError, match=r"never finished: merge\.2"):
        check_order([step for step in build_schedule(graph, "serial").forward if str(step.key) != "merge.2"], graph)


@pytest.mark.parametrize("wiring", [wiring for wiring in WIRINGS if wiring != EVERYTHING_PARTIAL], ids=str)
def test_collectives_are_launched_in_one_order_whatever_the_placement_and_the_cut(wiring: Wiring) -> None:
    """Ranks that cut their layers differently (one captures hidden states) still meet in the same exchanges.

    Not so where a router does not wait for the routed output before it: two layers are then in flight at once."""
    for chunks in (1, 2):
        graph = graph_of(wiring, (MOE_SHARED,) * 3, chunks=chunks)
        orders = {
            tuple(step.key for step in schedule.forward if step.do is Do.LAUNCH)
            for placement in placements()
            for segments in cuts(3)
            for schedule in [build_schedule(graph, "overlapped", segments=segments, placement=placement)]
        }
        assert len(orders) == 1


@pytest.mark.parametrize("key", [Key(3, "dispatch"), Key(0, "attention_in"), Key(12, "experts", 2)], ids=str)
def test_the_label_of_a_key_can_be_read_back(key: Key) -> None:
    assert Key.from_label(key.layer, key.label) == key


def test_the_default_placement_is_tried_first() -> None:
    assert next(placements()) == Placement()
