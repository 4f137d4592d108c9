"""The recorder: what was launched, waited for and run, in which order, in both directions; and checks on it.

An observer of the executor. It proves on a real run that autograd followed the backward list of the schedule, and that
nothing was used before it was waited for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from farskip.async_autograd import Ended
from farskip.schedule import Do, Instruction, Schedule
from farskip.stage_graph import Key, StageGraph


@dataclass(slots=True)
class Recorder:
    """Notes every instruction in the order in which it began.

    Attributes:
        forward: instructions of the forward pass; recomputation appends to it.
        backward: instructions as autograd ran them.
    """

    forward: list[Instruction] = field(default_factory=list)
    backward: list[Instruction] = field(default_factory=list)

    def __call__(self, instruction: Instruction, direction: str) -> Ended:
        """See `farskip.executor.Observer`."""
        (self.forward if direction == "forward" else self.backward).append(instruction)
        return _nothing

    def check(self, schedule: Schedule) -> None:
        """Compare with the schedule; in which lane an instruction was issued is not compared.

        Raises:
            RuntimeError: the first instruction that differs, in forward or backward.
        """
        for name, planned, seen in (
            ("forward", schedule.forward, self.forward),
            ("backward", schedule.backward, self.backward),
        ):
            for position, (plan, actual) in enumerate(zip(planned, seen, strict=False)):
                if plan.bare != actual:
                    raise RuntimeError(f"{name} step {position}: scheduled {plan}, executed {actual}")
            if len(planned) != len(seen):
                raise RuntimeError(f"{name}: scheduled {len(planned)} steps, executed {len(seen)}")


def check_order(steps: Sequence[Instruction], graph: StageGraph) -> None:
    """Happens-before: each stage after all it needs, each collective launched once and waited for before it is used.

    Args:
        steps: a forward list, planned or recorded.
        graph: what needs what.

    Raises:
        RuntimeError: names the first instruction that came too early, or what is missing at the end.
    """
    needs = {stage.key: stage.after for stage in graph.stages}
    done: set[Key] = set()
    launched: set[Key] = set()
    for step in steps:
        if step.do is Do.WAIT:
            if step.key not in launched:
                raise RuntimeError(f"{step}: it was not launched")
            launched.remove(step.key)
            done.add(step.key)
            continue
        for key in needs[step.key]:
            if key not in done:
                raise RuntimeError(f"{step}: {key} is {'in flight' if key in launched else 'not done'}")
        (launched if step.do is Do.LAUNCH else done).add(step.key)
    missing = [str(key) for key in needs if key not in done]
    if missing:
        raise RuntimeError(f"never finished: {', '.join(missing)}")


def _nothing() -> None:
    return None
