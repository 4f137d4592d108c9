"""The schedule: in which order stages run and collectives are launched and waited for. A pure value; no torch.

A schedule is two plain lists, forward and backward, of three instructions:

    run(stage)     do the stage's compute
    launch(c)      start collective c, do not wait
    wait(c)        the result of c is needed now

It prints as a two-line timeline. For farskip, one layer in the steady state (times run to the right):

    compute       | attention_in.1 | merge.0 | route.1 | attention_core.1 | experts.1 | shared.1 | attention_in.2 |
    communication | combine.0 .....|                   | dispatch.1 ......|           | combine.1 ................|

The same value is run by the executor, timed by the simulator and compared with a profiler trace by the inspector.

How the forward list is built, per segment:

    serial        program order; every wait follows its launch.
    overlapped    loop:
                    run the next stage of the critical chain (route, experts, merge) if all it needs is there;
                    else run what is placed in the window of the oldest collective in flight, or in an earlier window;
                    else wait for that collective;
                    else (nothing in flight) run the next stage in program order.

A `Placement` says which window each movable stage belongs to. Only waits and movable stages move; what is computed
stays the same function.

The backward list is the forward list read backwards with launch and wait exchanged: autograd runs, of the nodes that
are ready, the one created last, so a forward that launches, computes and waits gets this order for free. The waits of
one direction are the launches of the other. All-reduces of tensor parallelism are no mirrors of each other: what is
reduced in backward is the gradient of a sub-block's input. Their backward list is in `farskip.autograd_order`.

With tensor parallelism, in layers whose experts are not dispatched there is no critical chain and no placement: what is
ready runs in program order, and only when nothing is ready the oldest collective is waited for.

Merges and routers can be put in a lane of their own beside compute, in the same order (`farskip.lanes`).

With sequence parallelism the overlapped list is built against a clock instead (`farskip.earliest_start`); gathers and
scatters are mirrors of each other, so the backward list is the mirror again.

A segment ends where activations are recomputed, at a pipeline cut, or with the model; nothing is in flight there.

Source: the windows are those of FarSkip-Collective (arXiv 2511.11505) section 4.1; the backward mirror is ours.
"""

import difflib
from bisect import insort
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from farskip.autograd_order import autograd_order
from farskip.earliest_start import Duration, earliest_start, even
from farskip.instruction import Do as Do
from farskip.instruction import Instruction as Instruction
from farskip.lanes import SideStream, put_aside
from farskip.stage_graph import (
    ATTENTION_CORE,
    ATTENTION_IN,
    COMBINE,
    DISPATCH,
    EXPERTS,
    MERGE,
    REDUCE,
    ROUTE,
    Key,
    Stage,
    StageGraph,
)
from farskip.wiring import MLP, ROUTED, SHARED

MODES = ("serial", "overlapped")

_CHAIN = (ROUTE, EXPERTS, MERGE)
LAST_REDUCE = REDUCE[ROUTED]
"""The window of a layer's last all-reduce."""
_WINDOWS = (DISPATCH, COMBINE, LAST_REDUCE)


@dataclass(frozen=True, slots=True)
class Window:
    """The stretch between launch and wait of a collective, `layer_offset` layers from the stage placed in it."""

    collective: str
    layer_offset: int = 0

    def position(self, layer: int) -> tuple[int, int]:
        """Place in the order of windows: dispatch, combine, the last all-reduce of the layer; layer by layer."""
        return (layer + self.layer_offset, _WINDOWS.index(self.collective))


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """The window that each movable stage fills. The default is that of the FarSkip paper."""

    attention_in: Window = Window(COMBINE, -1)
    attention_core: Window = Window(DISPATCH)
    shared: Window = Window(COMBINE)

    def position(self, key: Key) -> tuple[int, int] | None:
        """The window of a movable stage; None for a stage that is not movable."""
        window = {ATTENTION_IN: self.attention_in, ATTENTION_CORE: self.attention_core, SHARED: self.shared}
        return window[key.stage].position(key.layer) if key.stage in window else None


