"""The ranks of a job: those that torchrun started, or those that a command starts itself on this machine.

The only place that reads torchrun's environment and starts and ends process groups.
"""

import atexit
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait as wait_for_any
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from farskip.launch.config import RunConfig
from farskip.launch.device_queues import overlap_warnings, prefer_collectives
from farskip.launch.main import USER_MISTAKE
from farskip.launch.quiet import quiet_libraries

PEER_GONE = "no answer from"
"""How `farskip.shutdown.peer_errors` begins what a rank says that only lost another one."""

_ERROR, _LOST_PEER = "error", "lost_peer"

_GRACE_S = 30.0
"""How long the other ranks may take to end by themselves after one has failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """This process among the ranks of the job.

    Attributes:
        rank: 0 .. world_size-1.
        world_size: number of ranks.
        device: ``cpu`` or ``cuda:<n>``.
    """

    rank: int
    world_size: int
    device: str


@contextmanager
def torchrun_ranks(run: RunConfig) -> Iterator[Ranks]:
    """The ranks that torchrun started; a world of one without it. The default process group stands inside the block.

    Raises:
        ValueError: the device is unknown or missing.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    from farskip.trainer import NonFiniteError

    try:
        with quiet_libraries(), _process_group(run, rank, world_size, local_rank, local_size, "env://") as ranks:
            yield ranks
    except NonFiniteError:
        # All ranks say the same: rank 0 is enough.
        if rank != 0:
            sys.exit(USER_MISTAKE)
        raise


def print_on_first_rank(line: str) -> None:
    """Print, unless torchrun started this process as another rank than 0."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


@contextmanager
def _process_group(
    run: RunConfig, rank: int, world_size: int, local_rank: int, local_size: int, init_method: str
) -> Iterator[Ranks]:
    import torch
    import torch.distributed as dist

    from farskip.parallel.together import say_that_this_rank_failed

    device = _device(run.device, local_rank)
    for key, value, least in (("threads", run.threads, 0), ("timeout_s", run.timeout_s, 1)):
        if value < least:
            raise ValueError(f"run.{key}={value} is too small; use at least {least}")
    if run.threads or local_size > 1:
        torch.set_num_threads(run.threads or max(1, (os.cpu_count() or 1) // local_size))
    if world_size == 1:
        yield Ranks(rank=0, world_size=1, device=device)
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
        prefer_collectives(os.environ)
        for line in overlap_warnings(os.environ) if rank == 0 else []:
            print(f"warning: {line}", file=sys.stderr, flush=True)
    timeout = timedelta(seconds=run.timeout_s)
    shared_store, rank, world_size = next(dist.rendezvous(init_method, rank, world_size, timeout=timeout))
    # The runs of a multirun share one store: without a prefix a rank could read the address of the run before.
    store = dist.PrefixStore(f"farskip:{run.folder}", shared_store)
    dist.init_process_group(
        "nccl" if device.startswith("cuda") else "gloo", store=store, rank=rank, world_size=world_size, timeout=timeout
    )
    try:
        yield Ranks(rank=rank, world_size=world_size, device=device)
        _leave_together(store, rank, world_size)
    except BaseException:
        with suppress(Exception):  # the store may be gone with its host, and what is under way says more
            say_that_this_rank_failed()
        if device.startswith("cuda"):
            # Behind whoever tells what happened, and in front of the destructors.
            atexit.register(_leave_at_once)
        else:
            dist.destroy_process_group()
        raise
    # Without this the process can abort at exit.
    dist.destroy_process_group()


def _leave_at_once() -> None:
    """End a rank that failed under NCCL, which would first wait for its peers, and they for it in their collectives."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _leave_together(store: Any, rank: int, world_size: int) -> None:
    """No rank closes its connections while another one still reads from them, nor the store while it is asked."""
    store.set(f"done {rank}", "")
    store.wait([f"done {other}" for other in range(world_size)])
    store.set(f"left {rank}", "")
    if rank == 0:
        store.wait([f"left {other}" for other in range(world_size)])


def _device(name: str, local_rank: int) -> str:
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"run.device={name!r} is unknown; use cpu, cuda or auto")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device=cuda, but torch sees no CUDA device here; use run.device=cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return "cpu"
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ValueError(
            f"run.device={name}: rank {local_rank} of this host needs cuda:{local_rank}, but torch sees {count} GPU(s) "
            f"here; start at most {count} rank(s) per host, let every rank see all its GPUs (CUDA_VISIBLE_DEVICES), or "
            "use run.device=cpu"
        )
    return f"cuda:{local_rank}"


