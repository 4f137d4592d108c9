"""Copies of big files, and folders that are replaced when they are complete.

Nothing here shares blocks or links with the original: a copy is a copy. A folder is written under a temporary name
beside its place, brought to the disk, and renamed; if anything goes wrong, nothing of it is left.
"""

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_PIECE_BYTES = 16 << 20
_NOT_FROM_FILE_TO_FILE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSOCK, errno.EOPNOTSUPP)
"""How `sendfile` says that it cannot be used here: some file systems, and systems where it only serves sockets."""


def append_bytes(source: Path, target: int, start: int, count: int, progress: Callable[[int], None]) -> None:
    """Append `count` bytes of a file, from `start` on, to an open one. Holds at most one piece in memory.

    Args:
        source: the file.
        target: descriptor of the open one.
        start: first byte.
        count: how many.
        progress: told how many were copied since the last time.

    Raises:
        ValueError: the file is shorter.
    """
    in_kernel = hasattr(os, "sendfile")
    with open(source, "rb", buffering=0) as file:
        while count:
            piece = min(count, _PIECE_BYTES)
            if in_kernel:
                try:
                    copied = os.sendfile(target, file.fileno(), start, piece)
                except OSError as error:
                    if error.errno not in _NOT_FROM_FILE_TO_FILE:
                        raise
                    in_kernel = False
                    continue
            else:
                content = os.pread(file.fileno(), piece, start)
                append(target, content)
                copied = len(content)
            if copied == 0:
                raise ValueError(f"{source}: it became shorter while it was copied; is somebody writing it?")
            start, count = start + copied, count - copied
            progress(copied)


def size_text(num_bytes: int) -> str:
    """A size for people: ``10.2 GB``."""
    size, unit = float(num_bytes), "bytes"
    for bigger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, bigger
    return f"{size:.0f} bytes" if unit == "bytes" else f"{size:.1f} {unit}"


def append(target: int, content: bytes) -> None:
    """Write all bytes to an open file."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(target, rest) :]


@contextmanager
def replaced_when_complete(folder: Path) -> Iterator[Path]:
    """A fresh folder beside `folder` that takes its place at the end of the block, on the disk to the last byte.

    If the block fails, the fresh folder is removed, with the parents that were made for it, and `folder` is as before.
    """
    folder = folder.resolve()  # a link stays where it is, and what it leads to is replaced
    new_parents = [parent for parent in folder.parents if not parent.exists()]
    fresh = _name_beside(folder, "part")
    made = complete = False
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh.mkdir()
        made = True
        yield fresh
        _bring_to_disk(fresh)
        _exchange(folder, fresh)
        complete = True
    finally:
        if not complete:
            if made:
                shutil.rmtree(fresh, ignore_errors=True)
            for parent in new_parents:
                if parent.exists() and not any(parent.iterdir()):
                    parent.rmdir()


def _exchange(folder: Path, fresh: Path) -> None:
    if not folder.exists():
        fresh.rename(folder)
        return
    replaced = _name_beside(folder, "replaced")
    folder.rename(replaced)
    try:
        fresh.rename(folder)
    except BaseException:
        replaced.rename(folder)
        raise
    shutil.rmtree(replaced)


def _name_beside(folder: Path, ending: str) -> Path:
    """A name that nobody else has, be it a process of another machine."""
    return folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.{ending}")


def _bring_to_disk(folder: Path) -> None:
    """A rename that survives a power failure must not name files that do not."""
    for path in [*folder.iterdir(), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