@dataclass(frozen=True, slots=True)
class Segment:
    """Layers start..stop-1, executed in one go, with nothing in flight at either end."""

    start: int
    stop: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Two lists of instructions. Compares, prints as a timeline (`timeline`), and travels as a dict.

    Attributes:
        mode: ``serial`` or ``overlapped``.
        segments: the layers between two drains.
        forward: instructions in the order the executor issues them.
        backward: instructions in the order autograd has to follow.
    """

    mode: str
    segments: tuple[Segment, ...]
    forward: tuple[Instruction, ...]
    backward: tuple[Instruction, ...]

    def of_segment(self, segment: Segment) -> tuple[Instruction, ...]:
        """The forward instructions of one segment."""
        return tuple(step for step in self.forward if segment.start <= step.key.layer < segment.stop)

    def to_dict(self) -> dict[str, Any]:
        """A plain dict, as it is stored beside a run."""

        def rows(steps: Iterable[Instruction]) -> list[dict[str, Any]]:
            return [
                {"do": str(step.do), "layer": step.key.layer, "stage": step.key.label}
                | ({"lane": "side"} if step.side else {})
                | ({"behind": [step.behind.layer, step.behind.label]} if step.behind else {})
                for step in steps
            ]

        return {
            "mode": self.mode,
            "segments": [[segment.start, segment.stop] for segment in self.segments],
            "forward": rows(self.forward),
            "backward": rows(self.backward),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The inverse of `to_dict`."""

        def steps(rows: Iterable[dict[str, Any]]) -> tuple[Instruction, ...]:
            return tuple(
                Instruction(
                    Do(row["do"]),
                    Key.from_label(row["layer"], row["stage"]),
                    row.get("lane") == "side",
                    Key.from_label(*row["behind"]) if "behind" in row else None,
                )
                for row in rows
            )

        return cls(
            mode=data["mode"],
            segments=tuple(Segment(start, stop) for start, stop in data["segments"]),
            forward=steps(data["forward"]),
            backward=steps(data["backward"]),
        )

    def timeline(self, direction: str = "forward", *, layers: range | None = None, width: int = 118) -> str:
        """The schedule as pairs of lines, compute above communication, wrapped at `width` characters.

        A collective that stands over an empty compute cell is exposed: nothing runs while it is in flight. A side lane
        is a third line, each of its stages under the compute beside which it can run.
        """
        steps = self.forward if direction == "forward" else self.backward
        if layers is not None:
            steps = tuple(step for step in steps if step.key.layer in layers)
        return _draw(steps, width)


def check_mode(mode: str) -> None:
    """Raise ValueError unless it is one of `MODES`."""
    if mode not in MODES:
        near = difflib.get_close_matches(mode, MODES, n=1)
        raise ValueError(f"schedule {mode!r} is unknown; use {' or '.join(near or MODES)}")


def build_schedule(
    graph: StageGraph,
    mode: str,
    *,
    duration: Duration = even,
    segments: Sequence[Segment] | None = None,
    placement: Placement = Placement(),
    side_stream: SideStream = SideStream.none,
) -> Schedule:
    """The schedule of a stage graph.

    Args:
        graph: the stages of the model.
        mode: ``serial`` or ``overlapped``.
        duration: how long stages take (overlapped only, with sequence parallelism).
        segments: consecutive ranges of layers with nothing in flight at their ends; the whole model if None.
        placement: which window each movable stage fills (overlapped only, without sequence parallelism).
        side_stream: which stages have a lane of their own (overlapped only).

    Raises:
        ValueError: unknown mode, segments that do not cover the layers in order, or a side lane where there is nothing
            to put in it, or under tensor parallelism.
    """
    check_mode(mode)
    chosen = tuple(segments) if segments is not None else (Segment(0, graph.num_layers),)
    edges = [0, *(segment.stop for segment in chosen)]
    if [segment.start for segment in chosen] != edges[:-1] or edges[-1] != graph.num_layers:
        raise ValueError(f"segments {chosen} do not cover layers 0..{graph.num_layers - 1} in order")
    if side_stream is not SideStream.none:
        _check_side_stream(graph, side_stream)
    forward: list[Instruction] = []
    for segment in chosen:
        stages = graph.of_layers(segment.start, segment.stop)
        if mode == "serial" or not graph.has_collectives:
            forward += _serial(stages)
        elif graph.is_sequence_parallel:
            forward += earliest_start(stages, duration)
        else:
            forward += _overlapped(stages, placement, graph.chain is not None)
    if mode == "overlapped" and side_stream.stages:
        starts = [segment.start for segment in chosen]
        forward = put_aside(forward, graph.stages, side_stream.stages, starts)
    if graph.chain is None:
        return Schedule(mode=mode, segments=chosen, forward=tuple(forward), backward=mirror(forward))
    backward: list[Instruction] = []
    for segment in reversed(chosen):
        steps = [step for step in forward if segment.start <= step.key.layer < segment.stop]
        backward += autograd_order(graph, steps, segment.start, segment.stop, serial=mode == "serial")
    return Schedule(mode=mode, segments=chosen, forward=tuple(forward), backward=tuple(backward))


