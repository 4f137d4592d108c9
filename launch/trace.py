"""``farskip trace``: reads profiler traces of one job, says how much communication was hidden, and judges it for CI.

Exit codes: 0 done (all conditions hold), 1 a condition does not hold, 2 bad input or a condition that cannot be judged.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO

from farskip.launch.writable import check_file
from farskip.trace import TraceReport, inspect
from farskip.trace_assert import exit_code, junit, parse_condition
from farskip.trace_csv import render_csv
from farskip.trace_html import render_html
from farskip.trace_json import encode
from farskip.trace_options import MODES
from farskip.trace_perfetto import write_perfetto
from farskip.trace_terminal import MAX_ROWS, render_comparison, render_terminal

CANNOT_JUDGE = 2


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    command = argparse.ArgumentParser(
        prog="farskip trace",
        description="How much communication was hidden under compute, what stayed exposed, and why.",
    )
    add = command.add_argument
    add("files", nargs="+", metavar="FILE", help="one trace per rank: Kineto / Chrome JSON (.gz) or Nsight SQLite")
    add(
        "--against", nargs="+", metavar="FILE", help="the same ranks of a baseline: what became hidden, what got slower"
    )
    add("--schedule", metavar="FILE", help="schedule.json of the run: compare plan and trace line by line")
    add("--communication", action="append", default=[], metavar="REGEX", help="further names that are communication")
    add("--show-names", action="store_true", help="list what was counted as what")
    add("--device", type=int, metavar="N", help="the device to measure where a file has rows of several")
    add("--mode", choices=MODES, default="exact", help="hta: the figures of HolisticTraceAnalysis")
    add("--include-last-step", action="store_true", help="with --mode hta: keep the last profiler step")
    add("--assert", dest="conditions", action="append", default=[], metavar="CONDITION", help='"overlap >= 85%%"')
    add("--junit", metavar="FILE", help="write the judged conditions for CI")
    add("--json", metavar="FILE", help="write the figures; - for standard output")
    add("--details", metavar="FILE", help="write everything else as JSON: price, plan, names, skew, comparison")
    add("--csv", metavar="FILE", help="write all tables as one CSV")
    add("--html", metavar="FILE", help="write one self-contained page")
    add("--perfetto", metavar="FILE", help="write the trace with lanes for hidden and exposed (.gz: compressed)")
    add("--stretches", type=int, default=MAX_ROWS, metavar="N", help="how many exposed stretches to print per rank")
    add("--quiet", action="store_true", help="print judgements only")
    return command


def main(argv: list[str]) -> int:
    """Runs the command.

    Args:
        argv: the words after ``farskip trace``.

    Returns:
        The exit code.
    """
    options = parser().parse_args(argv)
    try:
        return _run(options)
    except (ValueError, OSError) as error:
        print(f"farskip trace: {' '.join(str(error).split())}", file=sys.stderr)
        return CANNOT_JUDGE


def _run(options: argparse.Namespace) -> int:
    started = time.perf_counter()
    if options.stretches < 0:
        raise ValueError(f"--stretches {options.stretches} is too small; use at least 0, which prints none")
    for text in options.conditions:
        parse_condition(text)
    if options.junit and not options.conditions:
        raise ValueError("--junit needs at least one --assert to report on")
    _check_outputs(options)
    report = _inspect(options, options.files, options.schedule)
    comparison = None if options.against is None else report.against(_inspect(options, options.against, None))
    judgements = report.judge(options.conditions)
    text = render_terminal(report.ranks, report.skew, show_names=options.show_names, max_stretches=options.stretches)
    comparison_text = "" if comparison is None else "\n" + render_comparison(comparison)
    if not options.quiet and options.json != "-":
        print(text + comparison_text, end="")
    if options.json == "-":
        print(encode(report.to_json()).decode(), end="")
    elif options.json:
        write_bytes(options.json, encode(report.to_json()))
    if options.details:
        write_bytes(options.details, encode(report.details(comparison)))
    if options.csv:
        write_bytes(options.csv, render_csv(report.ranks).encode())
    if options.html:
        page = render_html(report.ranks, report.skew, comparison, judgements)
        write_bytes(options.html, page.encode())
    if options.perfetto:
        _write_perfetto(report, options.perfetto)
    for judgement in judgements:
        stream = sys.stderr if options.json == "-" else sys.stdout
        print(f"assert {judgement.condition.text}: {judgement.outcome}: {judgement.message}", file=stream)
    if options.junit:
        xml = junit(judgements, time.perf_counter() - started)
        write_bytes(options.junit, xml)
    return exit_code(judgements)


def _inspect(options: argparse.Namespace, files: list[str], schedule: str | None) -> TraceReport:
    return inspect(
        files,
        mode=options.mode,
        include_last_step=options.include_last_step,
        communication=options.communication,
        device=options.device,
        schedule=schedule,
    )


def _check_outputs(options: argparse.Namespace) -> None:
    """Refuse to write to a trace, or where nothing can be written."""
    inputs = {os.path.realpath(path) for path in [*options.files, *(options.against or [])]}
    for name in ("json", "details", "csv", "html", "perfetto", "junit"):
        path = getattr(options, name)
        if path and os.path.realpath(path) in inputs:
            raise ValueError(
                f"--{name} {path}: this is one of the traces, which are never written to; give another name"
            )
        if path and path != "-":
            check_file(f"--{name} {path}", path)


def _write_perfetto(report: TraceReport, path: str) -> None:
    """One file for one rank; with several ranks the rank goes into the name."""
    for rank in report.ranks:
        target = Path(path)
        if len(report.ranks) > 1:
            stem, dot, ending = target.name.partition(".")
            target = target.with_name(f"{stem}.rank{rank.rank}{dot}{ending}")
        fill = partial(write_perfetto, rank, rank.path, compressed=target.name.endswith(".gz"))
        write_atomically(target, fill)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Writes a file of these bytes; see `write_atomically`."""

    def fill(file: BinaryIO) -> None:
        file.write(data)

    write_atomically(path, fill)


def write_atomically(path: str | Path, fill: Callable[[BinaryIO], None]) -> None:
    """Writes a file under a temporary name in its folder and renames it, so that nobody sees half of it."""
    target = Path(path)
    if not target.parent.is_dir():
        raise ValueError(f"{target}: the folder {target.parent} does not exist; create it first")
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            fill(file)
        os.chmod(temporary, 0o644 & ~_umask())
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
