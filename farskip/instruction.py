"""The three instructions of a schedule. Data only; no torch."""

from dataclasses import dataclass
from enum import StrEnum

from farskip.stage_graph import Key


class Do(StrEnum):
    """What an instruction does."""

    RUN = "run"
    LAUNCH = "launch"
    WAIT = "wait"


@dataclass(frozen=True, slots=True)
class Instruction:
    """One step of a schedule."""

    do: Do
    key: Key

    def __str__(self) -> str:
        return f"{self.do}({self.key})"
