"""The executor on toy sub-blocks and a fake link: every placement, wiring and cut computes the same bits, in order."""

import itertools
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from farskip.executor import Executor
from farskip.fusion import FusionPlan
from farskip.parallel.dispatcher import AllToAllDispatcher
from farskip.parallel.testing_links import Delay, FakeLink, at_wait, random_delay
from farskip.recorder import Recorder
from farskip.residual import MLP_NORM
from farskip.schedule import Do, Instruction, Segment, build_schedule, even_segments
from farskip.simulator import placements
from farskip.stage import Norm, WeightOn
from farskip.testing import load_beside
from farskip.wiring import ATTENTION, MOE, MOE_SHARED, LayerBlocks, Wiring

toys = load_beside(__file__, "toy_layers")
MIX, WIRINGS, EXPERTS, WIDTH = toys.MIX, toys.WIRINGS, toys.EXPERTS, toys.WIDTH


def without(plan: FusionPlan, as_rows: bool, by_use: bool) -> FusionPlan:
    """The plan, with ops that take rows only as far as they are asked to."""
    changed = {
        value: replace(fusion, as_rows=fusion.as_rows and as_rows, by_use=fusion.by_use and by_use)
        for value, fusion in plan.fusions.items()
    }
    return FusionPlan(plan.uses, changed)


class Run:
    """One forward and backward pass, and everything that can be compared."""

    def __init__(
        self,
        wiring: Wiring,
        mode: str,
        *,
        mix: Sequence[LayerBlocks] = MIX,
        placement: Any = None,
        segments: tuple[Segment, ...] | None = None,
        recompute: bool = False,
        delay: Delay = at_wait,
        expert_parallel: bool = True,
        chunks: int = 1,
        observe: bool = True,
        kernels: bool = False,
        called: Collection[Norm] = (),
        as_rows: bool = True,
        by_use: bool = True,
        capacity: int | None = None,
        weight_on: WeightOn = WeightOn.OUTPUT,
    ) -> None:
        layers = [toys.ToyBlocks(blocks, seed) for seed, blocks in enumerate(mix)]
        self.kernels = toys.ToyKernels(layers, called)
        self.link, self.recorder = FakeLink(delay), Recorder()
        dispatcher = AllToAllDispatcher(self.link, EXPERTS, chunks, capacity=capacity) if expert_parallel else None
        executor = Executor(layers, wiring, dispatcher=dispatcher, mode=mode)
        executor.routing_hook = lambda _, routing, __: replace(routing, weight_on=weight_on)
        if not (as_rows and by_use):
            planned = executor._fusion_plan
            executor._fusion_plan = lambda *a: without(planned(*a), as_rows, by_use)  # type: ignore[method-assign]
        executor.stream_kernels = self.kernels if kernels else None
        if observe:
            executor.observers.append(self.recorder)
        cut = segments or (Segment(0, len(mix)),)
        if placement is not None:
            executor.set_schedule(build_schedule(executor.graph, mode, segments=cut, placement=placement))
        self.schedule = executor.schedule(cut)
        self.tensors = toys.passed_through(executor, self.schedule, layers, recompute=recompute)

    def assert_equal_bits(self, other: "Run") -> None:
        toys.assert_equal_bits(self.tensors, other.tensors)
        assert not self.link.in_flight and not self.link.lost


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("wiring", WIRINGS, ids=str)
def test_every_placement_gives_the_bits_of_serial(wiring: Wiring, chunks: int) -> None:
    serial = Run(wiring, "serial", chunks=chunks)
    serial.recorder.check(serial.schedule)
    for placement in placements():
        overlapped = Run(wiring, "overlapped", placement=placement, chunks=chunks)
        overlapped.assert_equal_bits(serial)
        overlapped.recorder.check(overlapped.schedule)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("wiring", WIRINGS, ids=str)
