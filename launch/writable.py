"""Whether a place can be written, asked before the work whose result goes there. Does not import torch."""

import os
from pathlib import Path


def check_file(what: str, path: str | Path) -> None:
    """Refuse a file that could not be written.

    Args:
        what: option or setting and its value, as typed.
        path: of the file; its folder has to exist.

    Raises:
        ValueError: it is a folder, or its folder does not exist or is not ours to write in.
    """
    folder = Path(path).absolute().parent
    if not folder.exists():
        raise ValueError(f"{what}: the folder {Path(path).parent} does not exist; create it first")
    if Path(path).is_dir():
        raise ValueError(f"{what}: this is a folder; give a file")
    check_place(what, path)


def check_place(what: str, path: str | Path) -> None:
    """Refuse a place that could not be written, with or without the folders that lead to it.

    Args:
        what: option or setting and its value, as typed.
        path: of a file or folder.

    Raises:
        ValueError: the nearest folder that exists is not ours to write in.
    """
    whole = Path(path).absolute()
    nearest = next((parent for parent in whole.parents if parent.exists()), whole)
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"{what}: cannot write in {nearest}; give a place of yours")
