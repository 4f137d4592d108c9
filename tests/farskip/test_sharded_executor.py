"""The executor under sequence parallelism on toy sub-blocks, over a link of one rank that is late and poisons.

One rank holds all tokens, so the function is that of the plain executor; shares of several ranks are tested in
tests/models/test_sequence_parallel.py.
"""

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from farskip.executor import Executor, Observer
from farskip.parallel.dispatcher import AllToAllDispatcher
from farskip.parallel.tensor_parallel import TensorParallelRanks
from farskip.parallel.testing_links import Delay, FakeLink, at_wait, random_delay
from farskip.recorder import Recorder, check_order
from farskip.schedule import Do, Instruction, even_segments
from farskip.simulator import StageTimes
from farskip.testing import assert_close, load_beside, poison_empty
from farskip.wiring import DENSE, MOE, MOE_SHARED, LayerBlocks, Wiring

toys = load_beside(__file__, "toy_layers")
WIDTH, EXPERTS, ToyBlocks = toys.WIDTH, toys.EXPERTS, toys.ToyBlocks
WIRINGS = {name: Wiring.named(name, 4) for name in toys.NAMES} | {
    "hybrid": Wiring.named("ladder", 4, [1, 2]),
    "shared_reads_all": toys.SHARED_READS_ALL,
}
MIXES = {"dense": (DENSE,) * 4, "mixed": (DENSE, MOE_SHARED, MOE, MOE_SHARED)}
WAYS = [("dense", False, 1), ("dense", False, 3), ("mixed", False, 2), ("mixed", True, 1), ("mixed", True, 3)]
"""Sub-blocks, whether rows are dispatched, chunks."""


class Run:
    """One forward and backward pass, and everything that can be compared."""

    def __init__(
        self,
        wiring: str,
        mix: str,
        mode: str,
        *,
        sequence_parallel: bool = True,
        expert_parallel: bool = False,
        chunks: int = 2,
        segment_layers: int = 4,
        recompute: bool = False,
        times: StageTimes | None = None,
        delay: Delay = at_wait,
        watch: Callable[[Sequence[FakeLink]], Observer] | None = None,
        kernels: bool = False,
    ) -> None:
        chosen: tuple[LayerBlocks, ...] = MIXES[mix]
        layers = [ToyBlocks(blocks, seed) for seed, blocks in enumerate(chosen)]
        self.links, self.recorder = (FakeLink(delay), FakeLink(delay)), Recorder()
        ranks = TensorParallelRanks(self.links[1], sequence_parallel=True, chunks=chunks)
        self.executor = Executor(
            layers,
            WIRINGS[wiring],
            dispatcher=AllToAllDispatcher(self.links[0], EXPERTS, chunks) if expert_parallel else None,
            tensor_parallel=ranks if sequence_parallel else None,
            mode=mode,
            times=times,
        )
        self.kernels = toys.ToyKernels(layers)
        self.executor.stream_kernels = self.kernels if kernels else None
        self.executor.observers += [self.recorder, *([watch(self.links)] if watch else [])]
        self.schedule = self.executor.schedule(even_segments(4, segment_layers))
        with poison_empty():
            self.tensors = toys.passed_through(self.executor, self.schedule, layers, tokens=5, recompute=recompute)
        assert not any(link.in_flight or link.lost for link in self.links)

    def assert_equal_bits(self, other: "Run") -> None:
        toys.assert_equal_bits(self.tensors, other.tensors)


def both(wiring: str, mix: str, **settings: Any) -> tuple[Run, Run]:
    return Run(wiring, mix, "serial", **settings), Run(wiring, mix, "overlapped", **settings)


@pytest.mark.parametrize(("mix", "expert_parallel", "chunks"), WAYS)
@pytest.mark.parametrize("wiring", WIRINGS)
def test_serial_overlapped_and_the_plain_executor_agree(
    wiring: str, mix: str, expert_parallel: bool, chunks: int
) -> None:
    serial, overlapped = both(wiring, mix, expert_parallel=expert_parallel, chunks=chunks)
    overlapped.assert_equal_bits(serial)
    for run in (serial, overlapped):
        run.recorder.check(run.schedule)
        check_order(run.recorder.forward, run.executor.graph)
    plain = Run(wiring, mix, "serial", sequence_parallel=False, expert_parallel=expert_parallel, chunks=chunks)
    # fp32: matrix products of other heights
    assert_close(overlapped.tensors, plain.tensors, rel_norm=1e-4)