def test_segments_give_the_bits_of_serial(wiring: Wiring, length: int, recompute: bool) -> None:
    for chunks in (1, 3):
        serial, overlapped = (
            Run(wiring, mode, segments=even_segments(4, length), recompute=recompute, chunks=chunks)
            for mode in ("serial", "overlapped")
        )
        overlapped.assert_equal_bits(serial)


@pytest.mark.parametrize("length", [1, 2, 4])
@pytest.mark.parametrize("mode", ["serial", "overlapped"])
@pytest.mark.parametrize("wiring", WIRINGS, ids=str)
def test_recomputation_repeats_the_forward_list_and_keeps_the_backward_list(
    wiring: Wiring, mode: str, length: int
) -> None:
    run = Run(wiring, mode, segments=even_segments(4, length), recompute=True)
    schedule, recorder = run.schedule, run.recorder
    again = [step for segment in reversed(schedule.segments) for step in schedule.of_segment(segment)]
    assert recorder.forward == [*schedule.forward, *again]
    assert recorder.backward == list(schedule.backward)


# -- with the fused ops of the stream

SOME_CALLED = (Norm(1, ATTENTION), Norm(2, MLP_NORM), Norm(3, ATTENTION), Norm(3, MLP_NORM))


@pytest.mark.parametrize("called", [(), SOME_CALLED], ids=["all", "some"])
@pytest.mark.parametrize("wiring", WIRINGS, ids=str)
def test_every_placement_gives_the_bits_of_serial_with_kernels(wiring: Wiring, called: Collection[Norm]) -> None:
    """A serial schedule updates both streams at once where an overlapped one has to do it in two."""
    serial = Run(wiring, "serial", kernels=True, called=called)
    serial.recorder.check(serial.schedule)
    for placement in placements():
        overlapped = Run(wiring, "overlapped", placement=placement, kernels=True, called=called)
        overlapped.assert_equal_bits(serial)
        overlapped.recorder.check(overlapped.schedule)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("wiring", WIRINGS, ids=str)
def test_segments_give_the_bits_of_serial_with_kernels(wiring: Wiring, recompute: bool) -> None:
    for length, chunks in ((1, 1), (2, 3), (3, 1)):
        cut = even_segments(4, length)
        serial, overlapped = (
            Run(wiring, mode, segments=cut, recompute=recompute, chunks=chunks, kernels=True)
            for mode in ("serial", "overlapped")
        )
        overlapped.assert_equal_bits(serial)


@pytest.mark.parametrize("expert_parallel", [False, True], ids=["local", "dispatched"])
@pytest.mark.parametrize("wiring", WIRINGS, ids=str)
def test_kernels_compute_what_plain_adds_and_norms_compute(wiring: Wiring, expert_parallel: bool) -> None:
    plain = Run(wiring, "serial", expert_parallel=expert_parallel)
    fused = Run(wiring, "overlapped", expert_parallel=expert_parallel, kernels=True)
    assert_close(plain, fused)
    assert fused.kernels.ops and not plain.kernels.ops


def test_which_ops_run() -> None:
    """Of four layers, the last of which leaves its sum to whoever comes behind it."""
    moe = {"mix": (MOE_SHARED,) * 4, "kernels": True}
    farskip = Wiring.named("farskip", 4)
    ops = {
        "overlapped": Run(farskip, "overlapped", **moe).kernels.ops,
        "serial": Run(farskip, "serial", **moe).kernels.ops,
        "local": Run(farskip, "overlapped", expert_parallel=False, **moe).kernels.ops,
        "ordinary": Run(Wiring.named("ordinary", 4), "overlapped", **moe).kernels.ops,
    }
    assert ops == {
        "overlapped": {"release_attention": 3, "release_router": 3, "by_use": 3, "rows": 3, "unsummed": 3},
        "serial": {"release_both": 3, "rows": 3},
        "local": {"release_both": 3},
        "ordinary": {"add_norm": 4, "release_router": 3, "rows": 3},
    }