def even_segments(num_layers: int, length: int) -> tuple[Segment, ...]:
    """Segments of `length` layers, the last one shorter if it does not divide."""
    return tuple(Segment(start, min(start + length, num_layers)) for start in range(0, num_layers, length))


def mirror(forward: Sequence[Instruction]) -> tuple[Instruction, ...]:
    """The backward list: reversed, with launch and wait exchanged; what went behind a stage now goes in front of it."""
    exchanged = {Do.RUN: Do.RUN, Do.LAUNCH: Do.WAIT, Do.WAIT: Do.LAUNCH}
    behind = {step.behind: step.key for step in forward if step.behind is not None}
    return tuple(
        Instruction(exchanged[step.do], step.key, step.side, behind.get(step.key) if step.do is Do.RUN else None)
        for step in reversed(forward)
    )


def _check_side_stream(graph: StageGraph, side_stream: SideStream) -> None:
    if graph.chain is not None or graph.is_sequence_parallel:
        raise ValueError(
            f"side_stream={str(side_stream)!r} with tensor parallelism: there a merge feeds a sum over the ranks, "
            "whose place is among those of compute; use side_stream='none' or tp=1"
        )
    if not graph.dispatching_layers:
        raise ValueError(
            f"side_stream={str(side_stream)!r} has nothing to put aside: no rows travel; use side_stream='none', or "
            "expert parallelism over two ranks or more"
        )


def _serial(stages: Sequence[Stage]) -> list[Instruction]:
    steps: list[Instruction] = []
    for stage in stages:
        if stage.is_collective:
            steps += [Instruction(Do.LAUNCH, stage.key), Instruction(Do.WAIT, stage.key)]
        else:
            steps.append(Instruction(Do.RUN, stage.key))
    return steps


