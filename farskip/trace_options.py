"""What a user can ask of an inspection, checked once and handed to every reader process."""

from dataclasses import dataclass

from farskip.trace_plan import Plan
from farskip.trace_recognize import UserPattern

MODES = ("exact", "hta")


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectOptions:
    """Options of one inspection.

    Attributes:
        mode: "exact", or "hta" for the figures of HolisticTraceAnalysis.
        include_last_step: in the "hta" mode, keep the last ProfilerStep.
        patterns: further names that are communication.
        device: the device to measure where a file has rows of several.
        plan: the planned schedule to compare with.
    """

    mode: str = "exact"
    include_last_step: bool = False
    patterns: tuple[UserPattern, ...] = ()
    device: int | None = None
    plan: Plan | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode {self.mode!r} is unknown; give one of {', '.join(MODES)}")
        if self.include_last_step and self.mode != "hta":
            raise ValueError("include_last_step belongs to --mode hta: the exact mode keeps every step")