REFERENCE_FORMS = [(False, False), (True, False), (False, True)]


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("wiring", WIRINGS, ids=str)
def test_rows_have_the_bits_of_merged_tokens(wiring: Wiring, recompute: bool) -> None:
    """Rows that come into the update, the gradient of rows that go out of it, and both, against neither."""
    settings: dict[str, Any] = {"kernels": True, "recompute": recompute}
    for mode in ("serial", "overlapped"):
        rows = Run(wiring, mode, **settings)
        for as_rows, by_use in REFERENCE_FORMS:
            other = Run(wiring, mode, as_rows=as_rows, by_use=by_use, **settings)
            rows.assert_equal_bits(other)
            assert as_rows or not other.kernels.ops["rows"]
            assert by_use or (not other.kernels.ops["by_use"] and not other.kernels.ops["unsummed"])


def test_rows_that_were_dropped() -> None:
    """With a capacity tokens lack rows, and rows have no token."""
    settings: dict[str, Any] = {"mix": (MOE_SHARED,) * 4, "kernels": True, "capacity": 1}
    rows = Run(Wiring.named("farskip", 4), "overlapped", **settings)
    assert rows.kernels.ops["rows"] == rows.kernels.ops["unsummed"] == 3
    rows.assert_equal_bits(Run(Wiring.named("farskip", 4), "serial", **settings))
    rows.assert_equal_bits(Run(Wiring.named("farskip", 4), "overlapped", as_rows=False, by_use=False, **settings))
    full = Run(Wiring.named("farskip", 4), "overlapped", mix=(MOE_SHARED,) * 4, kernels=True)
    assert not torch.equal(full.tensors["output"], rows.tensors["output"]), "nothing was dropped"


def test_rows_whose_weight_is_on_the_input() -> None:
    """They are weighted behind the copy, and come back without weights."""
    settings: dict[str, Any] = {"mix": (MOE_SHARED,) * 4, "kernels": True, "weight_on": WeightOn.INPUT}
    rows = Run(Wiring.named("farskip", 4), "overlapped", **settings)
    assert rows.kernels.ops["rows"] == rows.kernels.ops["unsummed"] == 3
    rows.assert_equal_bits(Run(Wiring.named("farskip", 4), "serial", **settings))
    rows.assert_equal_bits(Run(Wiring.named("farskip", 4), "overlapped", as_rows=False, by_use=False, **settings))


def test_chunks_are_merged() -> None:
    """Each has a map of its own."""
    ops = Run(Wiring.named("farskip", 4), "overlapped", mix=(MOE_SHARED,) * 4, kernels=True, chunks=2).kernels.ops
    assert ops == {"release_attention": 3, "release_router": 3}


def test_merge_does_nothing_where_rows_go_on() -> None:
    """Its place in the schedule stays; the copies it made are not made there."""
    merged: list[int] = []
    for as_rows in (True, False):
        layers = [toys.ToyBlocks(MOE_SHARED, seed) for seed in range(4)]
        dispatcher = AllToAllDispatcher(FakeLink(), EXPERTS)
        real = dispatcher.merge
        dispatcher.merge = lambda *a, real=real: (merged.append(1), real(*a))[1]  # type: ignore[method-assign]
        executor = Executor(layers, Wiring.named("farskip", 4), dispatcher=dispatcher)
        executor.stream_kernels = toys.ToyKernels(layers) if as_rows else None
        x = torch.randn(2, 3, WIDTH)
        executor.run_segment(executor.schedule(), Segment(0, 4), x, x, [{}] * 4)
        assert len(merged) == (1 if as_rows else 5), "what leaves a segment is a plain sum"


