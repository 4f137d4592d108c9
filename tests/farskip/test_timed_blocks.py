"""Sleeping sub-blocks: how long they sleep, in both directions, and that a row in the wrong place shows."""

import time

import pytest
import torch

from farskip.executor import Executor
from farskip.parallel.dispatcher import AllToAllDispatcher
from farskip.parallel.testing_links import FakeLink
from farskip.schedule import Segment
from farskip.timed_blocks import SleepingSubBlocks, SleepTimes
from farskip.wiring import Wiring

LAYERS, HIDDEN, EXPERTS, TOP_K = 3, 8, 4, 2
SHAPE = (2, 6, HIDDEN)
ROWS = SHAPE[0] * SHAPE[1] * TOP_K


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Milliseconds of every sleep, which takes no time."""
    seen: list[float] = []
    monkeypatch.setattr(time, "sleep", lambda seconds: seen.append(round(1e3 * seconds, 6)))
    return seen


def blocks(attention: float = 16, shared: float = 8, experts: float = 4) -> list[SleepingSubBlocks]:
    times = SleepTimes(attention=attention, shared=shared, experts=experts, rows=ROWS)
    return [SleepingSubBlocks(HIDDEN, EXPERTS, TOP_K, times, rank=0, size=1, seed=seed) for seed in range(LAYERS)]


def run(executor: Executor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    x_BSD = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), requires_grad=False)
    x_BSD.requires_grad_()
    output_BSD, _ = executor.run_segment(executor.schedule(), Segment(0, LAYERS), x_BSD, x_BSD, [{}] * LAYERS)
    output_BSD.square().sum().backward()
    parameters = [parameter for block in executor.sub_blocks for parameter in block.parameters()]  # type: ignore[attr-defined]
    return output_BSD.detach(), [parameter.grad for parameter in parameters]


def test_a_layer_sleeps_its_times_and_twice_that_in_backward(slept: list[float]) -> None:
    executor = Executor(
        blocks(), Wiring.named("ordinary", LAYERS), dispatcher=AllToAllDispatcher(FakeLink(), EXPERTS), mode="serial"
    )
    run(executor)
    forward, backward = slept[: 4 * LAYERS], slept[4 * LAYERS :]
    assert sorted(forward) == sorted([8.0, 8.0, 8.0, 4.0] * LAYERS)  # attention in two halves, shared, experts
    assert sorted(backward) == sorted(2 * ms for ms in forward)


def test_experts_sleep_in_proportion_to_their_rows(slept: list[float]) -> None:
    block = blocks()[0]
    block.expert_rows(torch.zeros(ROWS // 4, HIDDEN), torch.zeros(ROWS // 4, dtype=torch.int64))
    assert slept == [1.0]


@pytest.mark.parametrize("wiring", ["ordinary", "farskip"])
def test_dispatched_equals_whole_and_overlapped_equals_serial(wiring: str, slept: list[float]) -> None:
    def executor(mode: str, dispatched: bool) -> Executor:
        dispatcher = AllToAllDispatcher(FakeLink(), EXPERTS) if dispatched else None
        return Executor(blocks(), Wiring.named(wiring, LAYERS), dispatcher=dispatcher, mode=mode)

    serial, serial_gradients = run(executor("serial", True))
    overlapped, gradients = run(executor("overlapped", True))
    assert torch.equal(serial, overlapped)
    assert all(torch.equal(a, b) for a, b in zip(gradients, serial_gradients, strict=True))
    whole, _ = run(executor("serial", False))
    torch.testing.assert_close(whole, serial)


def test_a_row_with_the_wrong_expert_changes_the_result(slept: list[float]) -> None:
    block, rows = blocks()[0], torch.ones(2, HIDDEN)
    one, other = (block.expert_rows(rows, torch.tensor(experts)) for experts in ([0, 1], [1, 0]))
    assert not torch.allclose(one, other)


def test_slices_of_the_experts_make_up_the_whole() -> None:
    times = SleepTimes(attention=0, shared=0, experts=0, rows=1)
    parts = [SleepingSubBlocks(HIDDEN, EXPERTS, TOP_K, times, rank=rank, size=2, seed=5) for rank in range(2)]
    whole = SleepingSubBlocks(HIDDEN, EXPERTS, TOP_K, times, rank=0, size=1, seed=5)
    assert torch.equal(torch.cat([part.expert_E for part in parts]), whole.expert_E)
    assert torch.equal(parts[1].gate_ED, whole.gate_ED)
