"""Tensor parallelism as data: which outputs share an all-reduce, where the stream is read, what hides behind what.

The closed forms are those of Ladder-residual (arXiv 2501.06589) and of its kin, for L layers of an attention and an MLP
that compute c_a and c_m and whose all-reduces take m_a and m_m, with nothing in each other's way.
"""

import itertools
import random
from collections.abc import Callable, Sequence

import pytest

from farskip.chain import Chain, Point, Reader
from farskip.recorder import check_order
from farskip.schedule import Do, Instruction, Schedule, build_schedule, even_segments
from farskip.simulator import StageTimes, choose_schedule, placements_beside_reductions, simulate
from farskip.stage_graph import ATTENTION_CORE, ATTENTION_IN, REDUCE, Key, StageGraph, build_stage_graph, gradient_of
from farskip.wiring import ATTENTION, DENSE, MLP, MOE, MOE_SHARED, ROUTED, SHARED, LayerBlocks, LayerWiring, Wiring

NAMES = ("ordinary", "farskip", "attn_only", "parallel", "ladder")
MIXES = [(DENSE,) * 4, (MOE,) * 4, (MOE_SHARED,) * 4, (DENSE, MOE_SHARED, MOE, MOE_SHARED)]
SC_MOE = Wiring((LayerWiring(routed=("attention",)),) * 4)
WIRINGS = [Wiring.named(name, 4) for name in NAMES] + [Wiring.named("ladder", 4, [1, 2]), SC_MOE]


def graph_of(
    wiring: Wiring, mix: Sequence[LayerBlocks], *, expert_parallel: bool = False, chunks: int = 1
) -> StageGraph:
    return build_stage_graph(wiring.resolve(mix), expert_parallel=expert_parallel, chunks=chunks, tensor_parallel=True)


def dense(name: str, num_layers: int, mode: str = "overlapped") -> Schedule:
    return build_schedule(graph_of(Wiring.named(name, num_layers), (DENSE,) * num_layers), mode)


def times_of(c_a: float, c_m: float, m_a: float, m_m: float) -> StageTimes:
    """Half of attention stands before its seam. Backward takes as long as forward."""
    forward = {ATTENTION_IN: c_a / 2, ATTENTION_CORE: c_a / 2, MLP: c_m, REDUCE[ATTENTION]: m_a, REDUCE[MLP]: m_m}
    return StageTimes(forward=forward, backward=forward)


def random_parts(seed: int) -> tuple[float, float, float, float]:
    draw = random.Random(seed)
    return draw.uniform(0, 5), draw.uniform(0, 5), draw.uniform(0, 5), draw.uniform(0, 5)


# -- groups, points, readers ------------------------------------------------------------------------------------------

A, M, S, R = ATTENTION, MLP, SHARED, ROUTED
GROUPS = {
    ("ordinary", DENSE): ((A,), (M,)),
    ("ladder", DENSE): ((A,), (M,)),
    ("parallel", DENSE): ((A, M),),
    ("farskip", DENSE): ((A, M),),
    ("ordinary", MOE_SHARED): ((A,), (S, R)),
    ("ladder", MOE_SHARED): ((A,), (S, R)),
    ("farskip", MOE_SHARED): ((A, S), (R,)),
    ("parallel", MOE_SHARED): ((A, S, R),),
    ("attn_only", MOE_SHARED): ((A,), (S,), (R,)),
    ("farskip", MOE): ((A,), (R,)),
}


@pytest.mark.parametrize(("name", "blocks"), GROUPS, ids=str)
def test_outputs_that_are_read_together_share_an_all_reduce(name: str, blocks: LayerBlocks) -> None:
    chain = Chain(Wiring.named(name, 3).resolve((blocks,) * 3))
    assert chain.groups == (GROUPS[name, blocks],) * 3, "the last layer reduces as the others do"
    reduced = [stage.key.stage for stage in graph_of(Wiring.named(name, 3), (blocks,) * 3).stages if stage.is_reduction]
    assert reduced == [REDUCE[group[-1]] for group in GROUPS[name, blocks]] * 3


def test_what_a_layer_hands_on_depends_on_who_reads_it() -> None:
    chain = Chain(Wiring.named("ladder", 3, [1]).resolve((DENSE,) * 3))
    assert chain.groups == (((A,), (M,)), ((A, M),), ((A,), (M,)))


