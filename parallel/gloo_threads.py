"""gloo's threads, ahead of those that compute.

gloo moves bytes in threads of its own. Every step of a transfer (room in a socket, rows that came, the next term of a
sum) waits until its thread has a core. Where ranks compute on all cores, Linux's fair scheduler lets it wait for
milliseconds, many times per exchange, and compute that was to hide the exchange ends before it. Realtime threads have a
core at once; they need little of it. What a stream of high priority is to NCCL, this is to gloo.

Measured by benchmarks/gloo_threads.py; its figures are in benchmarks/results/gloo_threads.json.

A realtime thread needs a right: root, CAP_SYS_NICE, or a limit of realtime priority above 0 (`ulimit -r`). Linux only.
"""

import os
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path

_TASKS = Path("/proc/self/task")
_NAMES = ("gloo", "pt_gloo")
"""How the names of gloo's own threads and of those of torch that wait for them begin."""

_PRIORITY = 1
"""The lowest of the realtime priorities: ahead of compute, behind everything else that is realtime."""


class GlooThreads(StrEnum):
    """When gloo's threads get a core."""

    auto = "auto"
    realtime = "realtime"
    ordinary = "ordinary"


def set_gloo_threads(wish: GlooThreads | str) -> bool:
    """Put the gloo threads of this process ahead of compute, or in line with it.

    A process group that is made later brings threads of its own: call it again.

    Args:
        wish: one of `GlooThreads`, or its value: ``realtime``; ``auto``, that where this process may; ``ordinary``, as
            they were made.

    Returns:
        Whether this process has gloo threads and they are realtime now.

    Raises:
        ValueError: `wish` is ``realtime`` and this process may not, or this system has no such threads.
    """
    wish = GlooThreads(wish)
    try:
        return _set(wish is not GlooThreads.ordinary)
    except PermissionError:
        if wish is GlooThreads.realtime:
            raise ValueError(
                "gloo_threads=realtime: this process may not have realtime threads; run it as root or with "
                "CAP_SYS_NICE, raise its limit (ulimit -r 1), or use gloo_threads=ordinary"
            ) from None
        return False
    except NotImplementedError:
        if wish is GlooThreads.realtime:
            raise ValueError(
                "gloo_threads=realtime needs Linux, which says what a thread is called; use gloo_threads=ordinary"
            ) from None
        return False


def _set(realtime: bool) -> bool:
    if not _TASKS.is_dir() or not hasattr(os, "sched_setscheduler"):
        raise NotImplementedError
    # Threads that they start are ordinary again, whatever they start them for.
    policy = os.SCHED_FIFO | os.SCHED_RESET_ON_FORK if realtime else os.SCHED_OTHER
    found = False
    for thread in _gloo_threads():
        try:
            if os.sched_getscheduler(thread) != policy:
                os.sched_setscheduler(thread, policy, os.sched_param(_PRIORITY if realtime else 0))
        except ProcessLookupError:  # it ended in between
            continue
        found = True
    return found and realtime


def _gloo_threads() -> Iterator[int]:
    """Their numbers, by which Linux knows them."""
    for task in _TASKS.iterdir():
        try:
            name = (task / "comm").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if name.startswith(_NAMES):
            yield int(task.name)
