"""The report: what was measured on each rank, as plain values in integer nanoseconds.

This file holds the figures and the identities between them. It asserts the identities when a rank's report is made,
so that no renderer can ever print parts that do not add up. Percentages exist only where there is communication;
elsewhere the answer is None, never 0 and never NaN.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from farskip.trace_activity import Collectives, Recognized
from farskip.trace_intervals import Union


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """Time of a group of collectives.

    Attributes:
        count: how many.
        summed_ns: sum of their durations; two that run at the same time count twice.
        total_ns: their time on the clock; an instant belongs to the collective that started first.
        hidden_ns: the part of total_ns during which compute ran.
    """

    count: int = 0
    summed_ns: int = 0
    total_ns: int = 0
    hidden_ns: int = 0

    @property
    def exposed_ns(self) -> int:
        """The part of the total during which no compute ran."""
        return self.total_ns - self.hidden_ns

    @property
    def overlap_percent(self) -> float | None:
        """Hidden in percent of the total; None if there is no communication."""
        return 100.0 * self.hidden_ns / self.total_ns if self.total_ns else None

    def __add__(self, other: "Figures") -> "Figures":
        return Figures(
            count=self.count + other.count,
            summed_ns=self.summed_ns + other.summed_ns,
            total_ns=self.total_ns + other.total_ns,
            hidden_ns=self.hidden_ns + other.hidden_ns,
        )


class Stretch(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One stretch of exposed communication.

    A struct and not a dataclass: a trace can have a hundred thousand of them, and this is ten times quicker to make.

    Attributes:
        start_ns: from the start of the rank's window.
        length_ns: its length.
        cause: one of ``trace_exposed.CAUSES``.
        waits_for: what the program waited for, in words; None where it waited for nothing in particular.
        evidence: "read" if the trace says so, "inferred" if it follows from the order of events.
        collective: the collective whose time it is, in words.
        step: of that collective, -1 if unknown.
    """

    start_ns: int
    length_ns: int
    cause: str
    waits_for: str | None
    evidence: str
    collective: str
    step: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PriceRow:
    """One kernel (or stage) of one shape: alone and under communication.

    Attributes:
        alone_ns, under_ns: median durations.
        extra_ns: what all runs under communication took longer than the median alone, summed.
    """

    name: str
    shape: str
    count_alone: int
    count_under: int
    alone_ns: int
    under_ns: int
    extra_ns: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanLine:
    """One line of the planned schedule beside what the trace shows.

    Attributes:
        direction: "forward" or "backward".
        text: the instruction, "launch dispatch L003".
        status: "as planned", "missing", "unplanned".
        count: how often it was seen.
        mean_ns: mean length of its range, 0 if never seen.
    """

    direction: str
    text: str
    status: str
    count: int
    mean_ns: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RankReport:
    """The figures of one rank.

    Attributes:
        rank: rank in the default group.
        path: file it was read from.
        device: "gpu", "cpu" or "none".
        window_start_ns: start of the window on the file's clock.
        base_ns: what makes that the time of day; None if unknown.
        window_ns ... idle_ns: see docs/trace.md; compute + exposed + copies only + idle = window.
        edge_exposed_ns: exposed before the first or after the last compute of the window.
        figures: of all collectives together.
        collectives, phases, layers, steps: the same figures, grouped; each group adds up to ``figures``. Layer and
        step -1
            stand for unknown.
        unattributed: those without a phase.
        step_ns: step -> length of its range on the host.
        stretches: worst first.
        price: price of overlap.
        plan: the planned schedule line by line; empty without a schedule.
        recognized: names and what they counted as.
        event_set, notes: what the figures are made of, and what to know about them.
        events: the collectives one by one (for comparisons over ranks and for the timeline).
        communication, compute: unions, for the timeline.
        overlap_percent_override: the HTA-compatible mode computes and rounds its own percentage.
    """

    rank: int
    path: str
    device: str
    window_start_ns: int
    base_ns: int | None
    window_ns: int
    compute_ns: int
    communication_ns: int
    hidden_ns: int
    exposed_ns: int
    copies_only_ns: int
    idle_ns: int
    edge_exposed_ns: int
    figures: Figures
    collectives: Mapping[str, Figures]
    phases: Mapping[str, Figures]
    layers: Mapping[int, Figures]
    steps: Mapping[int, Figures]
    unattributed: Figures
    step_ns: Mapping[int, int]
    stretches: tuple[Stretch, ...]
    price: tuple[PriceRow, ...]
    plan: tuple[PlanLine, ...]
    recognized: tuple[Recognized, ...]
    event_set: Mapping[str, str]
    notes: tuple[str, ...]
    events: Collectives
    communication: Union
    compute: Union
    overlap_percent_override: float | None = None

    @property
    def overlap_percent(self) -> float | None:
        """Hidden in percent of communication; None without communication."""
        if self.overlap_percent_override is not None:
            return self.overlap_percent_override
        return 100.0 * self.hidden_ns / self.communication_ns if self.communication_ns else None

    @property
    def num_steps(self) -> int:
        """How many steps the figures cover: those marked in the trace."""
        return len(self.step_ns)

    def exposed_per_step_ns(self) -> float | None:
        """Exposed time per marked step; None without step marks."""
        return self.exposed_ns / self.num_steps if self.num_steps else None


def check_identities(report: RankReport) -> None:
    """Asserts that the parts of a rank's report add up.

    Args:
        report: of the exact mode; the HTA-compatible mode rounds stamps and does not add up.

    Raises:
        AssertionError: they do not, which is a bug of ours.
    """
    parts = report.compute_ns + report.exposed_ns + report.copies_only_ns + report.idle_ns
    assert parts == report.window_ns, f"rank {report.rank}: parts {parts} ns, window {report.window_ns} ns"
    assert report.hidden_ns + report.exposed_ns == report.communication_ns
    assert report.figures.total_ns == report.communication_ns, f"rank {report.rank}: owned pieces miss the union"
    assert report.figures.hidden_ns == report.hidden_ns
    for name, group in (
        ("collectives", report.collectives),
        ("phases", report.phases),
        ("layers", report.layers),
        ("steps", report.steps),
    ):
        total = sum(group.values(), Figures())
        if name == "phases":
            total += report.unattributed
        assert total == report.figures, f"rank {report.rank}: {name} add up to {total}, not {report.figures}"
    assert sum(stretch.length_ns for stretch in report.stretches) == report.exposed_ns
