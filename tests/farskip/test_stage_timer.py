"""The stage timer: medians by kind of stage and direction, and chunks as the simulator takes them."""

import pytest
import torch

from farskip.instruction import Do, Instruction
from farskip.simulator import simulate
from farskip.stage_graph import Key
from farskip.stage_timer import StageTimer


class Clock:
    """Seconds that only pass when they are told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def observe(timer: StageTimer, clock: Clock, steps: list[tuple[Instruction, float]], direction: str) -> None:
    for instruction, seconds in steps:
        ended = timer(instruction, direction)
        clock.now += seconds
        ended()


def step(do: Do, stage: str, chunk: int = 0, layer: int = 0) -> Instruction:
    return Instruction(do, Key(layer, stage, chunk))


def test_medians_by_kind_and_direction() -> None:
    clock = Clock()
    timer = StageTimer("cpu", clock)
    for seconds in (1.0, 2.0, 9.0):
        observe(timer, clock, [(step(Do.RUN, "mlp"), seconds)], "forward")
    exchange = [(step(Do.LAUNCH, "dispatch"), 1.0), (step(Do.RUN, "mlp"), 5.0), (step(Do.WAIT, "dispatch"), 2.0)]
    observe(timer, clock, exchange, "backward")
    times = timer.times()
    assert times.forward == {"mlp": 2000.0}
    assert times.backward == {"mlp": 5000.0, "dispatch": 8000.0}


def test_all_chunks_together_take_what_each_of_them_took() -> None:
    clock = Clock()
    timer = StageTimer("cpu", clock)
    steps = [
        each
        for chunk in range(2)
        for each in (
            (step(Do.LAUNCH, "gather_mlp", chunk), 0.0),
            (step(Do.WAIT, "gather_mlp", chunk), 3.0),
            (step(Do.RUN, "mlp", chunk), 4.0),
        )
    ]
    observe(timer, clock, [(step(Do.RUN, "mlp_norm"), 1.0), *steps], "forward")
    times = timer.times()
    assert times.forward == {"mlp_norm": 1000.0, "gather_mlp": 6000.0, "mlp": 8000.0}
    total = simulate([instruction for instruction, _ in [(step(Do.RUN, "mlp_norm"), 1.0), *steps]], times).total
    assert total == pytest.approx(1e3 * clock.now)


@pytest.mark.parametrize(("device", "synchronized"), [("cpu", []), ("cuda:1", [torch.device("cuda:1")] * 4)])
def test_waits_for_the_device_that_computes(
    device: str, synchronized: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And for none where ranks compute on CPU beside a GPU that somebody else may use."""
    seen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: seen.append(device))
    clock = Clock()
    steps = [(step(Do.LAUNCH, "dispatch"), 1.0), (step(Do.RUN, "mlp"), 1.0)]
    observe(StageTimer(device, clock), clock, steps, "forward")
    assert seen == synchronized


def test_nothing_seen_is_an_error() -> None:
    with pytest.raises(ValueError, match="stage times: nothing was observed"):
        StageTimer("cpu").times()
