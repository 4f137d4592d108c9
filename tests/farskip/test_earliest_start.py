"""Sequence parallelism as data: what stands where, in which order, and what it hides. No torch.

The closed forms are those of L layers of an attention and an MLP that compute c each, the norm taking no time, whose
gather and scatter take m/2 each: together what an all-reduce takes.
"""

import itertools
import random
from collections.abc import Callable, Sequence

import pytest

from farskip.recorder import check_order
from farskip.schedule import Do, Instruction, Schedule, build_schedule, even_segments, mirror
from farskip.simulator import StageTimes, choose_schedule, explain, simulate
from farskip.stage_graph import (
    ATTENTION_CORE,
    ATTENTION_IN,
    COLLECTIVES,
    GATHER,
    NORM,
    SCATTER,
    Key,
    StageGraph,
    build_stage_graph,
)
from farskip.wiring import ATTENTION, DENSE, MLP, MOE, MOE_SHARED, SHARED, LayerBlocks, LayerWiring, Wiring

NAMES = ("ordinary", "farskip", "attn_only", "parallel", "ladder")
MIXES = [(DENSE,) * 4, (MOE_SHARED,) * 4, (DENSE, MOE_SHARED, MOE, MOE_SHARED)]
SC_MOE = Wiring((LayerWiring(routed=("attention",)),) * 4)
WIRINGS = [Wiring.named(name, 4) for name in NAMES] + [Wiring.named("ladder", 4, [1, 2]), SC_MOE]


def graph_of(
    wiring: Wiring, mix: Sequence[LayerBlocks], *, expert_parallel: bool = False, chunks: int = 1
) -> StageGraph:
    return build_stage_graph(
        wiring.resolve(mix),
        expert_parallel=expert_parallel,
        chunks=chunks,
        tensor_parallel=True,
        sequence_chunks=chunks,
    )


def dense(name: str, num_layers: int, chunks: int, times: StageTimes, mode: str = "overlapped") -> Schedule:
    graph = graph_of(Wiring.named(name, num_layers), (DENSE,) * num_layers, chunks=chunks)
    return choose_schedule(graph, mode, times=times)


def times_of(c: float, m: float) -> StageTimes:
    """Half of attention stands before its seam. Backward takes as long as forward."""
    forward = {ATTENTION_IN: c / 2, ATTENTION_CORE: c / 2, MLP: c, **dict.fromkeys(NORM.values(), 0.0)}
    forward |= dict.fromkeys((*GATHER.values(), *SCATTER.values()), m / 2)
    return StageTimes(forward=forward, backward=forward)


def random_times(seed: int) -> StageTimes:
    draw = random.Random(seed)
    return StageTimes(forward={stage: draw.uniform(0.0, 3.0) for stage in StageTimes().forward})


# -- the graph --------------------------------------------------------------------------------------------------------


def test_what_sees_all_tokens_stands_between_gather_and_scatter() -> None:
    stages = graph_of(Wiring.named("ladder", 2), (DENSE, DENSE), chunks=2).of_layers(0, 1)
    assert [stage.key.label for stage in stages] == [
        *("attention_norm", "gather_attention", "attention_in", "attention_core", "scatter_attention"),
        *("mlp_norm", "gather_mlp", "mlp", "scatter_mlp", "gather_mlp_1", "mlp_1", "scatter_mlp_1"),
    ]
    assert all(Key.from_label(0, stage.key.label) == stage.key for stage in stages)


def test_the_router_reads_its_own_tokens() -> None:
    """Nothing is gathered for router and routed experts; the shared expert has a gather and a scatter of its own."""
    graph = graph_of(Wiring.named("farskip", 2), (MOE_SHARED,) * 2, expert_parallel=True)
    needs = {stage.key: set(stage.after) for stage in graph.stages}
    before = {Key(0, name) for name in (SCATTER[ATTENTION], SCATTER[SHARED])}
    assert needs[Key(1, "route")] == {*before, Key(0, "merge")}
    assert needs[Key(1, NORM[SHARED])] == {*before, Key(0, "merge")}
    assert needs[Key(1, NORM[ATTENTION])] == before
    assert needs[Key(1, ATTENTION_IN)] == {Key(1, GATHER[ATTENTION]), Key(0, ATTENTION_CORE)}
    collectives = [stage.key.stage for stage in graph.of_layers(1, 2) if stage.is_collective]
    expected = [GATHER[ATTENTION], SCATTER[ATTENTION], "dispatch", "combine", GATHER[SHARED], SCATTER[SHARED]]
    assert collectives == expected and set(expected) <= set(COLLECTIVES)


