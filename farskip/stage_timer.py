"""Measure how long the stages of a model take, so that the schedule can be chosen by them.

An observer of the executor. It is meant for a short warm-up with the serial schedule, where nothing runs beside
anything else: a stage's time is then its own, and a collective's time is that from its launch to the end of its wait.
On CUDA it synchronizes the device around every instruction; take it off again before training.
"""

import statistics
import time
from collections.abc import Callable

import torch

from farskip.async_autograd import Ended
from farskip.schedule import Do, Instruction
from farskip.simulator import StageTimes
from farskip.stage_graph import Key


class StageTimer:
    """Collects the duration of every instruction, in both directions.

    Args:
        device: on which the stages compute.
        clock: seconds; replaced in tests.
    """

    def __init__(self, device: torch.device | str, clock: Callable[[], float] = time.perf_counter) -> None:
        self._device = torch.device(device)
        self._clock = clock
        self._seconds: dict[tuple[str, str], list[float]] = {}
        self._launched: dict[tuple[str, Key], float] = {}
        self._chunks: dict[str, int] = {}

    def __call__(self, instruction: Instruction, direction: str) -> Ended:
        """See `farskip.executor.Observer`."""
        self._synchronize()
        start = self._clock()
        key = instruction.key
        self._chunks[key.stage] = max(self._chunks.get(key.stage, 1), 1 + key.chunk)
        if instruction.do is Do.LAUNCH:
            self._launched[direction, key] = start
            return self._synchronize
        if instruction.do is Do.WAIT:
            start = self._launched.pop((direction, key))

        def end() -> None:
            self._synchronize()
            self._seconds.setdefault((key.stage, direction), []).append(self._clock() - start)

        return end

    def times(self) -> StageTimes:
        """Median milliseconds of every stage and collective seen, per kind of stage over all layers and steps; all
        chunks together, as the simulator takes them.

        Raises:
            ValueError: nothing was observed in forward.
        """
        medians = {
            (stage, direction): 1e3 * self._chunks[stage] * statistics.median(values)
            for (stage, direction), values in self._seconds.items()
        }
        forward = {stage: value for (stage, direction), value in medians.items() if direction == "forward"}
        if not forward:
            raise ValueError("stage times: nothing was observed; run a step with the timer among executor.observers")
        backward = {stage: value for (stage, direction), value in medians.items() if direction == "backward"}
        return StageTimes(forward=forward, backward=backward)

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
