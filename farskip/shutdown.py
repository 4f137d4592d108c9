"""An orderly end: a request that a signal handler sets, a deadline for the last save, and one line for a peer that no
longer answers.

Decides: what a signal does (it sets a flag; ranks agree on it at the next step boundary) and how torch's errors about
dead or late ranks are told to the user.
Refuses: to install a handler by itself; launch does, through ``ShutdownRequest.install``.
"""

import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch


class ShutdownRequest:
    """A flag that says: stop at the next step boundary."""

    def __init__(self) -> None:
        self._requested = False
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether this rank was asked to stop."""
        return self._requested

    def request(self) -> None:
        """Ask for the stop, as a signal would."""
        self._requested = True

    def install(self, *signals: int) -> None:
        """Let the given signals (SIGTERM if none) set the flag. Only from the main thread."""
        for number in signals or (signal.SIGTERM,):
            self._previous[number] = signal.signal(number, self._handle)

    def uninstall(self) -> None:
        """Put back the handlers that were there before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._requested = True


def give_up(message: str) -> None:
    """Print one line to stderr and end the process with exit code 1, without waiting for any thread."""
    print(message, file=sys.stderr, flush=True)
    os._exit(1)


@contextmanager
def deadline(seconds: float, message: str, *, on_expiry: Callable[[str], None] = give_up) -> Iterator[None]:
    """Run the body; when it takes longer than ``seconds``, call ``on_expiry(message)`` from another thread.

    A body that hangs in a file system or a collective cannot be interrupted from Python, hence the end of the process
    by default.
    """
    timer = threading.Timer(seconds, on_expiry, args=(message,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


# What gloo, NCCL and the store say about a peer that died or is late; gloo raises a plain RuntimeError.
_PEER_TROUBLE = re.compile(
    r"gloo/|\bNCCL\b|ncclCommAbort|Connection (?:closed|reset|refused)|Timed out waiting|Watchdog caught collective"
    r"|monitoredBarrier|Broken pipe|Socket Timeout|wait timeout",
    re.IGNORECASE,
)
_NAMED_PEER = re.compile(r"\branks?:?\s*\[?(\d+(?:\s*,\s*\d+)*)", re.IGNORECASE)


@contextmanager
def peer_errors(rank: int, doing: Callable[[], str], *, world_size: int = 0) -> Iterator[None]:
    """Turn torch's error about a dead or late peer into one line; every other exception passes unchanged.

    Args:
        rank: this rank.
        doing: what was going on, asked only when it is needed: "after step 12".
        world_size: of the ranks that talk; of two ranks, it is always the other one.

    Raises:
        RuntimeError: "rank 0: no answer from rank 1 after step 12 ..."; the peer is named where that is known.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_peer_error(error):
            raise
        text = " ".join(str(error).split())
        named = sorted({int(n) for m in _NAMED_PEER.finditer(text) for n in m.group(1).split(",")} - {rank})
        if not named and world_size == 2:
            named = [1 - rank]
        who = ("rank " if len(named) == 1 else "ranks ") + ", ".join(map(str, named)) if named else "another rank"
        raise RuntimeError(
            f"rank {rank}: no answer from {who} {doing()}: {_first_sentence(text)}; "
            "nothing more was saved, look at the log of the rank that ended first and resume from the last checkpoint"
        ) from error


def is_peer_error(error: BaseException) -> bool:
    """Whether the exception tells of a peer that died or is late."""
    if torch.distributed.is_available() and isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and _PEER_TROUBLE.search(str(error)) is not None


def _first_sentence(text: str) -> str:
    """Without the source location that gloo puts in front, and without what follows the first full stop."""
    text = re.sub(r"^\[[^\]]*\]\s*", "", text)
    return re.split(r"\.\s", text, maxsplit=1)[0][:200]
