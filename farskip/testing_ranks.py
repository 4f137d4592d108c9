"""Several ranks on one machine for tests: gloo over a file store, no ports, no environment variables.

Decides when a case counts as failed and what the failure says. Refuses to leave anything behind: after a case that
raised, hung or died every process of the pool is killed, and the next case gets new ones. Every case gets a process
group of its own: setting one up costs milliseconds, while a group that lives on carries unfinished collectives,
sub-groups and half-read sockets from one test into the next.

The messages between the pool P and a rank R (`farskip.testing_worker`):

    R -> P   ok          once, when the process is up
    P -> R   case        where the function is, its arguments, rank, file store, timeout
    R -> P   ok, result  or: error, traceback
    P -> R   finish      only when all ranks have answered ok, so that no rank closes a socket another one still reads
    R -> P   ok          the process group is destroyed
"""

import atexit
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from inspect import getsourcefile
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import FunctionType, TracebackType
from typing import Any, Self

from farskip.testing_worker import STACK_SIGNAL, Case, serve

START_SECONDS = 120.0
"""How long new processes get to import torch; apart from a case's own limit, which a busy machine would eat up."""

SHUTDOWN_SECONDS = 60.0
"""How long idle ranks get to end by themselves before they are killed."""

POLL_SECONDS = 0.5
"""How often the ranks are looked at while none answers: a child of a dead rank can hold its pipe open."""

STACK_SECONDS = 0.5
"""How long a rank that does not answer gets to write its stack."""


class RankError(RuntimeError):
    """A rank raised, hung or died. The message names the rank and holds its traceback or stack."""


class RankPool:
    """Ranks that are started once and fed many cases: importing torch and transformers costs seconds per process.

    Processes are started when a case first needs them; a case of fewer ranks uses the first ones, so one pool serves
    every world size. Use it as a context manager, or call `close`.
    """

    def __init__(self) -> None:
        """Starts nothing yet."""
        self._folder = tempfile.TemporaryDirectory(prefix="farskip-ranks-")
        self._workers: list[_Worker] = []
        self._num_cases = 0
        # Before multiprocessing's own exit handler, which would wait for the ranks for ever.
        atexit.register(self.kill)

    def run(
        self, fn: Callable[..., Any], world_size: int, /, *args: Any, timeout_s: float = 60.0, **kwargs: Any
    ) -> list[Any]:
        """Calls `fn(*args, **kwargs)` on every rank, inside a fresh default process group (gloo).

        Each rank starts with the same seed (0), one thread, and the caller's warning filters.

        Args:
            fn: A function at the top level of a file (or a static method); it is found by file path and name.
            world_size: Number of ranks.
            *args: Picklable; the same for every rank, which asks `torch.distributed` for its own number.
            timeout_s: Limit of the case, in seconds, without the start of processes. A collective gets three quarters
                of it, so that a rank left alone can say where it stands.
            **kwargs: As `args`.

        Returns:
            What each rank returned, by rank.

        Raises:
            ValueError: The function cannot be found by name, or the numbers make no sense.
            RankError: A rank raised, hung or died; its traceback is in the message.
        """
        where = _locate(fn)
        if world_size < 1 or timeout_s <= 0:
            raise ValueError(
                f"a case needs at least one rank and a positive timeout, got {world_size} ranks and {timeout_s} s"
            )
        self._num_cases += 1
        store = Path(self._folder.name) / f"store-{self._num_cases}"
        what = f"{where['qualname']} in {where['path']}"
        arguments = pickle.dumps((args, kwargs, list(warnings.filters)))
        clean = False
        try:
            workers = self._start(world_size)
            deadline = time.monotonic() + timeout_s
            for worker in workers:
                numbers = {"rank": worker.rank, "world_size": world_size, "timeout_s": timeout_s}
                worker.send(pickle.dumps(Case(**where, **numbers, arguments=arguments, store=str(store))))  # type: ignore[arg-type]
            answers = _collect(workers, deadline, what)
            for worker in workers:
                worker.send(b"finish")
            _collect(workers, time.monotonic() + SHUTDOWN_SECONDS, f"destroying the process group of {what}")
            clean = True
        finally:
            store.unlink(missing_ok=True)
            if not clean:
                self._kill_workers()
        return [pickle.loads(answer) for answer in answers]

    def close(self) -> None:
        """Ends the ranks.

        Raises:
            RankError: A rank that had nothing to do did not end, or ended with an error.
        """
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.connection.close()
        failures = []
        for worker in workers:
            worker.process.join(SHUTDOWN_SECONDS)
            if worker.process.exitcode != 0:
                failures.append(f"rank {worker.rank} {worker.ending()}")
                worker.kill()
        self.kill()
        if failures:
            raise RankError(f"at the end of the pool: {', '.join(failures)}")

    def kill(self) -> None:
        """Kills the ranks and removes the pool's files; never raises for what the ranks do."""
        self._kill_workers()
        self._folder.cleanup()
        atexit.unregister(self.kill)

    def __enter__(self) -> Self:
        """The pool itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the ranks; kills them where the block failed, so that its own error is the one that is seen."""
        if error is None:
            self.close()
        else:
            self.kill()

    def _start(self, world_size: int) -> list["_Worker"]:
        """The first `world_size` ranks, started where they are missing, and up."""
        new = []
        for rank in range(len(self._workers), world_size):
            new.append(_Worker.start(rank, Path(self._folder.name) / f"stack-{rank}.txt"))
            self._workers.append(new[-1])
        _collect(new, time.monotonic() + START_SECONDS, "the start of the process")
        return self._workers[:world_size]

    def _kill_workers(self) -> None:
        for worker in self._workers:
            worker.kill()
        self._workers = []