# -- lists ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: "-".join(blocks[-1] for blocks in mix))
@pytest.mark.parametrize("wiring", WIRINGS, ids=str)
def test_every_list_is_in_order_and_backward_is_its_mirror(wiring: Wiring, mix: Sequence[LayerBlocks]) -> None:
    for expert_parallel, chunks, length in itertools.product((False, True), (1, 3), (1, 2, 4)):
        graph, segments = (
            graph_of(wiring, mix, expert_parallel=expert_parallel, chunks=chunks),
            even_segments(4, length),
        )
        for seed in range(3):
            duration = random_times(seed).forward.__getitem__
            for mode in ("serial", "overlapped"):
                schedule = build_schedule(graph, mode, segments=segments, duration=duration)
                check_order(schedule.forward, graph)
                assert schedule.backward == mirror(schedule.forward)
                pieces = [schedule.of_segment(segment) for segment in segments]
                assert schedule.forward == tuple(itertools.chain(*pieces))
                for steps in pieces:
                    launched, waited = (
                        {step.key for step in steps if step.do is verb} for verb in (Do.LAUNCH, Do.WAIT)
                    )
                    assert launched == waited, "something is in flight behind a segment"
    assert Schedule.from_dict(schedule.to_dict()) == schedule


@pytest.mark.parametrize("wiring", WIRINGS, ids=str)
def test_serial_waits_at_once_in_both_directions(wiring: Wiring) -> None:
    for mix, expert_parallel, chunks in itertools.product(MIXES, (False, True), (1, 2)):
        schedule = build_schedule(graph_of(wiring, mix, expert_parallel=expert_parallel, chunks=chunks), "serial")
        for steps in (schedule.forward, schedule.backward):
            for step, following in itertools.pairwise(steps):
                assert step.do is not Do.LAUNCH or following == Instruction(Do.WAIT, step.key)


@pytest.mark.parametrize("wiring", WIRINGS, ids=str)
def test_nothing_is_slower_than_serial_and_the_choice_is_the_best(wiring: Wiring) -> None:
    def total(schedule: Schedule, times: StageTimes) -> float:
        return simulate(schedule.forward, times).total + simulate(schedule.backward, times, "backward").total

    for mix, seed, chunks in itertools.product(MIXES, range(3), (1, 2)):
        graph, times = graph_of(wiring, mix, expert_parallel=True, chunks=chunks), random_times(seed)
        straight = total(build_schedule(graph, "overlapped", duration=times.forward.__getitem__), times)
        assert straight <= total(build_schedule(graph, "serial"), times) + 1e-9
        assert total(choose_schedule(graph, "overlapped", times=times), times) <= straight + 1e-9


def test_compute_stands_still_only_if_no_stage_could_start() -> None:
    gaps = 0
    for seed in range(5):
        times = random_times(seed)
        graph = graph_of(Wiring.named("farskip", 4), MIXES[2], expert_parallel=True, chunks=2)
        timeline = simulate(build_schedule(graph, "overlapped", duration=times.forward.__getitem__).forward, times)
        there = {span.key: span.stop for span in (*timeline.compute, *timeline.communication)}
        able = {stage.key: max((there[key] for key in stage.after), default=0.0) for stage in graph.stages}
        for place, (before, span) in enumerate(itertools.pairwise(timeline.compute), start=1):
            if span.start > before.stop + 1e-9:
                gaps += 1
                assert min(able[later.key] for later in timeline.compute[place:]) >= span.start - 1e-9
    assert gaps


@pytest.mark.parametrize("mode", ["serial", "overlapped"])
@pytest.mark.parametrize(("name", "kind"), [("ladder", "dense"), ("ordinary", "dense"), ("farskip", "moe")])
def test_snapshot(name: str, kind: str, mode: str, check_snapshot: Callable[[str, str], None]) -> None:
    mix = (DENSE,) * 3 if kind == "dense" else (DENSE, MOE_SHARED, MOE_SHARED)
    schedule = choose_schedule(graph_of(Wiring.named(name, 3), mix, expert_parallel=True, chunks=2), mode)
    text = f"{name}, {mode}, sequence parallel, two chunks: {', '.join('+'.join(blocks) for blocks in mix)}\n"
    text += f"\nforward\n{schedule.timeline()}\n\nbackward\n{schedule.timeline('backward')}\n"
    check_snapshot(
        "\n".join(line.rstrip() for line in text.splitlines()) + "\n", f"schedules/sequence_{name}_{kind}_{mode}.txt"
    )