@pytest.mark.parametrize("mode", ["serial", "overlapped"])
@pytest.mark.parametrize("wiring", WIRINGS, ids=str)
def test_the_backward_of_an_op_lies_inside_the_stage_that_formed_it(wiring: Wiring, mode: str) -> None:
    """It holds the backward of the stage's norm: outside, its time would be nobody's. Not so, as with plain adds, where
    one sum is formed on the way to another (ladder behind a dense layer)."""
    layers = [toys.ToyBlocks(MOE_SHARED, seed) for seed in range(4)]
    executor = Executor(layers, wiring, dispatcher=AllToAllDispatcher(FakeLink(), EXPERTS), mode=mode)
    inside: list[str] = []
    formed: list[str] = []
    undone: list[str] = []

    class Watched(toys.ToyKernels):
        def weights(self, op: str, norms: tuple[Norm, ...]) -> list[torch.Tensor]:
            weights = [weight * 1 for weight in super().weights(op, norms)]
            formed.append(stage := str(inside[-1]))
            weights[0].register_hook(lambda _: undone.append(f"{stage} in {inside[-1] if inside else None}"))
            return weights

    def observe(instruction: Instruction, direction: str) -> Any:
        inside.append(str(instruction.key))
        return inside.pop

    executor.stream_kernels = Watched(layers)
    executor.observers.append(observe)
    x = torch.randn(2, 3, WIDTH, requires_grad=True)
    executor.run_segment(executor.schedule(), Segment(0, 4), x, x, [{}] * 4)[0].sum().backward()
    assert sorted(undone) == sorted(f"{stage} in {stage}" for stage in formed)