def _overlapped(stages: Sequence[Stage], placement: Placement, reduced: bool = False) -> list[Instruction]:
    """The loop of the module docstring; `reduced`: under tensor parallelism."""
    steps: list[Instruction] = []
    in_flight: deque[Key] = deque()
    unmet = {stage.key: len(stage.after) for stage in stages}
    followers: dict[Key, list[int]] = {stage.key: [] for stage in stages}
    for number, stage in enumerate(stages):
        for key in stage.after:
            followers[key].append(number)
    ready: list[int] = []  # stages to run and collectives to launch, as numbers in program order
    launchable: list[int] = []
    reductions = deque(number for number, stage in enumerate(stages) if stage.is_reduction)
    dispatching = {stage.key.layer for stage in stages if stage.key.stage == DISPATCH}

    def released(number: int) -> None:
        insort(launchable if stages[number].is_collective else ready, number)

    def done(key: Key) -> None:
        for number in followers[key]:
            unmet[stages[number].key] -= 1
            if not unmet[stages[number].key]:
                released(number)

    def run(number: int) -> None:
        ready.remove(number)
        steps.append(Instruction(Do.RUN, stages[number].key))
        done(stages[number].key)
        # a collective is launched as soon as its input exists; all-reduces moreover in the order of the stream
        for number in tuple(launchable):
            if stages[number].is_reduction:
                if number != reductions[0]:
                    continue
                reductions.popleft()
            launchable.remove(number)
            steps.append(Instruction(Do.LAUNCH, stages[number].key))
            in_flight.append(stages[number].key)

    def wait() -> None:
        steps.append(Instruction(Do.WAIT, in_flight[0]))
        done(in_flight.popleft())

    def is_chain(key: Key) -> bool:
        return key.stage in _CHAIN and (not reduced or key.layer in dispatching)

    def belongs_here(key: Key) -> bool:
        if reduced and (key.stage == MLP or key.layer not in dispatching):
            return True  # nothing of its own to hide: it is cover for whatever is in flight
        position = placement.position(key)
        return position is not None and position <= _window_of(in_flight[0])

    for number, stage in enumerate(stages):
        if not stage.after:
            released(number)
    while ready or in_flight:
        chain = next((number for number in ready if is_chain(stages[number].key)), None)
        if chain is not None:
            run(chain)
        elif in_flight:
            filler = next((number for number in ready if belongs_here(stages[number].key)), None)
            if filler is not None:
                run(filler)
            else:
                wait()
        else:
            run(ready[0])
    stuck = [key for key in unmet if unmet[key]] + [stages[number].key for number in launchable]
    assert not stuck, f"stages {[str(key) for key in stuck]} wait for each other"
    return steps


def _window_of(key: Key) -> tuple[int, int]:
    """The window that a collective in flight opens: all-reduces but a layer's last one count with its dispatch."""
    if key.stage in (DISPATCH, COMBINE):
        return Window(key.stage).position(key.layer)
    return Window(LAST_REDUCE if key.stage in (REDUCE[MLP], REDUCE[ROUTED]) else DISPATCH).position(key.layer)


def _draw(steps: Sequence[Instruction], width: int) -> str:
    """Lines of cells, one cell per stretch of compute or per exposed collective."""
    cells: list[tuple[str, str, str]] = []  # (compute, collective in flight, side lane)
    in_flight: list[Key] = []
    fresh: set[Key] = set()  # launched, not yet drawn under any compute
    beside: list[Key] = []  # of the side lane, not yet drawn
    landing: set[Key] = set()  # waited for in the side lane: leave when they are drawn

    def draw(compute: str) -> None:
        labels = [str(key) if key in fresh else "..." for key in in_flight]
        cells.append((compute, " ".join(labels), " ".join(map(str, beside))))
        fresh.difference_update(in_flight)
        beside.clear()
        in_flight[:] = [key for key in in_flight if key not in landing]
        landing.clear()

    for step in steps:
        if step.do is Do.LAUNCH:
            in_flight.append(step.key)
            fresh.add(step.key)
        elif step.do is Do.WAIT:
            if step.side and step.key in fresh:
                landing.add(step.key)
                continue
            if step.key in fresh:
                cells.append(("", str(step.key), " ".join(map(str, beside))))
                beside.clear()
            if step.key in in_flight:
                in_flight.remove(step.key)
            fresh.discard(step.key)
        elif step.side:
            beside.append(step.key)
        else:
            draw(str(step.key))
    if beside or landing:
        draw("")
    heads = ["compute       |", "communication |"] + ["side          |"] * any(step.side for step in steps)
    lines: list[str] = []
    row = list(heads)
    for compute, communication, side in cells:
        size = max(len(compute), len(communication), len(side))
        if len(row[0]) + size + 3 > width and len(row[0]) > 15:
            lines += [*row, ""]
            row = list(heads)
        fill = "." if communication and compute else " "
        if communication == "...":
            communication = ""
        row[0] += f" {compute:<{size}} |"
        row[1] += f" {communication}{' ' if communication and fill == '.' else ''}".ljust(size + 2, fill) + (
            "|" if fill == " " else "."
        )
        if len(row) > 2:
            row[2] += f" {side:<{size}} |"
    return "\n".join([*lines, *row])
