"""The three instructions of a schedule, and the lane in which each is issued. Data only; no torch."""

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
    """One step of a schedule.

    Attributes:
        do: what it does.
        key: with which stage or collective.
        side: whether it is issued in the side lane (`farskip.lanes`) instead of beside compute.
        behind: of a stage, the one of the other lane that its lane waits for first; None where it has done so already.
    """

    do: Do
    key: Key
    side: bool = False
    behind: Key | None = None

    @property
    def bare(self) -> "Instruction":
        """What it does, wherever it is issued."""
        return Instruction(self.do, self.key)

    def __str__(self) -> str:
        where = " aside" if self.side else ""
        return f"{self.do}({self.key}){where}{f' behind {self.behind}' if self.behind else ''}"
