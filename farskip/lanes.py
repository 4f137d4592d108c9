"""The side lane: which stages of an overlapped list are issued beside compute, and where lanes wait. No torch.

Merging what came back and routing the next layer feed exchanges, not compute. In one lane they stand in its way: while
a combine is late, attention waits behind its merge. In a lane of their own only what reads them waits:

    compute       | shared.1  | attention_in.2 | attention_core.2              | experts.2 |
    communication | combine.1 . ............................... dispatch.2 ...
    side          |           |                | merge.1 route.2               |           |

A list with a side lane is the list without one, in the same order, backward too; so are its bits. What changes:

    run      of a stage that was put aside is issued in the side lane
    launch   in the lane of the stage that makes what is sent
    wait     in the lane of the stage that takes the result: a wait in the side lane does not hold compute
    behind   marks the first stage of a lane that needs a stage of the other one

Each lane does its own in order, so a lane that waits for a stage, or for a collective launched behind it, has waited
for all before it. A sum of the residual stream is formed by whoever reads it first; compute that reads the stream
therefore goes behind the last router that was issued before it.

In backward the lanes are the same, and what went behind goes in front.
"""

import difflib
from bisect import bisect_right
from collections.abc import Collection, Sequence
from enum import StrEnum

from farskip.instruction import Do, Instruction
from farskip.stage_graph import ATTENTION_IN, MERGE, ROUTE, Key, Stage
from farskip.wiring import MLP, SHARED

_READS_STREAM = (ATTENTION_IN, MLP, SHARED, ROUTE)


class SideStream(StrEnum):
    """What is put aside."""

    none = "none"
    merge = "merge"
    merge_and_route = "merge_and_route"

    @property
    def stages(self) -> tuple[str, ...]:
        """The kinds of stages."""
        return {SideStream.none: (), SideStream.merge: (MERGE,), SideStream.merge_and_route: (MERGE, ROUTE)}[self]

    @classmethod
    def named(cls, name: str) -> "SideStream":
        """The one of that name.

        Raises:
            ValueError: there is none.
        """
        names = [str(each) for each in cls]
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            raise ValueError(f"side_stream {name!r} is unknown; use {' or '.join(near or names)}")
        return cls(name)


def put_aside(
    steps: Sequence[Instruction], stages: Sequence[Stage], kinds: Collection[str], starts: Sequence[int]
) -> list[Instruction]:
    """The same list with stages of these kinds in the side lane.

    Args:
        steps: a forward list.
        stages: of the model.
        kinds: names of stages.
        starts: the first layers of its segments, in order. A segment begins behind both lanes of the one before it.
    """
    after = {stage.key: stage.after for stage in stages}
    collectives = {stage.key for stage in stages if stage.is_collective}
    lane_of = {key: key.stage in kinds for key in after if key not in collectives}
    launched_in = {key: lane_of[after[key][0]] for key in collectives}
    waited_in = {other: lane_of[key] for key in lane_of for other in after[key] if other in collectives}
    position: dict[Key, int] = {}
    waited_for = {False: -1, True: -1}  # per lane: up to where the other one has been waited for
    last: dict[bool, tuple[Key, ...]] = {False: (), True: ()}  # per lane
    last_router: tuple[Key, ...] = ()
    segment, edge = 0, dict(last)  # of the segment: its number, and what each lane did last before it
    at_edge = {False: False, True: False}  # per lane: whether its next stage is the segment's first
    found: list[Instruction] = []
    for number, step in enumerate(steps):
        key = step.key
        if step.do is Do.LAUNCH:
            position[key] = number
            found.append(Instruction(step.do, key, launched_in[key]))
        elif step.do is Do.WAIT:
            side = waited_in[key]
            if launched_in[key] is not side:
                waited_for[side] = max(waited_for[side], position[key])
            found.append(Instruction(step.do, key, side))
        else:
            side, here = lane_of[key], bisect_right(starts, key.layer)
            if here != segment:
                segment, edge, at_edge = here, dict(last), {False: True, True: True}
            needed = after[key] + (last_router if key.stage in _READS_STREAM else ())
            if at_edge[side]:
                at_edge[side] = False
                needed += edge[not side]
            others = [other for other in needed if lane_of.get(other, side) is not side]
            behind = max(others, key=lambda other: position[other], default=None)
            if behind is not None and position[behind] <= waited_for[side]:
                behind = None
            if behind is not None:
                waited_for[side] = position[behind]
            position[key] = number
            last[side] = (key,)
            last_router = (key,) if key.stage == ROUTE else last_router
            found.append(Instruction(step.do, key, side, behind))
    return found
