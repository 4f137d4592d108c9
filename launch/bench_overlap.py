"""`farskip bench overlap`: what overlap gains over a link that costs time. Runs all variants in turn on every rank.

Decides the course of one run: build every variant, choose its schedule by stage times measured here, check what it
computes, time it interleaved with the others, hand in the figures. A variant that computes something else than its
reference is not timed, the command says so and exits with 1.
"""

import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from farskip.launch.bench_config import BenchOverlapConfig
from farskip.launch.config import RunConfig
from farskip.launch.hydra_command import run_hydra
from farskip.launch.network_hosts import check_hosts_possible, rate_of, run_on_hosts
from farskip.launch.ranks import Ranks, run_on_local_ranks
from farskip.launch.writable import check_place

INTRO = """
usage: farskip bench overlap [key=value ...]

Times one forward, and one forward and backward step of a mixture-of-experts model with expert parallelism, or of a
dense model with tensor parallelism, blocking and overlapped, over a link that costs time: network namespaces joined by
rate-limited veth pairs (as root, on Linux), loopback, or an emulated link. All variants run in turn in one job; repeats
that were disturbed by other processes are rejected and counted; a variant that computes something else than its
reference is not reported.
"""

PASSES = ("forward", "forward_backward")
_RAW = "raw.json"
_FOLDER = "farskip-bench-"


def main(argv: list[str]) -> int:
    """Entry of the command; 1 if a variant could not be reported."""
    complete: list[bool] = []

    def job(config: BenchOverlapConfig) -> bool:
        complete.append(_start(config))
        return True

    code = run_hydra("bench_overlap", BenchOverlapConfig, job, argv, intro=INTRO)
    return code if all(complete) else 1


def _start(config: BenchOverlapConfig) -> bool:
    """One run. Whether every variant is reported."""
    from farskip.launch.bench_report import report

    config.check()
    rate = rate_of(config.link)
    if rate is None and config.link not in ("local", "emulated"):
        raise ValueError(f"link={config.link} is unknown; use a rate such as 500mbit or 1gbit, local or emulated")
    if rate is not None:
        check_hosts_possible(config.link)
    _check_out(config.out)
    run = RunConfig(folder="", device="cpu", timeout_s=config.timeout_s, threads=config.threads)
    _sweep()
    with _orderly_end(), tempfile.TemporaryDirectory(prefix=f"{_FOLDER}{os.getpid()}-") as folder:
        if rate is not None:
            run_on_hosts(measure, (config, folder), run, config.hosts, rate)
        else:
            run_on_local_ranks(measure, (config, folder), run, config.hosts)
        raw = json.loads((Path(folder) / _RAW).read_text())
    return report(config, raw)


@contextmanager
def _orderly_end() -> Iterator[None]:
    """SIGTERM ends the command as Ctrl-C does, with everything removed, instead of on the spot."""

    def end(number: int, frame: Any) -> None:
        sys.exit(128 + number)

    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _sweep() -> None:
    """Remove folders of runs that were killed; the number in the name is the process that made it."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_FOLDER}*-*"):
        pid = folder.name.removeprefix(_FOLDER).partition("-")[0]
        if pid.isdecimal() and not _is_alive(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)  # another run may be sweeping, too


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _check_out(out: str) -> None:
    """Minutes of measuring must not end in a path that cannot be written."""
    if out:
        check_place(f"out={out}", out)
    if out and Path(out).suffix == ".png":
        raise ValueError(f"out={out} is where the picture would go; give a name that ends in .json")


def measure(ranks: Ranks, job: tuple[BenchOverlapConfig, str]) -> None:
    """The whole course on one rank; rank 0 leaves what was measured in the folder. A collective."""
    import torch

    from farskip.launch.bench_run import Bench

    config, folder = job
    torch.manual_seed(ranks.rank)
    bench = Bench(config, ranks, say=_say if ranks.rank == 0 else lambda line: None)
    try:
        raw = bench.run(PASSES)
    finally:
        bench.close()
    if ranks.rank == 0:
        (Path(folder) / _RAW).write_text(json.dumps(raw))


def _say(line: str) -> None:
    print(line, flush=True)
