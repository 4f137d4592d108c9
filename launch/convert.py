"""``farskip convert``: rewrites the wiring of a checkpoint without loading it.

Exit codes: 0 done, 2 bad input or a full disk; then nothing is left of the output.
"""

import argparse
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from farskip.launch.writable import check_place

if TYPE_CHECKING:
    from farskip.models.convert import Conversion


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    command = argparse.ArgumentParser(
        prog="farskip convert",
        description="Write a checkpoint with another wiring. Its tensors are copied file by file, never loaded.",
        epilog="A checkpoint at OUT is replaced when the new one is complete; anything else there is refused.",
    )
    add = command.add_argument
    add("source", metavar="IN", type=Path, help="folder of a checkpoint: config.json and safetensors")
    add("target", metavar="OUT", type=Path, help="folder of the new checkpoint")
    add(
        "--wiring",
        metavar="NAME",
        help="ordinary, farskip, attn_only, mlp_only, ladder or parallel; without it, what the checkpoint says",
    )
    add("--layers", metavar="LAYERS", help="which layers: all (default), last:3, first:3, 2:5, 3 or 0,4,5")
    add(
        "--to",
        choices=("hf", "instella"),
        help="how config.json says the wiring: our record (hf), or Instella-MoE's keys; without it, as it did",
    )
    return command


def main(argv: list[str]) -> int:
    """Runs the command.

    Args:
        argv: the words after ``farskip convert``.

    Returns:
        The exit code.

    Raises:
        ValueError: bad input.
        OSError: the disk is full.
    """
    options = parser().parse_args(argv)
    check_place(f"OUT {options.target}", options.target)
    with _stopped_in_order():
        # Only now: --help needs no torch. And none of these needs transformers, which takes seconds to import.
        from farskip.models.convert import convert, plan_conversion

        conversion = plan_conversion(options.source, options.target, options.wiring, options.layers, options.to)
        with _progress(conversion) as advance:
            convert(conversion, advance)
    for remark in conversion.remarks:
        print(f"farskip convert: note: {remark}", file=sys.stderr)
    print(_summary(conversion))
    return 0


def _summary(conversion: "Conversion") -> str:
    from farskip.models.folder_copy import size_text

    lines = [
        f"{conversion.target}: {conversion.family.name}, {conversion.wiring}",
        f"files: {len(conversion.stored.files)} of tensors, {len(conversion.copied)} others; "
        f"{size_text(conversion.num_bytes)}",
    ]
    if conversion.left_out:
        lines.append(f"left out: {', '.join(conversion.left_out)}")
    return "\n".join(lines)


@contextmanager
def _progress(conversion: "Conversion") -> "Iterator[Callable[[int], None]]":
    """A bar on stderr, if that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda num_bytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=conversion.num_bytes)
        yield lambda num_bytes: bar.advance(task, num_bytes)


@contextmanager
def _stopped_in_order() -> Iterator[None]:
    """SIGTERM, as schedulers send it, unwinds like Ctrl-C, so that nothing is left half-written."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        previous = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread, whose the signals are
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