def test_readers_of_each_point() -> None:
    chain = Chain(Wiring.named("farskip", 2).resolve((MOE_SHARED,) * 2))
    first, second = Reader(0, ATTENTION, (A,)), Reader(0, "mlp_norm", (S, R))
    assert chain.readers(0, 2) == {
        Point(0, 0): (first, second),
        Point(0, 1): (Reader(1, ATTENTION, (A,)),),
        Point(1, 0): (Reader(1, "mlp_norm", (S, R)),),
    }
    assert chain.readers(1, 2).keys() == {Point(0, 1), Point(1, 0)}
    assert gradient_of([first, second]) == Key(0, REDUCE[ROUTED])
    assert chain.points(0, 2) == (Point(0, 1), Point(1, 0), Point(1, 1), Point(2, 0))


# -- lists ------------------------------------------------------------------------------------------------------------


def check_backward(schedule: Schedule, graph: StageGraph) -> None:
    """Everything once; what is launched is waited for, in this order; nothing in flight between segments."""
    assert graph.chain is not None
    runs = [step.key for step in schedule.backward if step.do is Do.RUN]
    assert sorted(runs) == sorted(step.key for step in schedule.forward if step.do is Do.RUN)
    expected = {
        gradient_of(readers)
        for segment in schedule.segments
        for readers in graph.chain.readers(segment.start, segment.stop).values()
    }
    flying: list[Key] = []
    launched: list[Key] = []
    edges = {segment.start for segment in schedule.segments}
    for step, following in itertools.pairwise([*schedule.backward, None]):
        assert step is not None
        if step.do is Do.LAUNCH:
            flying.append(step.key)
            launched.append(step.key)
        elif step.do is Do.WAIT:
            flying.remove(step.key)
        if following is None or (following.key.layer < step.key.layer and step.key.layer in edges and not flying):
            edges -= {step.key.layer}
    assert not flying
    reductions = [key for key in launched if key.stage in REDUCE.values()]
    assert sorted(reductions) == sorted(expected)


@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: "-".join(str(len(blocks)) + blocks[-1] for blocks in mix))
@pytest.mark.parametrize("wiring", WIRINGS, ids=str)
def test_every_list_is_in_order(wiring: Wiring, mix: Sequence[LayerBlocks]) -> None:
    for expert_parallel, chunks in ((False, 1), (True, 1), (True, 2)):
        graph = graph_of(wiring, mix, expert_parallel=expert_parallel, chunks=chunks)
        for length in (1, 2, 3, 4):
            segments = even_segments(4, length)
            check_order(build_schedule(graph, "serial", segments=segments).forward, graph)
            for placement in placements_beside_reductions(graph):
                schedule = build_schedule(graph, "overlapped", segments=segments, placement=placement)
                check_order(schedule.forward, graph)
                check_backward(schedule, graph)


@pytest.mark.parametrize("name", NAMES)
def test_all_reduces_are_launched_in_the_order_of_the_stream(name: str) -> None:
    """Each one adds to what the one before has led to, even if its own outputs are ready earlier."""
    for mix, expert_parallel in itertools.product(MIXES, (False, True)):
        graph = graph_of(Wiring.named(name, 4), mix, expert_parallel=expert_parallel)
        expected = [stage.key for stage in graph.stages if stage.is_reduction]
        for placement in placements_beside_reductions(graph):
            steps = build_schedule(graph, "overlapped", placement=placement).forward
            launched = [step.key for step in steps if step.do is Do.LAUNCH and step.key.stage in REDUCE.values()]
            assert launched == expected


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("wiring", WIRINGS, ids=str)
def test_nothing_is_in_flight_between_segments(wiring: Wiring, direction: str) -> None:
    for mix, expert_parallel in itertools.product(MIXES, (False, True)):
        graph = graph_of(wiring, mix, expert_parallel=expert_parallel)
        whole = choose_schedule(graph, "overlapped", segments=even_segments(4, 2))
        steps = getattr(whole, direction)
        halves = [[step for step in steps if step.key.layer in layers] for layers in (range(2), range(2, 4))]
        assert list(steps) == (halves[0] + halves[1] if direction == "forward" else halves[1] + halves[0])
        for half in halves:
            launched = sorted(step.key for step in half if step.do is Do.LAUNCH)
            assert launched == sorted(step.key for step in half if step.do is Do.WAIT)


