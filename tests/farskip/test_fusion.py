"""Which sums of the stream are formed with their norms: the plan, its uses, and the values that come out."""

import itertools
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import pytest
import torch

from farskip.fusion import FusionPlan, landed_layers, plan_fusions
from farskip.instruction import Do, Instruction
from farskip.residual import GATE, MLP_NORM, ROWS, Residual, Value, stream_uses
from farskip.schedule import build_schedule
from farskip.stage import Norm, RoutedRows
from farskip.stage_graph import Key, build_stage_graph
from farskip.wiring import (
    ATTENTION,
    DENSE,
    MLP,
    MOE,
    MOE_SHARED,
    ROUTED,
    SHARED,
    LayerBlocks,
    LayerWiring,
    Wiring,
)

NUM_LAYERS = 3
WHOLE_LAYER = LayerWiring(attention=("previous.attention", "previous.mlp", "previous.shared", "previous.routed"))
PARTIAL_TWICE = LayerWiring(
    attention=("previous.routed",),
    **dict.fromkeys((MLP, SHARED, ROUTED), (ATTENTION, "previous.routed")),
)
WIRINGS = [
    *(Wiring.named(name, NUM_LAYERS) for name in ("ordinary", "farskip", "attn_only", "parallel", "ladder")),
    Wiring.named("farskip", NUM_LAYERS, [1]),
    Wiring((LayerWiring(), WHOLE_LAYER, WHOLE_LAYER)),
    Wiring((LayerWiring(), PARTIAL_TWICE, PARTIAL_TWICE)),
    Wiring((LayerWiring(routed=(ATTENTION,)),) * NUM_LAYERS),
]
MIXES = [(kind,) * NUM_LAYERS for kind in (DENSE, MOE, MOE_SHARED)] + [(DENSE, MOE_SHARED, MOE)]
ALL = frozenset(Norm(layer, name) for layer in range(NUM_LAYERS) for name in (ATTENTION, MLP_NORM))
SOME = frozenset({Norm(1, MLP_NORM), Norm(2, ATTENTION), Norm(0, MLP_NORM)})

wirings = pytest.mark.parametrize("wiring", WIRINGS, ids=str)
mixes = pytest.mark.parametrize("mix", MIXES, ids=["dense", "moe", "shared", "mixed"])


class Numbers:
    """Ops over a norm that multiplies by a number of its own."""

    def run_on(self, stream_BSD: torch.Tensor) -> bool:
        return True

    def fusible(self, start: int, stop: int, stream_BSD: torch.Tensor) -> frozenset[Norm]:
        raise AssertionError("asked by the executor, not here")

    def add_norm(self, norms: Any, x: Any, a: Any) -> Any:
        return x + a, normed(norms[0], x + a)

    def release_attention(self, norms: Any, x: Any, a: Any, s: Any) -> Any:
        return x + a, normed(norms[0], (x + a) + s)

    def release_router(self, norms: Any, y: Any, r: Any, s: Any = None) -> Any:
        r = summed(r)
        return (full := y + (r if s is None else r + s)), normed(norms[0], full)

    def release_router_by_use(self, norms: Any, num_uses: int, gradient: Any, *terms: Any) -> Any:
        full, of_full = self.release_router(norms, *terms)
        return full, *(of_full.view_as(of_full) for _ in range(num_uses))

    def release_both(self, norms: Any, x: Any, a: Any, r: Any, s: Any) -> Any:
        y, u = self.release_attention(norms[:1], x, a, s)
        return (full := y + (summed(r) + s)), u, normed(norms[1], full)


def summed(r: Any) -> Any:
    return r.rows_RD * r.weights_TK if isinstance(r, RoutedRows) else r


def normed(norm: Norm, stream: torch.Tensor) -> torch.Tensor:
    return stream * (norm.layer + (1.25 if norm.name == ATTENTION else 1.75))


def plan_of(
    wiring: Wiring,
    mix: Sequence[LayerBlocks],
    fusible: Collection[Norm],
    landed: Collection[int],
    stop: int,
    as_rows: bool = False,
) -> FusionPlan:
    inputs = wiring.resolve(mix)
    return plan_fusions(inputs, stream_uses(inputs), 0, stop, fusible, landed, as_rows=as_rows)


def by_use(plan: FusionPlan, norm: Norm, which: str) -> bool:
    """Whether the op of a normed value hands it out by use."""
    fusion = plan.fusions.get(Value(norm.layer, "normed_" + which))
    return fusion is not None and fusion.by_use


