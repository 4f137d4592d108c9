"""A wiring that a model takes on in stages: some layers, then some more, from the last layer to the first. No torch.

    steps          1 .. 40        41 .. 80        81 .. end
    8 layers, 3    last 3         last 6          all 8

Every stage is a wiring like any other, `farskip.wiring.Wiring`; layers whose turn has not come are as they were. Which
one a step has depends on its number alone, so a run that is resumed goes on in the stage it was in.
"""

import math
from dataclasses import dataclass

from farskip.wiring import Wiring


@dataclass(frozen=True, kw_only=True, slots=True)
class WiringStages:
    """The stages on the way from one wiring of a model to another.

    Attributes:
        start: of the model before the first stage.
        wiring: of the last stage.
        layers: how many of the layers that differ each stage changes.
        steps: optimizer steps per stage; the last one lasts to the end.

    Raises:
        ValueError: no layer, or no step, or wirings of different numbers of layers.
    """

    start: Wiring
    wiring: Wiring
    layers: int
    steps: int

    def __post_init__(self) -> None:
        for name, value in (("layers", self.layers), ("steps", self.steps)):
            if value < 1:
                raise ValueError(f"stages of a wiring: {name}={value} is too small; use at least 1")
        if self.start.num_layers != self.wiring.num_layers:
            raise ValueError(
                f"stages of a wiring: start has {self.start.num_layers} layers and wiring {self.wiring.num_layers}; "
                "give two wirings of one model"
            )

    @property
    def changed_layers(self) -> tuple[int, ...]:
        """The layers that are wired otherwise at the end than at the start."""
        pairs = zip(self.start.layers, self.wiring.layers, strict=True)
        return tuple(index for index, (before, after) in enumerate(pairs) if before != after)

    @property
    def num_stages(self) -> int:
        """At least 1."""
        return max(1, math.ceil(len(self.changed_layers) / self.layers))

    @property
    def last_begins(self) -> int:
        """The first optimizer step under the whole wiring; steps count from 1."""
        return (self.num_stages - 1) * self.steps + 1

    def at(self, step: int) -> Wiring:
        """The wiring of an optimizer step, from 1 on."""
        stage = min((step - 1) // self.steps, self.num_stages - 1)
        chosen = set(self.changed_layers[::-1][: (stage + 1) * self.layers])
        pairs = zip(self.start.layers, self.wiring.layers, strict=True)
        return Wiring(tuple(after if index in chosen else before for index, (before, after) in enumerate(pairs)))
