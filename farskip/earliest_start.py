"""Overlapped order under sequence parallelism: what can start first runs first. No torch.

Every sub-block stands between a gather and a scatter there, and the norm that feeds one waits for another: scatter ->
add and norm -> gather is a chain of its own, which hides only if some compute is left for its second half when its
first half has arrived. Whether it has depends on how long things take, so the list is built against a clock:

    loop:   of the stages whose inputs are there or under way, take the one that can start first; of those that can
            start now, first what a launch hangs on (norms, and route, experts and merge where rows are dispatched),
            then the first in program order;
            wait for those of its inputs that are still in flight, and run it;
            launch every collective whose input exists now.

The clock is the simulator's: one lane computes, one communicates.
"""

from bisect import insort
from collections import Counter
from collections.abc import Callable, Sequence

from farskip.instruction import Do, Instruction
from farskip.stage_graph import DISPATCH, EXPERTS, MERGE, NORM, ROUTE, Key, Stage

Duration = Callable[[str], float]
"""How long a stage or collective takes, by its name; all its chunks together."""

_NORMS = frozenset(NORM.values())


def even(stage: str) -> float:
    """Everything takes the same time."""
    return 1.0


def earliest_start(stages: Sequence[Stage], duration: Duration) -> list[Instruction]:
    """The forward list of one segment.

    Args:
        stages: in program order.
        duration: of each of them.
    """
    steps: list[Instruction] = []
    now = link_free = 0.0
    parts = Counter((stage.key.layer, stage.key.stage) for stage in stages)
    dispatching = {stage.key.layer for stage in stages if stage.key.stage == DISPATCH}
    unmet = [len(stage.after) for stage in stages]
    followers: dict[Key, list[int]] = {stage.key: [] for stage in stages}
    for number, stage in enumerate(stages):
        for key in stage.after:
            followers[key].append(number)
    able: list[int] = []  # stages whose inputs are there or under way, as numbers in program order
    launchable: list[int] = []
    in_flight: list[Key] = []
    available: dict[Key, float] = {}

    def took(key: Key) -> float:
        return duration(key.stage) / parts[key.layer, key.stage]

    def released(number: int) -> None:
        insort(launchable if stages[number].is_collective else able, number)

    def made(key: Key, at: float) -> None:
        available[key] = at
        for number in followers[key]:
            unmet[number] -= 1
            if not unmet[number]:
                released(number)

    def start(number: int) -> float:
        return max([now, *(available[key] for key in stages[number].after)])

    def is_fed(number: int) -> bool:
        key = stages[number].key
        return key.stage in _NORMS or (key.stage in (ROUTE, EXPERTS, MERGE) and key.layer in dispatching)

    def wait(keys: Sequence[Key]) -> None:
        for key in keys:
            steps.append(Instruction(Do.WAIT, key))
            in_flight.remove(key)

    for number, stage in enumerate(stages):
        if not stage.after:
            released(number)
    while able:
        chosen = min(able, key=lambda number: (start(number), not is_fed(number), number))
        able.remove(chosen)
        stage = stages[chosen]
        now = start(chosen) + took(stage.key)
        wait([key for key in in_flight if key in stage.after])
        steps.append(Instruction(Do.RUN, stage.key))
        made(stage.key, now)
        for number in tuple(launchable):
            launchable.remove(number)
            key = stages[number].key
            steps.append(Instruction(Do.LAUNCH, key))
            in_flight.append(key)
            link_free = max(now, link_free) + took(key)
            made(key, link_free)
    wait(tuple(in_flight))
    assert not any(unmet), (
        f"stages {[str(stages[i].key) for i, count in enumerate(unmet) if count]} wait for each other"
    )
    return steps
