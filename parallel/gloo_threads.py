"""gloo's threads, ahead of those that compute.

gloo moves bytes in threads of its own. Every step of a transfer (room in a socket, rows that came, the next term of a
sum) waits until its thread has a core. Where ranks compute on all cores, Linux's fair scheduler lets it wait for
milliseconds, many times per exchange, and compute that was to hide the exchange ends before it. Realtime threads have a
core at once; they need little of it. What a stream of high priority is to NCCL, this is to gloo.

Not beside isend and irecv, as pipelines use them: there the thread that computes holds a connection's lock while it
writes, gloo's thread asks for that lock again and again instead of waiting, and a realtime one on the same core never
lets go of it. A transfer of 22 ms then takes a second, after which Linux takes the core away. Collectives do all of
that in gloo's threads; this project uses nothing else.

Measured by benchmarks/gloo_threads.py; its figures are in benchmarks/results/gloo_threads.json.

A realtime thread needs a right: root, CAP_SYS_NICE, or a limit of realtime priority above 0 (`ulimit -r`). Linux only.
"""

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from enum import StrEnum
from pathlib import Path

_TASKS = Path("/proc/self/task")
_NAMES = ("gloo", "pt_gloo")
"""How the names of gloo's own threads and of those of torch that wait for them begin."""

_NEVER_WAITED = "\nvoluntary_ctxt_switches:\t0\n"
_NAMED_WITHIN_S = 1.0

_PRIORITY = 1
"""The lowest of the realtime priorities: ahead of compute, behind everything else that is realtime."""


class GlooThreads(StrEnum):
    """When gloo's threads get a core."""

    auto = "auto"
    realtime = "realtime"
    ordinary = "ordinary"


def set_gloo_threads(wish: GlooThreads | str) -> bool:
    """Put the gloo threads of this process ahead of compute, or in line with it.

    A process group that is made later brings threads of its own: call it again. Only for jobs whose transfers over gloo
    are collectives: with send and receive, realtime threads can keep compute from a core (top of this file).

    Args:
        wish: one of `GlooThreads`, or its value: ``realtime``; ``auto``, that where this process may; ``ordinary``, as
            they were made.

    Returns:
        Whether this process has gloo threads and they are realtime now.

    Raises:
        ValueError: `wish` is ``realtime`` and this process may not, or this system has no such threads.
    """
    wish = GlooThreads(wish)
    if not _is_known():
        if wish is GlooThreads.realtime:
            raise ValueError(
                "gloo_threads=realtime needs Linux, which says what a thread is called; use gloo_threads=ordinary"
            )
        return False
    realtime = wish is not GlooThreads.ordinary
    policy, priority = (_realtime(), _PRIORITY) if realtime else (os.SCHED_OTHER, 0)
    try:
        for thread in _gloo_threads():
            with suppress(ProcessLookupError):  # it ended in between
                if os.sched_getscheduler(thread) != policy:
                    os.sched_setscheduler(thread, policy, os.sched_param(priority))
    except PermissionError:
        if wish is GlooThreads.realtime:
            raise ValueError(
                "gloo_threads=realtime: this process may not have realtime threads; run it as root or with "
                "CAP_SYS_NICE, raise its limit (ulimit -r 1), or use gloo_threads=ordinary"
            ) from None
    return gloo_threads_are_realtime()


def gloo_threads_are_realtime() -> bool:
    """Whether this process has gloo threads and all of them are ahead of compute."""
    policies = set()
    for thread in _gloo_threads() if _is_known() else ():
        with suppress(ProcessLookupError):
            policies.add(os.sched_getscheduler(thread))
    return bool(policies) and policies == {_realtime()}


def _is_known() -> bool:
    return _TASKS.is_dir() and hasattr(os, "sched_setscheduler")


def _realtime() -> int:
    """The policy. Threads that gloo's threads start are ordinary again, whatever they start them for."""
    return os.SCHED_FIFO | os.SCHED_RESET_ON_FORK


def _gloo_threads() -> Iterator[int]:
    """Their numbers, by which Linux knows them."""
    until = time.monotonic() + _NAMED_WITHIN_S
    for task in _TASKS.iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):
            while not (named := _is_named_for_gloo(task)) and _is_new(task) and time.monotonic() < until:
                time.sleep(0.001)
            if named:
                yield int(task.name)


def _is_named_for_gloo(task: Path) -> bool:
    return (task / "comm").read_text().startswith(_NAMES)


def _is_new(task: Path) -> bool:
    """Whether a thread has not waited for anything so far. gloo's threads name themselves before they wait."""
    return _NEVER_WAITED in (task / "status").read_text()