def drive(wiring: Wiring, mix: Sequence[LayerBlocks], plan: FusionPlan, stop: int) -> dict[str, torch.Tensor]:
    """Norm, read and put in program order, as an executor does; everything that comes out, and no alias left over."""
    inputs, x = wiring.resolve(mix), torch.full((3,), 0.1, requires_grad=True)
    residual = Residual(inputs, plan.uses, 0, stop, x * 1, x, fixed_order=True, fusions=plan.fusions, kernels=Numbers())
    seen: dict[str, torch.Tensor] = {}
    for layer, blocks in enumerate(mix[:stop]):
        for block in blocks:
            source = inputs[layer].source(block)
            norm, which = (ATTENTION, ATTENTION) if block == ATTENTION else (MLP_NORM, source)
            if not residual.has_normed(layer, which):
                marked: list[int] = []
                mark = lambda *terms, marked=marked: (marked.append(len(terms)), terms)[1]  # noqa: E731
                if not residual.form_normed(layer, which, mark):
                    stream = residual.read(layer, source, norm, mark)
                    residual.put_normed(layer, which, normed(Norm(layer, norm), stream))
                assert len(marked) == 1, "a stage is left once, through what it took in"
            if block == ROUTED:
                given = [residual.rows_gradient(layer, which) is not None for _ in range(2)]
                assert given == [by_use(plan, Norm(layer, norm), which), False], "once per value"
            for use in {ROUTED: (GATE, ROWS)}.get(block, (block,)):
                seen[f"{use}.{layer}"] = residual.read_normed(layer, which, use)
            made = {ATTENTION: 0.25, MLP: 3e7, SHARED: -1e8, ROUTED: 1e8}[block] * (layer + 1)
            output, half = torch.full((3,), made), torch.full((3,), 0.5)
            if block == ROUTED and residual.takes_rows(layer, [output]):
                residual.put_rows(layer, RoutedRows(rows_RD=output * 2, dispatch=None, weights_TK=half))
            else:
                residual.put(layer, block, output)
    seen["x.out"], seen["n.out"] = residual.leave()
    assert not {value: list(left) for value, left in residual._aliases.items() if left}
    return seen


@pytest.mark.parametrize("stop", [NUM_LAYERS, NUM_LAYERS - 1])
@mixes
@wirings
def test_the_ops_make_what_plain_adds_and_norms_make(wiring: Wiring, mix: Sequence[LayerBlocks], stop: int) -> None:
    """In bits, for sums that depend on the bracketing; and every alias is used."""
    plain = drive(wiring, mix, plan_of(wiring, mix, (), (), stop), stop)
    for fusible, landed, as_rows in itertools.product((ALL, SOME), ((), range(NUM_LAYERS)), (False, True)):
        plan = plan_of(wiring, mix, fusible, landed, stop, as_rows)
        fused = drive(wiring, mix, plan, stop)
        assert fused.keys() == plain.keys()
        for name, value in plain.items():
            assert torch.equal(fused[name], value), f"{name}, {sorted(fusible)}"


def test_no_alias_of_the_steady_state_is_left_over() -> None:
    """Farskip with shared experts, one update after the other and both at once."""
    wiring, mix = Wiring.named("farskip", NUM_LAYERS), (MOE_SHARED,) * NUM_LAYERS
    for landed in ((), range(NUM_LAYERS)):
        drive(wiring, mix, plan_of(wiring, mix, ALL, landed, NUM_LAYERS), NUM_LAYERS)


FEW = frozenset({Norm(1, MLP_NORM)})
TABLE = {
    # of three layers with shared experts: what forms y.0, then n.1, then x.1; y.2 has no norm behind it but its own
    "ordinary": {"y": "add_norm", "n": None, "x": "release_router"},
    "farskip": {"y": "release_attention", "n": None, "x": "release_router"},
    "attn_only": {"y": "add_norm", "n": "add_norm", "x": None},
    "parallel": {"y": None, "n": None, "x": "release_router"},
    "ladder": {"y": "add_norm", "n": None, "x": "release_router"},
}


@pytest.mark.parametrize("name", TABLE)
def test_which_op_forms_what(name: str) -> None:
    mix = (MOE_SHARED,) * NUM_LAYERS
    plan = plan_of(Wiring.named(name, NUM_LAYERS), mix, ALL, (), NUM_LAYERS)
    ops = {value: fusion.op for value, fusion in plan.fusions.items()}
    for layer in range(NUM_LAYERS - 1):
        found = {key: ops.get((layer + (key != "y"), key)) for key in ("y", "n", "x")}
        assert found == TABLE[name]


