"""`farskip doctor`: what on this machine, in this environment or in a planned run would break it or defeat overlap.

Starts no process group and changes nothing. Exit codes, the worst finding: 0 nothing or warnings, 1 warnings with
--strict, 2 errors (or bad input), so that a job script can stop before it takes its machines.
"""

import argparse
import json
import math
import os
from dataclasses import asdict
from pathlib import Path

from farskip.launch.config import ParallelConfig
from farskip.launch.doctor_environment import job_of, network, settings, threads, torchrun
from farskip.launch.doctor_machine import Finding, Level, devices, extras, has_devices, packages, room
from farskip.launch.doctor_run import checkpoint, degrees
from farskip.launch.trace import write_bytes
from farskip.launch.writable import check_file

WARNED, BROKEN = 1, 2


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    command = argparse.ArgumentParser(
        prog="farskip doctor",
        description="Say what would break a run here or keep it from overlapping, and what to do about it.",
        epilog="Exit code: 0 for no error, 1 for warnings with --strict, 2 for errors.",
    )
    run = command.add_argument_group("a run that is planned").add_argument
    run("--model", type=Path, metavar="FOLDER", help="of a checkpoint: can it be loaded, spread, held?")
    run("--wiring", metavar="NAME", help="that it gets; without it, what the checkpoint says")
    run("--layers", metavar="LAYERS", help="with --wiring: all (default), last:3, first:3, 2:5, 3 or 0,4,5")
    run("--ep", type=int, default=0, metavar="N", help="ranks that share the experts (default: all ranks)")
    run("--tp", type=int, default=1, metavar="N", help="ranks that share attention, MLPs, shared experts")
    run("--sequence-parallel", action="store_true", help="with --tp: they share the stream, too")
    run("--shard-optimizer", action="store_true", help="ranks that hold the same divide AdamW's state")
    run("--chunks", type=int, default=1, metavar="N", help="parts into which tokens are cut on their way")
    run("--capacity", type=int, default=0, metavar="N", help="rows that an expert takes (default: no limit)")
    run("--ranks", type=int, metavar="N", help="of the job (default: torchrun's WORLD_SIZE, else what ep and tp need)")
    run("--ranks-per-host", type=int, metavar="N", help="of each host (default: torchrun's LOCAL_WORLD_SIZE)")
    run("--runs", type=Path, default=Path("runs"), metavar="FOLDER", help="where run folders go (default: runs)")
    out = command.add_argument_group("what comes out").add_argument
    out("--strict", action="store_true", help="warnings count: exit code 1")
    out("--quiet", action="store_true", help="print warnings and errors only")
    out("--json", metavar="FILE", help="write all findings; - for standard output")
    return command


def main(argv: list[str]) -> int:
    """Runs the command.

    Args:
        argv: the words after ``farskip doctor``.

    Returns:
        The exit code.

    Raises:
        ValueError: numbers of ranks that make no sense.
    """
    options = parser().parse_args(argv)
    if options.json and options.json != "-":
        check_file(f"--json {options.json}", options.json)
    found = examine(options)
    document = json.dumps({"findings": [asdict(each) for each in found], "counts": _counts(found)}, indent=1) + "\n"
    if options.json == "-":
        print(document, end="")
    else:
        print(_text([each for each in found if each.level is not Level.ok or not options.quiet], found))
    if options.json and options.json != "-":
        write_bytes(options.json, document.encode())
    levels = {finding.level for finding in found}
    if Level.error in levels:
        return BROKEN
    return WARNED if Level.warning in levels and options.strict else 0


def examine(options: argparse.Namespace) -> list[Finding]:
    """Everything, in the order in which it is printed."""
    for name in ("ranks", "ranks_per_host"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} is too small; use at least 1")
    if options.layers is not None and options.wiring is None:
        raise ValueError(f"--layers {options.layers} goes with --wiring NAME; add it")
    parallel = ParallelConfig(
        ep=options.ep,
        tp=options.tp,
        sequence_parallel=options.sequence_parallel,
        shard_optimizer=options.shard_optimizer,
        chunks=options.chunks,
        capacity=options.capacity,
    )
    least = math.lcm(max(options.ep, 1), max(options.tp, 1))
    job = job_of(os.environ, options.ranks, options.ranks_per_host, least)
    found = [*packages(), *extras(), *devices(job.ranks_here)]
    found += (
        settings(os.environ, job)
        + network(os.environ, job, over_gloo=not has_devices())
        + threads(os.environ, job)
        + torchrun(os.environ)
    )
    found += room(job.ranks, options.runs)
    fits = degrees(parallel, job)
    found += fits
    if options.model is not None:
        is_possible = not any(each.level is Level.error for each in fits)
        found += checkpoint(options.model, options.wiring, options.layers, parallel if is_possible else None, job)
    return found


def _counts(found: list[Finding]) -> dict[Level, int]:
    return {level: sum(finding.level is level for finding in found) for level in Level}


def _text(shown: list[Finding], found: list[Finding]) -> str:
    width = max((len(finding.name) for finding in shown), default=0)
    lines = [f"{finding.level:<7}  {finding.name:<{width}}  {finding.text}" for finding in shown]
    counts = _counts(found)
    summary = f"{len(found)} things looked at: {counts[Level.error]} errors, {counts[Level.warning]} warnings"
    return "\n".join([*lines, summary])