@pytest.mark.parametrize("wiring", WIRINGS, ids=str)
def test_serial_waits_at_once_in_both_directions(wiring: Wiring) -> None:
    for mix, expert_parallel in itertools.product(MIXES, (False, True)):
        schedule = build_schedule(graph_of(wiring, mix, expert_parallel=expert_parallel), "serial")
        for steps in (schedule.forward, schedule.backward):
            for step, following in itertools.pairwise(steps):
                if step.do is Do.LAUNCH:
                    assert following == Instruction(Do.WAIT, step.key)


@pytest.mark.parametrize("mode", ["serial", "overlapped"])
@pytest.mark.parametrize(("name", "kind"), [("ladder", "dense"), ("parallel", "dense"), ("farskip", "moe")])
def test_snapshot(name: str, kind: str, mode: str, check_snapshot: Callable[[str, str], None]) -> None:
    mix = (DENSE,) * 3 if kind == "dense" else (DENSE, MOE_SHARED, MOE_SHARED)
    schedule = choose_schedule(graph_of(Wiring.named(name, 3), mix, expert_parallel=True), mode)
    text = f"{name}, {mode}, tensor parallel: {', '.join('+'.join(blocks) for blocks in mix)}\n"
    text += f"\nforward\n{schedule.timeline()}\n\nbackward\n{schedule.timeline('backward')}\n"
    check_snapshot(
        "\n".join(line.rstrip() for line in text.splitlines()) + "\n", f"schedules/tensor_{name}_{kind}_{mode}.txt"
    )


def test_a_schedule_survives_a_dict() -> None:
    schedule = choose_schedule(
        graph_of(Wiring.named("farskip", 3), (MOE_SHARED,) * 3, expert_parallel=True), "overlapped"
    )
    assert Schedule.from_dict(schedule.to_dict()) == schedule


# -- what hides behind what -------------------------------------------------------------------------------------------


def cover(steps: Sequence[Instruction], key: Key) -> list[Key]:
    """What runs between launch and wait."""
    between = steps[steps.index(Instruction(Do.LAUNCH, key)) : steps.index(Instruction(Do.WAIT, key))]
    return [step.key for step in between if step.do is Do.RUN]


def test_ladder_hides_each_all_reduce_behind_the_next_sub_block_in_both_directions() -> None:
    schedule = dense("ladder", 4)
    for layer in range(4):
        attention = [Key(layer, ATTENTION_IN), Key(layer, ATTENTION_CORE)]
        assert cover(schedule.forward, Key(layer, REDUCE[ATTENTION])) == [Key(layer, MLP)]
        after = [Key(layer + 1, ATTENTION_IN), Key(layer + 1, ATTENTION_CORE)] if layer < 3 else []
        assert cover(schedule.forward, Key(layer, REDUCE[MLP])) == after
        if layer:  # in layer 0 attention and MLP read the same point, whose gradient is reduced once, exposed
            assert cover(schedule.backward, Key(layer, REDUCE[MLP])) == attention[::-1]
            assert cover(schedule.backward, Key(layer, REDUCE[ATTENTION])) == [Key(layer - 1, MLP)]
    assert cover(schedule.backward, Key(0, REDUCE[MLP])) == []
    assert Instruction(Do.LAUNCH, Key(0, REDUCE[ATTENTION])) not in schedule.backward


@pytest.mark.parametrize(("name", "num_reductions"), [("ordinary", 8), ("parallel", 4)])
def test_ordinary_and_parallel_layers_hide_nothing(name: str, num_reductions: int) -> None:
    schedule = dense(name, 4)
    for steps in (schedule.forward, schedule.backward):
        keys = [step.key for step in steps if step.do is Do.LAUNCH]
        assert len(keys) == num_reductions and all(cover(steps, key) == [] for key in keys)


def test_a_hybrid_exposes_one_all_reduce_per_rewired_stretch() -> None:
    """The last two of five layers: in them only the last all-reduce is exposed, before them all are."""
    schedule = build_schedule(graph_of(Wiring.named("ladder", 5, "last:2"), (DENSE,) * 5), "overlapped")
    for steps, end in ((schedule.forward, Key(4, REDUCE[MLP])), (schedule.backward, Key(3, REDUCE[ATTENTION]))):
        exposed = [step.key for step in steps if step.do is Do.LAUNCH and not cover(steps, step.key)]
        assert [key for key in exposed if key.layer > 2] == [end]
    middle = build_schedule(graph_of(Wiring.named("ladder", 5, [1, 2]), (DENSE,) * 5), "overlapped").forward
    exposed = [step.key for step in middle if step.do is Do.LAUNCH and not cover(middle, step.key)]
    assert [key for key in exposed if key.layer in (1, 2)] == [Key(2, REDUCE[MLP])]


