"""Rewiring in stages, beside training: from a configuration to `WiringStages`, and from them to the model's wiring."""

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from farskip.launch.config import WiringConfig
from farskip.metrics import StepReport
from farskip.models.surgery import rewire, wiring_of
from farskip.wiring import Wiring
from farskip.wiring_stages import WiringStages


def stages_of(config: WiringConfig, start: Wiring, wiring: Wiring, num_steps: int) -> WiringStages | None:
    """The stages that a configuration asks for; None where all layers are rewired at once.

    Args:
        config: says how many layers and steps.
        start: of the model as it was given, before the first stage.
        wiring: of the whole model, at the end.
        num_steps: optimizer steps of the run.

    Raises:
        ValueError: one of the two settings without the other, no layer to rewire, or steps that end before the last
            stage begins.
    """
    if config.stage_layers == config.stage_steps == 0:
        return None
    for key, value in (("stage_layers", config.stage_layers), ("stage_steps", config.stage_steps)):
        if value < 1:
            raise ValueError(
                f"wiring.{key}={value}: stages need at least 1 layer and 1 step each; set both wiring.stage_layers and "
                "wiring.stage_steps, or neither"
            )
    stages = WiringStages(start=start, wiring=wiring, layers=config.stage_layers, steps=config.stage_steps)
    if not stages.changed_layers:
        raise ValueError(
            f"wiring.stage_layers={config.stage_layers} with wiring.name={config.name}: no layer is to be rewired; "
            "choose another wiring, or leave out wiring.stage_layers and wiring.stage_steps"
        )
    if stages.last_begins > num_steps:
        raise ValueError(
            f"wiring.stage_steps={config.stage_steps}: the last of {stages.num_stages} stages would begin at step "
            f"{stages.last_begins}, training.num_steps={num_steps} end before; fewer steps per stage, or more layers"
        )
    return stages


class StagedRewiring:
    """Gives a model the wiring of each coming step. A context manager around training, called after every step.

    When it is left the model has the whole wiring, however training ended.

    Args:
        model: rewired, spread or not.
        stages: what it takes on.
        first_step: of this run, from 1 on; later than that where it is resumed.
        say: called with a line whenever the wiring changes.
    """

    def __init__(self, model: Any, stages: WiringStages, *, first_step: int, say: Callable[[str], None]) -> None:
        self._model, self._stages, self._first_step, self._say = model, stages, first_step, say

    def __enter__(self) -> Self:
        self._become(self._stages.at(self._first_step), f"step {self._first_step}")
        return self

    def __call__(self, report: StepReport) -> None:
        """After a step: the wiring of the next one."""
        self._become(self._stages.at(report.step + 1), f"step {report.step + 1}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._stages.wiring != wiring_of(self._model):  # asked to stop, or failed: the run goes on in its stage
            rewire(self._model, self._stages.wiring)

    def _become(self, wiring: Wiring, when: str) -> None:
        if wiring != wiring_of(self._model):
            rewire(self._model, wiring)
            self._say(f"{when}: {wiring}")