@pytest.mark.parametrize(("mix", "expert_parallel", "chunks"), WAYS)
@pytest.mark.parametrize("wiring", WIRINGS)
def test_the_stream_may_be_formed_with_its_norms(wiring: str, mix: str, expert_parallel: bool, chunks: int) -> None:
    """A serial list updates both streams at once where routed outputs land in front of the norm of attention."""
    settings: dict[str, Any] = {"expert_parallel": expert_parallel, "chunks": chunks, "kernels": True}
    serial, overlapped = both(wiring, mix, **settings)
    overlapped.assert_equal_bits(serial)
    for run in (serial, overlapped):
        run.recorder.check(run.schedule)
        assert run.kernels.ops
    plain = Run(wiring, mix, "overlapped", expert_parallel=expert_parallel, chunks=chunks)
    assert_close(overlapped.tensors, plain.tensors, rel_norm=1e-4)  # fp32, sums of another order inside the ops


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("wiring", ["farskip", "ladder", "hybrid"])
def test_segments_give_the_bits_of_serial(wiring: str, length: int, recompute: bool) -> None:
    serial, overlapped = both(wiring, "mixed", expert_parallel=True, segment_layers=length, recompute=recompute)
    overlapped.assert_equal_bits(serial)
    for run in (serial, overlapped):
        assert run.recorder.backward == list(run.schedule.backward)
    if recompute:
        overlapped.assert_equal_bits(Run(wiring, "mixed", "overlapped", expert_parallel=True, segment_layers=length))


def random_times(seed: int) -> StageTimes:
    draw = random.Random(seed)
    return StageTimes(forward={stage: draw.uniform(0.0, 3.0) for stage in StageTimes().forward})


@pytest.mark.parametrize(
    ("kernels", "chunks"), [(False, 2), (True, 2), (True, 1)], ids=["plain", "kernels", "kernels-rows"]
)
@pytest.mark.parametrize("wiring", ["farskip", "ladder", "shared_reads_all"])
def test_no_list_and_no_delay_changes_a_bit(wiring: str, kernels: bool, chunks: int) -> None:
    """Lists for stages and links of any speed, over links that are early, late or in between."""
    chosen: dict[str, Any] = {"expert_parallel": True, "kernels": kernels, "chunks": chunks}
    expected, lists = Run(wiring, "mixed", "serial", **chosen), set()
    delays = itertools.cycle([lambda: 0, random_delay(0), at_wait, random_delay(1)])
    for seed, delay in zip(range(8), delays, strict=False):
        times = random_times(seed)
        run = Run(wiring, "mixed", "overlapped", times=times, delay=delay, **chosen)
        run.assert_equal_bits(expected)
        run.recorder.check(run.schedule)
        lists.add(run.schedule.forward)
    assert len(lists) > min(chunks, 2), "the lists are too much alike"
    assert bool(expected.kernels.ops["rows"]) == (kernels and chunks == 1)


@pytest.mark.parametrize("mode", ["serial", "overlapped"])
@pytest.mark.parametrize("wiring", ["ladder", "farskip"])
def test_collectives_are_under_way_exactly_while_the_schedule_says_so(wiring: str, mode: str) -> None:
    """In backward too: one that waited as soon as it had launched would give the same bits and hide nothing."""
    seen: dict[str, list[int]] = {"forward": [], "backward": []}

    def watch(links: Sequence[FakeLink]) -> Observer:
        def observe(instruction: Instruction, direction: str) -> Any:
            seen[direction].append(sum(len(link.in_flight) for link in links))
            return lambda: None

        return observe

    run = Run(wiring, "mixed", mode, expert_parallel=True, watch=watch)
    changes = {Do.LAUNCH: 1, Do.WAIT: -1, Do.RUN: 0}
    for direction, steps in (("forward", run.schedule.forward), ("backward", run.schedule.backward)):
        expected = list(itertools.accumulate((changes[step.do] for step in steps), initial=0))[:-1]
        assert seen[direction] == expected, direction
