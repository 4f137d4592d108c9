"""The executor under tensor parallelism on toy sub-blocks, over a link of one rank that is late and poisons.

One rank's partial outputs are whole, so the function is that of the plain executor; sums over several ranks are
tested in tests/models/test_tensor_parallel.py.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from farskip.executor import Executor
from farskip.parallel.dispatcher import AllToAllDispatcher
from farskip.parallel.tensor_parallel import TensorParallelRanks
from farskip.parallel.testing_links import Delay, FakeLink, at_wait, random_delay
from farskip.recorder import Recorder
from farskip.schedule import Do, Instruction, Segment, build_schedule, even_segments
from farskip.simulator import placements_beside_reductions
from farskip.testing import assert_close, load_beside
from farskip.wiring import DENSE, MOE_SHARED, LayerBlocks, Wiring

toys = load_beside(__file__, "toy_layers")
WIDTH, EXPERTS, MIX, ToyBlocks = toys.WIDTH, toys.EXPERTS, toys.MIX, toys.ToyBlocks

WIRINGS = {name: Wiring.named(name, 4) for name in toys.NAMES} | {
    "hybrid": Wiring.named("ladder", 4, [1, 2]),
    "sc_moe": toys.SC_MOE,
}
MIXES = {"dense": (DENSE,) * 4, "moe": (MOE_SHARED,) * 4, "mixed": MIX}


class Run:
    """One forward and backward pass, and everything that can be compared."""

    def __init__(
        self,
        wiring: str,
        mix: str,
        mode: str,
        *,
        tensor_parallel: bool = True,
        expert_parallel: bool = False,
        segment_layers: int = 4,
        recompute: bool = False,
        placement: Any = None,
        delay: Delay = at_wait,
        observers: Sequence[Any] = (),
    ) -> None:
        chosen: tuple[LayerBlocks, ...] = MIXES[mix]
        layers = [ToyBlocks(blocks, seed) for seed, blocks in enumerate(chosen)]
        self.link, self.tensor_link, self.recorder = FakeLink(delay), FakeLink(delay), Recorder()
        self.executor = Executor(
            layers,
            WIRINGS[wiring],
            dispatcher=AllToAllDispatcher(self.link, EXPERTS) if expert_parallel else None,
            tensor_parallel=TensorParallelRanks(self.tensor_link) if tensor_parallel else None,
            mode=mode,
        )
        self.executor.observers += [self.recorder, *observers]
        segments = even_segments(4, segment_layers)
        if placement is not None:
            self.executor.set_schedule(
                build_schedule(self.executor.graph, mode, segments=segments, placement=placement)
            )
        self.schedule = self.executor.schedule(segments)
        self.tensors = toys.passed_through(self.executor, self.schedule, layers, recompute=recompute)
        for link in (self.link, self.tensor_link):
            assert not link.in_flight and not link.lost

    def assert_equal_bits(self, other: "Run") -> None:
        toys.assert_equal_bits(self.tensors, other.tensors)


def both(wiring: str, mix: str, **settings: Any) -> tuple[Run, Run]:
    return Run(wiring, mix, "serial", **settings), Run(wiring, mix, "overlapped", **settings)


@pytest.mark.parametrize("expert_parallel", [False, True], ids=["whole", "dispatched"])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("wiring", WIRINGS)
def test_serial_overlapped_and_the_plain_executor_agree(wiring: str, mix: str, expert_parallel: bool) -> None:
    serial, overlapped = both(wiring, mix, expert_parallel=expert_parallel)
    overlapped.assert_equal_bits(serial)
    for run in (serial, overlapped):
        run.recorder.check(run.schedule)
        assert run.tensor_link.num_exchanges
    plain = Run(wiring, mix, "serial", tensor_parallel=False, expert_parallel=expert_parallel)
    # fp32 sums in another bracketing: outputs of a group are added before the stream
    assert_close(overlapped.tensors, plain.tensors, rel_norm=1e-4)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("wiring", WIRINGS)
def test_segments_give_the_bits_of_serial(wiring: str, length: int, recompute: bool) -> None:
    serial, overlapped = both(wiring, "mixed", expert_parallel=True, segment_layers=length, recompute=recompute)
    overlapped.assert_equal_bits(serial)
    for run in (serial, overlapped):
        assert run.recorder.backward == list(run.schedule.backward)


@pytest.mark.parametrize("wiring", ["farskip", "ladder", "sc_moe"])
def test_every_placement_gives_the_bits_of_serial(wiring: str) -> None:
    serial = Run(wiring, "moe", "serial", expert_parallel=True)
    for placement in placements_beside_reductions(serial.executor.graph):
        run = Run(wiring, "moe", "overlapped", expert_parallel=True, placement=placement)
        run.assert_equal_bits(serial)
        run.recorder.check(run.schedule)


@pytest.mark.parametrize("wiring", ["farskip", "ladder"])
def test_delays_change_no_bit(wiring: str) -> None:
    expected = Run(wiring, "moe", "serial", expert_parallel=True)
    for delay in (lambda: 0, random_delay(0), random_delay(1)):
        Run(wiring, "moe", "overlapped", expert_parallel=True, delay=delay).assert_equal_bits(expected)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("mode", ["serial", "overlapped"])
@pytest.mark.parametrize("wiring", ["ordinary", "ladder"])
def test_all_reduces_are_under_way_exactly_while_the_schedule_says_so(wiring: str, mode: str, direction: str) -> None:
    runs: list[Run] = []
    seen: list[tuple[str, int]] = []

    class Watch:
        """How much is in flight when a stage begins."""

        def __call__(self, instruction: Instruction, way: str) -> Any:
            if instruction.do is Do.RUN and way == direction:
                seen.append((str(instruction.key), len(links[0].in_flight)))
            return lambda: None

    links: list[FakeLink] = []
    original = TensorParallelRanks.__init__

    def remember(self: TensorParallelRanks, link: FakeLink) -> None:
        links.append(link)
        original(self, link)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TensorParallelRanks, "__init__", remember)
        runs.append(Run(wiring, "dense", mode, observers=[Watch()]))
    flying, expected = 0, []
    for step in getattr(runs[0].schedule, direction):
        flying += {Do.LAUNCH: 1, Do.WAIT: -1, Do.RUN: 0}[step.do]
        if step.do is Do.RUN:
            expected.append((str(step.key), flying))
    assert seen == expected
    assert (max(count for _, count in seen) > 0) == (wiring == "ladder" and mode == "overlapped")


def test_the_stream_is_let_go_point_by_point() -> None:
    """Without gradients no more than a few points of the stream are alive at a time, however many layers there are."""
    layers = [ToyBlocks(DENSE, seed) for seed in range(8)]
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def watch(instruction: Instruction, direction: str) -> Any:
        nonlocal most
        most = max(most, sum(reference() is not None for reference in alive))
        return lambda: None

    executor = Executor(
        layers, Wiring.named("ladder", 8), tensor_parallel=TensorParallelRanks(FakeLink(at_wait)), mode="overlapped"
    )
    executor.observers.append(watch)
    original = torch.empty_like

    def remember(*arguments: Any, **keywords: Any) -> torch.Tensor:
        made = original(*arguments, **keywords)
        alive.append(weakref.ref(made))
        return made

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch, "empty_like", remember)
        executor.run_segment(
            executor.schedule(), Segment(0, 8), torch.ones(1, 2, WIDTH), torch.ones(1, 2, WIDTH), [{}] * 8
        )
    assert len(alive) == 16 and most <= 4


def test_the_routed_experts_of_a_rank_take_its_share_of_the_tokens() -> None:
    """Three ranks of a five-token batch: one, two and two tokens; zero for the tokens of the others."""
    layer, stream = ToyBlocks(MOE_SHARED, 0), torch.randn(1, 5, WIDTH, generator=torch.Generator().manual_seed(0))
    whole: list[torch.Tensor] = []
    for size in (1, 3):
        parts = []
        for rank in range(size):
            ranks = TensorParallelRanks(FakeLink(lambda: 0))
            ranks.rank, ranks.size = rank, size
            executor = Executor([layer], Wiring.named("ordinary", 1), tensor_parallel=ranks, mode="serial")
            rows: list[int] = []

            def count(layer: int, routing: Any, recomputing: bool, rows: list[int] = rows) -> Any:
                rows.append(routing.experts_TK.shape[0])
                return routing

            executor.routing_hook = count
            run: list[torch.Tensor] = []
            layer.mlp_norm = lambda stream: stream  # attention is not summed here, so the routed part alone counts
            layer.attention = lambda normed, seam, arguments: seam(normed, normed, normed)[0] * 0.0
            layer.shared = lambda normed: normed * 0.0
            output, _ = executor.run_segment(executor.schedule(), Segment(0, 1), stream, stream, [{}])
            run.append(output - stream)
            assert rows == [5 * (rank + 1) // size - 5 * rank // size]
            parts.append(run[0])
        whole.append(sum(parts[1:], parts[0]))
        if size == 3:
            assert not parts[0][:, 1:].any() and not parts[1][:, 0].any()
    assert_close(whole[1], whole[0], max_error=1e-5)