def test_farskip_reduces_attention_and_shared_expert_together_under_the_routed_experts() -> None:
    """FarSkip-Collective 4.2: two all-reduces per layer, the routed one under the next attention."""
    schedule = build_schedule(graph_of(Wiring.named("farskip", 3), (MOE_SHARED,) * 3), "overlapped")
    for layer in (1, 2):
        assert cover(schedule.forward, Key(layer, REDUCE[SHARED])) == [Key(layer, "route"), Key(layer, "experts")]
    attention = [Key(2, ATTENTION_IN), Key(2, ATTENTION_CORE)]
    assert cover(schedule.forward, Key(1, REDUCE[ROUTED])) == attention


def test_with_dispatch_the_placement_is_the_best_of_all() -> None:
    graph = graph_of(Wiring.named("farskip", 4), (MOE_SHARED,) * 4, expert_parallel=True)
    stages = sorted({stage.key.stage for stage in graph.stages} | {REDUCE[ATTENTION]})
    for seed in range(5):
        draw = random.Random(seed)
        times = StageTimes(forward={stage: draw.uniform(0, 5) for stage in stages})

        def total(schedule: Schedule, times: StageTimes = times) -> float:
            return simulate(schedule.forward, times).total + simulate(schedule.backward, times, "backward").total

        found = [
            total(build_schedule(graph, "overlapped", placement=each)) for each in placements_beside_reductions(graph)
        ]
        assert len({round(each, 6) for each in found}) > 1, "there is nothing to choose"
        assert total(choose_schedule(graph, "overlapped", times=times)) == pytest.approx(min(found))
        assert min(found) <= total(build_schedule(graph, "serial")) + 1e-9


# -- closed forms -----------------------------------------------------------------------------------------------------

EQUAL = [(1.0, 0.0), (1.0, 0.3), (1.0, 1.0), (1.0, 2.5), (0.0, 1.0), (0.7, 0.9)]
DEPTHS = (2, 3, 8)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("mode", ["serial", "overlapped"])
@pytest.mark.parametrize(("c", "m"), EQUAL)
def test_standard(c: float, m: float, mode: str, direction: str) -> None:
    """2 L (c + m)."""
    for layers in DEPTHS:
        steps = getattr(dense("ordinary", layers, mode), direction)
        assert simulate(steps, times_of(c, c, m, m), direction).total == pytest.approx(2 * layers * (c + m))


@pytest.mark.parametrize(("c", "m"), EQUAL)
def test_ladder(c: float, m: float) -> None:
    """2 L max(c, m) + min(c, m)."""
    for layers in DEPTHS:
        total = simulate(dense("ladder", layers).forward, times_of(c, c, m, m)).total
        assert total == pytest.approx(2 * layers * max(c, m) + min(c, m))


@pytest.mark.parametrize(("c", "m"), EQUAL)
def test_ladder_backward(c: float, m: float) -> None:
    """As forward where compute bounds it. Layer 0 reduces one gradient for both sub-blocks: 2 L - 1 all-reduces, the
    first behind one sub-block and the last behind another."""
    for layers in DEPTHS:
        total = simulate(dense("ladder", layers).backward, times_of(c, c, m, m), "backward").total
        assert total == pytest.approx(2 * layers * c + m if c >= m else 2 * c + (2 * layers - 1) * m)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("seed", range(5))
def test_parallel(seed: int, direction: str) -> None:
    """L (c_a + c_m + m): attention and MLP share one all-reduce."""
    c_a, c_m, _, m = random_parts(seed)
    for layers in DEPTHS:
        total = simulate(getattr(dense("parallel", layers), direction), times_of(c_a, c_m, 0.0, m), direction).total
        assert total == pytest.approx(layers * (c_a + c_m + m))


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("seed", range(20))
def test_ladder_period(seed: int, direction: str) -> None:
    """Each further layer costs max(c_a + m_a, c_m + m_m, c_a + c_m, m_a + m_m)."""
    parts = c_a, c_m, m_a, m_m = random_parts(seed)
    few, many = (
        simulate(getattr(dense("ladder", layers), direction), times_of(*parts), direction).total for layers in (20, 30)
    )
    assert (many - few) / 10 == pytest.approx(max(c_a + m_a, c_m + m_m, c_a + c_m, m_a + m_m))