def run_ranks(
    fn: Callable[..., Any], world_size: int, /, *args: Any, timeout_s: float = 60.0, **kwargs: Any
) -> list[Any]:
    """Calls `fn` on ranks of its own, which end afterwards; `RankPool.run` says more about arguments and errors.

    Args:
        fn: A function at the top level of a file.
        world_size: Number of ranks.
        *args: Picklable; the same for every rank.
        timeout_s: Limit of the case, in seconds, without the start of the processes.
        **kwargs: As `args`.

    Returns:
        What each rank returned, by rank.
    """
    with RankPool() as pool:
        return pool.run(fn, world_size, *args, timeout_s=timeout_s, **kwargs)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Worker:
    """The parent's view of one process."""

    rank: int
    process: SpawnProcess
    connection: Connection
    stack: Path

    @staticmethod
    def start(rank: int, stack: Path) -> "_Worker":
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        # Not a daemon: those may not have children of their own, as the workers of a data loader are.
        process = context.Process(target=serve, args=(theirs, str(stack)), name=f"farskip-rank-{rank}")
        process.start()
        theirs.close()
        return _Worker(rank=rank, process=process, connection=ours, stack=stack)

    def send(self, message: bytes) -> None:
        # A rank that died while idle is reported by `_collect`, with its exit code.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send_bytes(message)

    def receive(self) -> tuple[str, bytes] | None:
        """The answer, or None where the pipe ended, which only a dead process does."""
        try:
            kind, content = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join(SHUTDOWN_SECONDS)
            return None
        return kind, content

    def is_dead(self) -> bool:
        return self.process.exitcode is not None

    def ending(self) -> str:
        code = self.process.exitcode
        if code is None:
            return f"did not end within {SHUTDOWN_SECONDS:.0f} s"
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def ask_for_stack(self) -> None:
        if STACK_SIGNAL is not None and self.process.pid is not None and self.process.is_alive():
            os.kill(self.process.pid, STACK_SIGNAL)

    def stack_text(self) -> str:
        text = self.stack.read_text().rstrip() if self.stack.exists() else ""
        return f"\nrank {self.rank} was still running at\n{text}" if text else ""

    def kill(self) -> None:
        # SIGKILL: the code under test may catch SIGTERM.
        self.process.kill()
        self.process.join()
        self.process.close()
        self.connection.close()


def _collect(workers: list[_Worker], deadline: float, what: str) -> list[bytes]:
    """One answer per rank, by rank.

    The first rank that fails ends the wait. One that died is named before one that raised, which most often only saw
    its peer disappear.
    """
    answers: dict[int, bytes] = {}
    waiting = {worker.connection: worker for worker in workers}
    while waiting:
        remaining = deadline - time.monotonic()
        ready = multiprocessing.connection.wait(list(waiting), max(0.0, min(remaining, POLL_SECONDS)))
        raised: list[tuple[int, str]] = []
        for worker in [worker for connection, worker in waiting.items() if connection in ready]:
            answer = worker.receive()
            if answer is None:
                continue
            del waiting[worker.connection]
            kind, content = answer
            if kind == "ok":
                answers[worker.rank] = content
            else:
                raised.append((worker.rank, content.decode()))
        of = f"of {len(workers)}"
        for worker in workers:
            if worker.is_dead():
                raise RankError(f"rank {worker.rank} {of} {worker.ending()}: {what}")
        if raised:
            rank, text = raised[0]
            raise RankError(f"rank {rank} {of} failed: {what}\n{text.rstrip()}{_stacks(list(waiting.values()))}")
        if waiting and remaining <= 0:
            late = ", ".join(str(worker.rank) for worker in waiting.values())
            raise RankError(f"rank {late} {of} gave no answer in time: {what}{_stacks(list(waiting.values()))}")
    return [answers[worker.rank] for worker in workers]


def _stacks(workers: list[_Worker]) -> str:
    """Where the ranks that have not answered stand, as text for the end of a message."""
    for worker in workers:
        worker.ask_for_stack()
    if workers:
        time.sleep(STACK_SECONDS)
    return "".join(worker.stack_text() for worker in workers)


def _locate(fn: Callable[..., Any]) -> dict[str, str]:
    path = getsourcefile(fn) if isinstance(fn, FunctionType) else None
    qualname = getattr(fn, "__qualname__", repr(fn))
    if path is None or "<" in qualname:
        raise ValueError(
            f"{qualname} cannot be called on ranks: they find it by file path and name, so it must stand at the top "
            "level of a file"
        )
    return {"path": str(Path(path).resolve()), "module": fn.__module__, "qualname": qualname}
