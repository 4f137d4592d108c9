"""The planned schedule of a run beside what its trace shows, line by line.

The plan is the schedule.json that a run stores: two lists of {"do", "layer", "stage"}. What happened is the order in
which our ranges began. The two are aligned as texts are, so one missing line does not shift all that follow.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

import msgspec

from farskip.trace_attribute import HostIndex
from farskip.trace_model import Category, TraceFile
from farskip.trace_report import PlanLine


class _Instruction(msgspec.Struct, forbid_unknown_fields=False):
    do: str
    layer: int
    stage: str


class _PlanFile(msgspec.Struct):
    forward: list[_Instruction]
    backward: list[_Instruction]
    mode: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A planned schedule: per direction the instructions in order, each as (verb, layer, stage)."""

    mode: str
    forward: tuple[tuple[str, int, str], ...]
    backward: tuple[tuple[str, int, str], ...]


def read_plan(path: str | Path) -> Plan:
    """Reads a run's schedule.json.

    Args:
        path: the file.

    Returns:
        The plan.

    Raises:
        ValueError: it cannot be read, or is no schedule.
    """
    try:
        plan = msgspec.json.decode(Path(path).read_bytes(), type=_PlanFile)
    except OSError as error:
        raise ValueError(
            f"{path}: no planned schedule ({error.strerror or error}); give the schedule.json of the run's folder"
        ) from None
    except msgspec.DecodeError as error:
        raise ValueError(f"{path}: no planned schedule ({error}); give the schedule.json of the run's folder") from None
    return Plan(
        mode=plan.mode,
        forward=tuple((item.do, item.layer, item.stage) for item in plan.forward),
        backward=tuple((item.do, item.layer, item.stage) for item in plan.backward),
    )


def compare_with_plan(trace: TraceFile, host: HostIndex, plan: Plan) -> tuple[PlanLine, ...]:
    """Compares the order of our ranges with the plan.

    Args:
        trace: a trace of our own run.
        host: its host side.
        plan: the planned schedule; a step that runs it several times (accumulation) repeats it.

    Returns:
        One line per planned instruction, and one per instruction that was not planned, in the plan's order.
    """
    lines: list[PlanLine] = []
    for direction, planned, backward in (("forward", plan.forward, False), ("backward", plan.backward, True)):
        seen = _seen(trace, host, backward)
        lines += _align(direction, planned, seen)
    return tuple(lines)


_Instr = tuple[str, int, str]


def _seen(trace: TraceFile, host: HostIndex, backward: bool) -> list[tuple[_Instr, int]]:
    """What happened in one direction: instruction and length, by start."""
    table = trace.rows
    found = []
    for row in table.rows_of(Category.RANGE).tolist():
        own = host.own_range(row)
        if own is not None and own.backward == backward:
            start, end = int(table.start_R[row]), int(table.end_R[row])
            found.append((start, ((own.verb, own.layer, own.label), end - start)))
    return [item for _, item in sorted(found, key=lambda pair: pair[0])]


def _align(direction: str, planned: Sequence[_Instr], seen: Sequence[tuple[_Instr, int]]) -> list[PlanLine]:
    counts: Counter[int] = Counter()
    lengths: Counter[int] = Counter()
    surplus: Counter[_Instr] = Counter()
    surplus_ns: Counter[_Instr] = Counter()
    rounds = _rounds(planned, seen)
    for part in rounds:
        matcher = SequenceMatcher(None, list(planned), [instruction for instruction, _ in part], autojunk=False)
        matched: set[int] = set()
        for block in matcher.get_matching_blocks():
            for offset in range(block.size):
                counts[block.a + offset] += 1
                lengths[block.a + offset] += part[block.b + offset][1]
                matched.add(block.b + offset)
        for index, (instruction, length) in enumerate(part):
            if index not in matched:
                surplus[instruction] += 1
                surplus_ns[instruction] += length
    lines = [
        _line(direction, instruction, counts[index], lengths[index], "as planned" if counts[index] else "missing")
        for index, instruction in enumerate(planned)
    ]
    return lines + [
        _line(direction, instruction, count, surplus_ns[instruction], "unplanned")
        for instruction, count in surplus.items()
    ]


def _rounds(planned: Sequence[_Instr], seen: Sequence[tuple[_Instr, int]]) -> list[list[tuple[_Instr, int]]]:
    """Cuts what happened wherever the plan's first instruction begins again."""
    rounds: list[list[tuple[_Instr, int]]] = []
    for item in seen:
        if not rounds or (planned and item[0] == planned[0]):
            rounds.append([])
        rounds[-1].append(item)
    return rounds


def _line(direction: str, instruction: _Instr, count: int, length_ns: int, status: str) -> PlanLine:
    verb, layer, stage = instruction
    return PlanLine(
        direction=direction,
        text=f"{verb} {stage} L{layer:03d}",
        status=status,
        count=count,
        mean_ns=length_ns // count if count else 0,
    )