def run_on_local_ranks(job: Callable[[Ranks, Any], None], config: Any, run: RunConfig, world_size: int) -> None:
    """Start `world_size` processes on this machine, run `job` in each, and wait for all of them.

    Args:
        job: a module-level function, called with (ranks, config).
        config: picklable; handed to every rank.
        run: device, timeout and threads.
        world_size: number of processes.

    Raises:
        RuntimeError: a rank failed; names it. The others are ended within a minute.

    Note: SIGTERM and SIGINT of this process are passed on to the ranks.
    """
    if world_size < 1:
        raise ValueError(f"ranks={world_size} is too small; use at least 1")
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="farskip-") as folder:
        processes = [
            context.Process(target=_local_rank, args=(job, config, run, rank, world_size, folder), name=f"rank {rank}")
            for rank in range(world_size)
        ]
        with _signals_passed_on(processes) as asked_to_stop:
            for process in processes:
                process.start()
            _wait_for(processes, folder, asked_to_stop)


def _local_rank(
    job: Callable[[Ranks, Any], None], config: Any, run: RunConfig, rank: int, world_size: int, folder: str
) -> None:
    from farskip.launch.main import one_line
    from farskip.shutdown import is_peer_error

    # The parent passes on what the user means; a terminal would send Ctrl-C to every process at once.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with (
            quiet_libraries(),
            _process_group(run, rank, world_size, rank, world_size, f"file://{Path(folder) / 'store'}") as ranks,
        ):
            job(ranks, config)
    except (ValueError, RuntimeError, OSError) as error:
        if os.environ.get("FARSKIP_DEBUG", "0") not in ("", "0"):
            raise
        # A rank that only lost another one has nothing to tell that the other one does not tell better.
        kind = _LOST_PEER if PEER_GONE in str(error) or is_peer_error(error) else _ERROR
        (Path(folder) / f"{kind}_{rank}").write_text(one_line(error))
        sys.exit(1)


def _wait_for(processes: Sequence[BaseProcess], folder: str, asked_to_stop: Callable[[], bool]) -> None:
    running = list(enumerate(processes))
    failed: list[tuple[int, int]] = []
    deadline = float("inf")
    while running and time.monotonic() < deadline:
        wait_for_any([process.sentinel for _, process in running], timeout=min(1.0, deadline - time.monotonic()))
        for rank, process in [pair for pair in running if pair[1].exitcode is not None]:
            running.remove((rank, process))
            if process.exitcode:
                failed.append((rank, process.exitcode))
                deadline = min(deadline, time.monotonic() + _GRACE_S)
    for _, process in running:
        process.kill()
        process.join()
    if failed and asked_to_stop() and all(code == -signal.SIGTERM for _, code in failed):
        raise RuntimeError("stopped outside of a training step, where there is nothing to save")
    if failed:
        raise RuntimeError(_first_failure(failed, folder, len(processes)))


def _first_failure(failed: Sequence[tuple[int, int]], folder: str, world_size: int) -> str:
    """One line for the rank that the others failed because of: one that was killed, before one that raised, before one
    that aborted, as NCCL's watchdog does where a peer is missing, before one that says so itself."""

    def message_of(rank: int, kind: str) -> str:
        file = Path(folder) / f"{kind}_{rank}"
        return file.read_text() if file.exists() else ""

    def order(pair: tuple[int, int]) -> int:
        rank, code = pair
        if code < 0:
            return 2 if code == -signal.SIGABRT else 0
        return 3 if message_of(rank, _LOST_PEER) else 1

    rank, code = min(failed, key=order)
    if code < 0:
        return f"rank {rank} of {world_size} was ended by signal {signal.Signals(-code).name}; the others were stopped"
    message = message_of(rank, _ERROR) or message_of(rank, _LOST_PEER)
    if not message:
        return f"rank {rank} of {world_size} ended with exit code {code}; what it said stands above"
    return message if re.match(r"rank \d", message) else f"rank {rank}: {message}"


@contextmanager
def _signals_passed_on(processes: Sequence[BaseProcess]) -> Iterator[Callable[[], bool]]:
    """SIGTERM and SIGINT of this process go to the ranks as SIGTERM. Gives a function: has one come?"""
    came: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        came.append(number)
        for process in processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, signal.SIGTERM)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