@pytest.mark.parametrize("kernels", [False, True], ids=["plain", "kernels"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("wiring", WIRINGS, ids=str)
def test_whatever_begins_also_ends_before_the_next_begins(wiring: Wiring, recompute: bool, kernels: bool) -> None:
    """Profiler ranges that never end, or overlap, would make a trace unreadable. A recomputation is nested in the
    stage of the backward pass that first asked for it."""
    layers = [toys.ToyBlocks(blocks, seed) for seed, blocks in enumerate(MIX)]
    executor = Executor(layers, wiring, dispatcher=AllToAllDispatcher(FakeLink(), EXPERTS))
    executor.stream_kernels = toys.ToyKernels(layers) if kernels else None
    open_now: list[tuple[Instruction, str]] = []
    counts = {"begun": 0, "ended": 0}

    def observe(instruction: Instruction, direction: str) -> Any:
        nested = recompute and direction == "forward" and [way for _, way in open_now] == ["backward"]
        assert not open_now or nested, f"{instruction} begins inside {open_now}"
        open_now.append((instruction, direction))
        counts["begun"] += 1

        def end() -> None:
            assert open_now.pop() == (instruction, direction)
            counts["ended"] += 1

        return end

    executor.observers.append(observe)
    x = torch.randn(2, 3, WIDTH, requires_grad=True)
    out, _ = executor.run_segment(executor.schedule(), Segment(0, 4), x, x, [{}] * 4, recompute=recompute)
    out.sum().backward()
    num_steps = len(executor.schedule().forward)
    assert counts == dict.fromkeys(counts, num_steps * (3 if recompute else 2)) and not open_now


@pytest.mark.parametrize("wiring", WIRINGS, ids=str)
def test_recomputation_changes_no_bit(wiring: Wiring) -> None:
    for mode in ("serial", "overlapped"):
        segments = even_segments(4, 2)
        Run(wiring, mode, segments=segments, recompute=True).assert_equal_bits(Run(wiring, mode, segments=segments))


@pytest.mark.parametrize("seed", range(4))
def test_the_delays_of_the_link_change_no_bit(seed: int) -> None:
    for wiring in WIRINGS:
        late = Run(wiring, "overlapped")
        Run(wiring, "overlapped", delay=random_delay(seed)).assert_equal_bits(late)


@pytest.mark.parametrize("kernels", [False, True], ids=["plain", "kernels"])
@pytest.mark.parametrize("wiring", WIRINGS, ids=str)
def test_observers_change_no_bit(wiring: Wiring, kernels: bool) -> None:
    watched = Run(wiring, "overlapped", kernels=kernels)
    watched.assert_equal_bits(Run(wiring, "overlapped", observe=False, kernels=kernels))


@pytest.mark.parametrize("wiring", WIRINGS, ids=str)
def test_dispatch_computes_what_local_experts_compute(wiring: Wiring) -> None:
    """Tolerance: DESIGN.md 4; sums of K rows are formed in another order, and matrix products of other heights."""
    local = Run(wiring, "serial", expert_parallel=False)
    for chunks in (1, 2, 5, 9):  # six tokens: uneven chunks, and empty ones
        assert_close(local, Run(wiring, "overlapped", chunks=chunks))


def assert_close(local: Run, dispatched: Run) -> None:
    assert local.tensors.keys() == dispatched.tensors.keys()
    for name, expected in local.tensors.items():
        actual = dispatched.tensors[name]
        assert actual is not None and expected is not None
        assert float((actual - expected).norm()) <= 1e-4 * float(expected.norm()), name


def test_an_attention_that_misses_the_seam_is_refused() -> None:
    layers = [toys.ToyBlocks(MOE, 0)]
    layers[0].attention = lambda normed_BSD, seam, arguments: normed_BSD  # type: ignore[method-assign, assignment]
    executor = Executor(layers, Wiring.named("farskip", 1), mode="serial")
    x = torch.randn(1, 2, WIDTH)
    with pytest.raises(RuntimeError, match="layer 0: attention called the seam 0 times instead of once"):
        executor.run_segment(executor.schedule(), Segment(0, 1), x, x, [{}])


def test_an_unknown_mode_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="schedule 'parallel' is unknown"):
        Executor([toys.ToyBlocks(MOE, 0)], Wiring.named("farskip", 1), mode="parallel")


def test_the_recorder_names_the_first_step_that_differs() -> None:
    run = Run(Wiring.named("farskip", 4), "overlapped")
    run.recorder.backward[3], run.recorder.backward[4] = run.recorder.backward[4], run.recorder.backward[3]
    with pytest.raises(RuntimeError, match=r"backward step 3: scheduled .*, executed"):
        run.recorder.check(run.schedule)
    run.recorder.backward.pop()
    run.recorder.backward[3], run.recorder.backward[4] = run.recorder.backward[4], run.recorder.backward[3]
    with pytest.raises(RuntimeError, match=r"backward: scheduled \d+ steps, executed \d+"):
        run.recorder.check(run.schedule)


def test_wirings_differ_where_they_should() -> None:
    """The comparisons above would pass on an executor that ignores the wiring."""
    outputs = [Run(wiring, "serial").tensors["output"] for wiring in WIRINGS]
    for first, second in itertools.combinations(outputs, 2):
        assert first is not None and second is not None and not torch.allclose(first, second, atol=1e-3)


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("mode", ["serial", "overlapped"])
@pytest.mark.parametrize("wiring", WIRINGS, ids=str)
def test_exchanges_are_under_way_exactly_while_the_schedule_says_so(wiring: Wiring, mode: str, chunks: int) -> None:
    """In backward too: one that waited as soon as it had launched would give the same bits and hide nothing."""
    layers = [toys.ToyBlocks(blocks, seed) for seed, blocks in enumerate(MIX)]
    link = FakeLink(at_wait)
    executor = Executor(layers, wiring, dispatcher=AllToAllDispatcher(link, EXPERTS, chunks), mode=mode)
    seen: dict[str, list[int]] = {"forward": [], "backward": []}

    def observe(instruction: Instruction, direction: str) -> Any:
        seen[direction].append(len(link.in_flight))
        return lambda: None

    executor.observers.append(observe)
    schedule = executor.schedule()
    x = torch.randn(2, 3, WIDTH, requires_grad=True)
    executor.run_segment(schedule, Segment(0, 4), x, x, [{}] * 4)[0].sum().backward()
    for direction, steps in (("forward", schedule.forward), ("backward", schedule.backward)):
        changes = {Do.LAUNCH: 1, Do.WAIT: -1, Do.RUN: 0}
        expected = list(itertools.accumulate((changes[step.do] for step in steps), initial=0))[:-1]
        assert seen[direction] == expected, direction