# -- what hides behind what -------------------------------------------------------------------------------------------

DEPTHS = (2, 3, 8)
SLOW, EVEN, QUICK = (1.0, 2.0), (1.0, 1.0), (1.0, 0.6)
DIRECTIONS = ("forward", "backward")


def took(schedule: Schedule, times: StageTimes) -> list[float]:
    return [simulate(getattr(schedule, direction), times, direction).total for direction in DIRECTIONS]


@pytest.mark.parametrize(("c", "m"), [SLOW, EVEN, QUICK])
def test_ordinary_layers_hide_nothing_but_chunks(c: float, m: float) -> None:
    """2 L (c + m). In n chunks the MLP hides all but a chunk's gather and scatter, where a chunk computes as long as
    it is gathered: 2 L (c + m) - L m (n - 1) / n."""
    for layers, chunks in itertools.product(DEPTHS, (1, 2)):
        times = times_of(c, m)
        expected = 2 * layers * (c + m) - layers * m * (chunks - 1) / chunks
        assert took(dense("ordinary", layers, chunks, times), times) == pytest.approx([expected] * 2)
        assert took(dense("ordinary", layers, chunks, times, "serial"), times) == pytest.approx(
            [2 * layers * (c + m)] * 2
        )


@pytest.mark.parametrize(("c", "m"), [EVEN, QUICK])
def test_ladder_without_chunks_hides_half(c: float, m: float) -> None:
    """L (2 c + m), for m <= c: the scatter of attention hides under the MLP, and nothing is left for its norm's gather;
    of the MLP's, the scatter hides under the projections and the gather under the core."""
    for layers in DEPTHS:
        times = times_of(c, m)
        assert took(dense("ladder", layers, 1, times), times) == pytest.approx([layers * (2 * c + m)] * 2)


@pytest.mark.parametrize(("c", "m"), [(1.0, 0.0), (1.0, 0.25), QUICK, (3.0, 2.0)])
def test_ladder_in_two_chunks_exposes_only_the_two_ends(c: float, m: float) -> None:
    """2 L c + 3 m / 4, for m <= 2 c / 3: the first gather of attention and half of the last scatter."""
    for layers in DEPTHS:
        times = times_of(c, m)
        schedule = dense("ladder", layers, 2, times)
        assert took(schedule, times) == pytest.approx([2 * layers * c + 0.75 * m] * 2)
        ends = {Key(0, GATHER[ATTENTION]): m / 2, Key(layers - 1, SCATTER[MLP], 1): m / 4}
        for direction in DIRECTIONS:
            exposed = simulate(getattr(schedule, direction), times, direction).exposed
            assert {key: time for key, time in exposed.items() if time > 1e-9} == pytest.approx(
                {key: time for key, time in ends.items() if time}
            )


def test_more_chunks_than_two_still_hide_everything_between_the_ends() -> None:
    times = times_of(1.0, 0.5)
    for chunks in (3, 4, 8):
        schedule = dense("ladder", 6, chunks, times)
        assert took(schedule, times) == pytest.approx([12.0 + 0.25 + 0.25 / chunks] * 2)


def test_farskip_with_wide_windows_exposes_what_explain_says() -> None:
    """What is between the last scatter and the next gather of attention has combine and merge beside it only."""
    times = StageTimes(forward={**StageTimes().forward, **dict.fromkeys(("experts", "shared"), 4.0)})
    graph = graph_of(Wiring.named("farskip", 4), (MOE_SHARED,) * 4, expert_parallel=True, chunks=2)
    schedule = choose_schedule(graph, "overlapped", times=times)
    timeline = simulate(schedule.forward, times)
    assert timeline.exposed_total < 0.2 * timeline.communication_total
    rows = {line.split()[0]: line.split() for line in explain(schedule.forward, times).splitlines()[1:-1]}
    assert {name: float(row[3]) for name, row in rows.items()} == pytest.approx(
        {str(key): time for key, time in timeline.exposed.items()}, abs=0.006
    )


def test_a_stage_in_chunks_takes_as_long_as_in_one_piece() -> None:
    """And one that is not cut is not divided by the chunks of others."""
    times = times_of(1.0, 0.5)
    for name, chunks in itertools.product(NAMES, (1, 2, 5)):
        timeline = simulate(dense(name, 3, chunks, times, "serial").forward, times)
        for stage in (ATTENTION_IN, ATTENTION_CORE, MLP):
            spans = [span.stop - span.start for span in timeline.compute if span.key.stage == stage]
            assert sum(spans) == pytest.approx(3 * times.forward[stage])
