"""Simulator: schedule + stage times -> timeline, exposed time, best placement. No torch.

One lane computes, one lane communicates, and a schedule may have a side lane (`farskip.lanes`), whose waits hold nobody
but itself. In forward a router in the side lane holds the host until it is done, because split sizes are host integers:
what is issued after it starts later. (Not so with a fixed capacity: that needs no sizes.)

A launch puts the collective behind those already on the communication lane; a wait stands still until it is done.
Contention is left out: while several lanes are busy each runs at its full speed, so the exposed time given here is a
lower bound for a real machine, and

    exposed = sum over collectives of max(0, communication - window)

where the window is the compute between launch and wait (exact while one collective is in flight at a time).
`Timeline.contended` puts contention on top of it.
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from farskip.earliest_start import Duration
from farskip.lanes import SideStream
from farskip.schedule import LAST_REDUCE, Do, Instruction, Placement, Schedule, Segment, Window, build_schedule
from farskip.stage_graph import (
    ATTENTION_CORE,
    ATTENTION_IN,
    COLLECTIVES,
    COMBINE,
    DISPATCH,
    EXPERTS,
    GATHER,
    MERGE,
    NORM,
    REDUCTIONS,
    ROUTE,
    SCATTER,
    Key,
    StageGraph,
)
from farskip.wiring import MLP, SHARED

_RELATIVE_FORWARD: Mapping[str, float] = {
    ATTENTION_IN: 1.0,
    ATTENTION_CORE: 1.0,
    MLP: 2.0,
    ROUTE: 0.25,
    EXPERTS: 2.0,
    MERGE: 0.25,
    SHARED: 1.0,
    DISPATCH: 1.5,
    COMBINE: 1.5,
    **dict.fromkeys(REDUCTIONS, 1.5),
    **dict.fromkeys(NORM.values(), 0.1),
    **dict.fromkeys((*GATHER.values(), *SCATTER.values()), 0.75),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class StageTimes:
    """How long every kind of stage takes, in any one unit.

    The defaults are relative weights for choosing a placement before anything was measured; no machine stands behind
    them. Backward defaults to twice the compute and the same communication.

    Attributes:
        forward: stage or collective name -> time.
        backward: the same for the backward pass; what is missing is derived from `forward`.
    """

    forward: Mapping[str, float] = field(default_factory=lambda: _RELATIVE_FORWARD)
    backward: Mapping[str, float] = field(default_factory=dict)

    def of(self, stage: str, direction: str) -> float:
        """Time of one stage in one direction.

        Raises:
            ValueError: no time is known for the stage.
        """
        if direction == "backward" and stage in self.backward:
            return self.backward[stage]  # of an all-reduce there may be no forward time at all
        if stage not in self.forward:
            raise ValueError(f"stage times: no time for {stage!r}; give one for each of {sorted(_RELATIVE_FORWARD)}")
        if direction == "forward":
            return self.forward[stage]
        factor = 1.0 if stage in COLLECTIVES else 2.0
        return factor * self.forward[stage]


@dataclass(frozen=True, slots=True)
class Span:
    """One stretch of one lane, in the unit of the stage times."""

    key: Key
    start: float
    stop: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeline:
    """What one direction of a schedule does over time.

    Attributes:
        compute: spans of the compute lane, in order.
        communication: spans of the communication lane, in order.
        side: spans of the side lane, in order.
        exposed: time that compute stood still at the wait of each collective; none at waits in the side lane.
        held: time that compute stood still for stages of the side lane, by the stage that it was to run.
        total: when everything is done.
    """

    compute: tuple[Span, ...]
    communication: tuple[Span, ...]
    exposed: Mapping[Key, float]
    total: float
    side: tuple[Span, ...] = ()
    held: Mapping[Key, float] = field(default_factory=dict)

    @property
    def exposed_total(self) -> float:
        """Communication that nothing hid."""
        return sum(self.exposed.values())

    @property
    def communication_total(self) -> float:
        """Summed duration of all collectives."""
        return sum(span.stop - span.start for span in self.communication)

    @property
    def hidden_total(self) -> float:
        """Communication during which compute ran."""
        return self.communication_total - self.exposed_total

    def contended(self, contention: float) -> float:
        """When everything is done if both lanes take 1 + `contention` times as long while both are busy.

        How much work of the other lane lies beside a stage does not depend on how fast the two go together: both slow
        down alike. So as much is exposed as without contention, and what is hidden costs `contention` of its time.
        Overlap then gains 1 - `contention` of what it gains without, and loses above 1.
        """
        return self.total + contention * self.hidden_total


def simulate(steps: Sequence[Instruction], times: StageTimes, direction: str = "forward") -> Timeline:
    """Play a list of instructions against a clock.

    Args:
        steps: `Schedule.forward` or `Schedule.backward`.
        times: how long each stage takes.
        direction: ``forward`` or ``backward``: which of the times apply.
    """
    free, link_free, issued = {False: 0.0, True: 0.0}, 0.0, 0.0  # by lane: False computes, True is the side lane
    spans: dict[bool, list[Span]] = {False: [], True: []}
    communication = []
    done_at: dict[Key, float] = {}
    exposed: dict[Key, float] = {}
    held: dict[Key, float] = {}
    parts = Counter((step.key.layer, step.key.stage) for step in steps if step.do is not Do.WAIT)
    for step in steps:
        duration = times.of(step.key.stage, direction) / max(parts[step.key.layer, step.key.stage], 1)
        if step.do is Do.RUN:
            start = max(free[step.side], issued, done_at[step.behind] if step.behind is not None else 0.0)
            if not step.side and start > free[False]:
                held[step.key] = start - free[False]
            free[step.side] = done_at[step.key] = start + duration
            spans[step.side].append(Span(step.key, start, start + duration))
            if step.side and step.key.stage == ROUTE and direction == "forward":
                issued = free[True]
        elif step.do is Do.LAUNCH:
            start = max(free[step.side], issued, link_free)
            link_free = done_at[step.key] = start + duration
            communication.append(Span(step.key, start, link_free))
        else:
            exposed[step.key] = 0.0 if step.side else max(0.0, done_at[step.key] - free[False])
            free[step.side] = max(free[step.side], done_at[step.key])
    return Timeline(
        compute=tuple(spans[False]),
        communication=tuple(communication),
        side=tuple(spans[True]),
        exposed=exposed,
        held=held,
        total=max(free.values()),
    )


def choose_schedule(
    graph: StageGraph,
    mode: str,
    *,
    segments: Sequence[Segment] | None = None,
    times: StageTimes | None = None,
    side_stream: SideStream = SideStream.none,
) -> Schedule:
    """The schedule whose forward and backward together take the least simulated time.

    Of placements that take the same time the earliest of `placements` wins, which starts with that of the FarSkip
    paper. One placement serves all layers.

    Args:
        graph: the stages of the model.
        mode: ``serial`` or ``overlapped``.
        segments: see `build_schedule`.
        times: measured or given stage times; relative defaults if None.
        side_stream: see `build_schedule`.
    """
    if mode == "serial" or not graph.has_collectives:
        return build_schedule(graph, mode, segments=segments, side_stream=side_stream)
    clock = times or StageTimes()
    if graph.is_sequence_parallel:
        candidates = [
            build_schedule(graph, mode, segments=segments, duration=each, side_stream=side_stream)
            for each in _durations(clock)
        ]
    else:
        tried = placements() if graph.chain is None else placements_beside_reductions(graph)
        candidates = [
            build_schedule(graph, mode, segments=segments, placement=placement, side_stream=side_stream)
            for placement in tried
        ]

    def total(schedule: Schedule) -> float:
        forward = simulate(schedule.forward, clock, "forward").total
        # rounded, so that a tie in exact arithmetic is a tie here and the order of placements decides
        return round(forward + simulate(schedule.backward, clock, "backward").total, 9)

    return min(candidates, key=total)


def placements() -> Iterator[Placement]:
    """Every placement worth trying, that of the FarSkip paper first."""
    attention_in = (Window(COMBINE, -1), Window(DISPATCH), Window(DISPATCH, -1))
    attention_core = (Window(DISPATCH), Window(COMBINE, -1), Window(DISPATCH, -1))
    shared = (Window(COMBINE), Window(DISPATCH))
    for first, core, expert in itertools.product(attention_in, attention_core, shared):
        if core.position(0) >= first.position(0):  # the core cannot come before its projections
            yield Placement(attention_in=first, attention_core=core, shared=expert)


def placements_beside_reductions(graph: StageGraph) -> Iterator[Placement]:
    """As `placements`, under tensor parallelism: the all-reduce behind the routed experts is a window too.

    Where nothing is dispatched there is nothing to place."""
    if not graph.dispatching_layers:
        yield Placement()
        return
    attention = (Window(COMBINE, -1), Window(LAST_REDUCE, -1), Window(DISPATCH), Window(DISPATCH, -1))
    for first, core, expert in itertools.product(attention, attention, (Window(COMBINE), Window(DISPATCH))):
        if core.position(0) >= first.position(0):
            yield Placement(attention_in=first, attention_core=core, shared=expert)


def _durations(times: StageTimes) -> Iterator[Duration]:
    """What the clock of `farskip.earliest_start` may go by: the times of either direction, over links as fast as they
    are, twice as fast and half as fast."""
    for direction, slowness in itertools.product(("forward", "backward"), (1.0, 0.5, 2.0)):

        def duration(stage: str, direction: str = direction, slowness: float = slowness) -> float:
            return times.of(stage, direction) * (slowness if stage in COLLECTIVES else 1.0)

        yield duration


def explain(
    steps: Sequence[Instruction], times: StageTimes, direction: str = "forward", *, layers: range | None = None
) -> str:
    """The arithmetic of the windows: what every collective hides under, and what stays exposed.

    Args:
        steps: `Schedule.forward` or `Schedule.backward`.
        times: how long each stage takes.
        direction: which of the times apply.
        layers: whose collectives get a line, all if None; the sums are of all.

    Returns:
        A table with one line per collective (its time, the compute between its launch and its wait, the simulated
        exposed time, the stages in the window), and their sums. One that is waited for in the side lane hides under
        compute up to where that waits for the side lane; how long it does stands in a line of its own.
    """
    timeline = simulate(steps, times, direction)
    took = {span.key: span.stop - span.start for span in timeline.compute}
    transfer = {span.key: span.stop - span.start for span in timeline.communication}
    open_windows: dict[Key, list[Key]] = {}
    aside: list[tuple[int, Key]] = []  # waited for in the side lane, where in the list
    position: dict[Key, int] = {}  # of stages and launches of the side lane
    rows: list[tuple[str, ...]] = [("collective", "transfer", "window", "exposed", "hides under")]

    def close(key: Key) -> None:
        inside = open_windows.pop(key)
        names = ", ".join(str(stage) for stage in inside) or "nothing"
        cells = (transfer[key], sum(took[stage] for stage in inside), timeline.exposed[key])
        rows.append((str(key), *(f"{cell:.2f}" for cell in cells), names))

    def close_aside(number: int) -> None:
        """Compute has waited for what was issued in the side lane up to here."""
        for waited, key in tuple(aside):
            if waited < number:
                aside.remove((waited, key))
                close(key)

    for number, step in enumerate(steps):
        if step.side and step.do is not Do.WAIT:
            position[step.key] = number
        if step.do is Do.LAUNCH:
            open_windows[step.key] = []
        elif step.do is Do.WAIT and step.side:
            aside.append((number, step.key))
        elif step.do is Do.WAIT:
            close_aside(position.get(step.key, -1))
            close(step.key)
        elif not step.side:
            if step.behind is not None:
                close_aside(position[step.behind])
            for inside in open_windows.values():
                inside.append(step.key)
    close_aside(len(steps))
    hidden = timeline.communication_total - timeline.exposed_total
    share = f"{100 * hidden / timeline.communication_total:.0f} % hidden" if timeline.communication_total else "none"
    if timeline.side:
        share = "of compute's own waits"
        held = sum(timeline.held.values())
        rows.append(("side lane", "", "", f"{held:.2f}", "compute stood still for it, or for the host that it held"))
    rows.append(("sum", f"{timeline.communication_total:.2f}", "", f"{timeline.exposed_total:.2f}", share))
    if layers is not None:
        rows = [row for row in rows if "." not in row[0] or int(row[0].rpartition(".")[2]) in layers]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        f"{row[0]:<{widths[0]}}  " + "  ".join(f"{row[i]:>{widths[i]}}" for i in (1, 2, 3)) + f"  {row[4]}"
        for row in rows
    )