@pytest.mark.parametrize("landed", [(), range(NUM_LAYERS)], ids=["in flight", "landed"])
@pytest.mark.parametrize("name", TABLE)
def test_what_meets_rows(name: str, landed: Collection[int]) -> None:
    """Routed outputs come as rows to the op that adds them, where one does. Rows go out from a norm whose op knows;
    under ordinary and parallel attention reads that norm, the router another one."""
    mix = (MOE_SHARED,) * NUM_LAYERS
    plan = plan_of(Wiring.named(name, NUM_LAYERS), mix, ALL, landed, NUM_LAYERS, as_rows=True)
    into = [plan.fusions[(layer, "x")].as_rows if (layer, "x") in plan.fusions else None for layer in (1, 2)]
    assert into == ([None, None] if name == "attn_only" else [True, True])
    ops = {id(fusion): fusion for fusion in plan.fusions.values()}.values()
    by_use = {"ladder": 2, "farskip": 0 if landed else 2}.get(name, 0)
    assert sum(fusion.by_use for fusion in ops) == by_use
    for fusion in ops:
        assert fusion.as_rows == ((fusion.makes[0].layer - 1, ROUTED) in [value for value, _ in fusion.takes])
    plain = plan_of(Wiring.named(name, NUM_LAYERS), mix, ALL, landed, NUM_LAYERS)
    assert not any(fusion.as_rows or fusion.by_use for fusion in plain.fusions.values())


def test_a_dense_output_does_not_come_as_rows() -> None:
    plan = plan_of(Wiring.named("ladder", NUM_LAYERS), (DENSE, MOE_SHARED, MOE), ALL, (), NUM_LAYERS, as_rows=True)
    assert [plan.fusions[(layer, "x")].as_rows for layer in (1, 2)] == [False, True]
    assert [plan.fusions[(layer, "x")].by_use for layer in (1, 2)] == [True, True]


def test_wider_rows_and_rows_in_pieces_are_merged_first() -> None:
    """Narrower ones, as under autocast, are widened where they join the stream."""
    wiring, mix = Wiring.named("farskip", NUM_LAYERS), (MOE_SHARED,) * NUM_LAYERS
    plan, x = plan_of(wiring, mix, ALL, (), NUM_LAYERS, as_rows=True), torch.ones(3)
    inputs = wiring.resolve(mix)
    residual = Residual(inputs, plan.uses, 0, 3, x, x, fixed_order=True, fusions=plan.fusions, kernels=Numbers())
    assert residual.takes_rows(0, [x]) and not residual.takes_rows(0, [x, x])
    assert residual.takes_rows(0, [x.bfloat16()]) and not residual.takes_rows(0, [x.double()])
    assert not residual.takes_rows(2, [x]), "what leaves a segment is a plain sum"


def test_both_streams_are_updated_at_once_where_nothing_is_in_flight() -> None:
    mix = (MOE_SHARED,) * NUM_LAYERS
    plan = plan_of(Wiring.named("farskip", NUM_LAYERS), mix, ALL, (0,), NUM_LAYERS)
    ops = {id(fusion): fusion.op for fusion in plan.fusions.values()}
    assert Counter(ops.values()) == {"release_both": 1, "release_attention": 1, "release_router": 1}


def test_what_two_norms_read_is_formed_with_the_first_that_an_op_can_take_over() -> None:
    """Parallel: attention and the norm behind it read x."""
    mix = (MOE_SHARED,) * NUM_LAYERS
    for fusible, expected in ((ALL, Norm(1, ATTENTION)), (FEW, Norm(1, MLP_NORM))):
        plan = plan_of(Wiring.named("parallel", NUM_LAYERS), mix, fusible, (), NUM_LAYERS)
        assert {fusion.norms for value, fusion in plan.fusions.items() if value == (1, "x")} == {(expected,)}


def test_what_leaves_a_segment_is_plain() -> None:
    """Its norm belongs to the next segment."""
    mix = (MOE_SHARED,) * NUM_LAYERS
    for wiring in WIRINGS:
        plan = plan_of(wiring, mix, ALL, range(NUM_LAYERS), 2)
        assert {value.layer for value in plan.fusions} <= {0, 1}


@pytest.mark.parametrize("expert_parallel", [False, True])
def test_routed_outputs_have_landed_where_the_schedule_waits_first(expert_parallel: bool) -> None:
    inputs = Wiring.named("farskip", NUM_LAYERS).resolve((DENSE, MOE_SHARED, MOE_SHARED))
    graph = build_stage_graph(inputs, expert_parallel=expert_parallel)
    found = {mode: landed_layers(build_schedule(graph, mode).forward) for mode in ("serial", "overlapped")}
    assert found == {"serial": {1}, "overlapped": set() if expert_parallel else {1}}


def test_under_sequence_parallelism_the_norm_of_attention_is_what_reads() -> None:
    """It stands before a gather, and merge may run while that is under way."""

    def runs(*names: str) -> list[Instruction]:
        return [Instruction(Do.RUN, Key(int(each[-1]), each[:-2])) for each in names]

    after, before = ("attention_norm.1", "merge.0", "attention_in.1"), ("merge.0", "attention_norm.1", "attention_in.1")
    assert landed_layers(runs(*after)) == frozenset()
    assert landed_layers(runs(*before)) == {0}
