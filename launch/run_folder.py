"""The run folder: whether a run may use it, and the settings that are written into it. Does not import torch."""

import fcntl
import itertools
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from farskip.launch.hydra_command import documented_keys
from farskip.launch.writable import check_place

_CONFIG, _LOCK = "config.yaml", ".lock"

STAGE_TIMES = "stage_times.json"
"""Milliseconds of stages, forward and backward, as the warm-up measured them; `farskip simulate --times` reads it."""


_KEPT = ("model", "wiring")
"""Sections of the settings that a run keeps to its end: a checkpoint's weights and optimizer fit others too, so nothing
else would notice."""


@contextmanager
def held_folder(folder: Path, rank: int = 0) -> Iterator[None]:
    """Have a run folder for oneself while the body runs, on rank 0 of the job. The system lets go of it if the process
    dies.

    Raises:
        ValueError: another run has it, or nothing can be written there.
    """
    if rank != 0:
        yield
        return
    _check_place(folder)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _LOCK
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino
        except BlockingIOError:
            is_ours = False
        except OSError:  # a file system without locks
            is_ours = True
        if not is_ours:
            file.seek(0)
            raise ValueError(
                f"run.folder={folder} is in use by another run ({file.read().strip() or 'it just began or ended'}): "
                "give another folder, or wait for its end"
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            if is_new:
                with suppress(OSError):  # it is not empty: a run has begun
                    folder.rmdir()


def check_run_folder(folder: Path, *, resume: bool, config: Any = None) -> list[str]:
    """Refuse a folder that already holds a finished or begun run, before any work is done.

    Args:
        folder: of the run.
        resume: whether a run that it holds is to be continued.
        config: the settings of the run; None where there are none to compare.

    Returns:
        What a resumed run does otherwise than before, as ``key=value (was value)``.

    Raises:
        ValueError: the folder is in use and `resume` is off, its run has another model or wiring, or nothing can be
            written there.
    """
    if not resume and folder.is_dir() and any(path.name != _LOCK for path in folder.iterdir()):
        raise ValueError(f"run.folder={folder} is not empty: give another folder, or run.resume=true to continue")
    _check_place(folder)
    return _changed(folder, config) if resume and config is not None and (folder / _CONFIG).is_file() else []


def _check_place(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"run.folder={folder} is a file: give a folder")
    check_place(f"run.folder={folder}", folder / _LOCK)


def _changed(folder: Path, config: Any) -> list[str]:
    """Settings that are not those of the run so far, unless they have to be."""
    from omegaconf import OmegaConf

    before, now, unknown = OmegaConf.load(folder / _CONFIG), OmegaConf.structured(config), object()
    changed = []
    for key, _, _ in documented_keys(config):
        was, is_now = OmegaConf.select(before, key, default=unknown), OmegaConf.select(now, key)
        if was is unknown or was == is_now or key.startswith("run."):
            continue
        if key.split(".")[0] in _KEPT:
            raise ValueError(
                f"{key}={is_now}, and the run in {folder} has {key}={was}: resume it with that, "
                "or start another one in another run.folder"
            )
        changed.append(f"{key}={is_now} (was {was})")
    return changed


def write_config(config: Any, folder: Path) -> None:
    """config.yaml in the run folder: every setting of the run, as it was resolved. One with other settings, of before
    the run was resumed, stays as config.1.yaml and so on."""
    from omegaconf import OmegaConf

    folder.mkdir(parents=True, exist_ok=True)
    settings = OmegaConf.structured(config)
    settings.run.resume = False  # how a run was called, nothing that it is
    path, text = folder / _CONFIG, OmegaConf.to_yaml(settings)
    if path.is_file() and path.read_text() != text:
        number = next(number for number in itertools.count(1) if not (folder / f"config.{number}.yaml").exists())
        path.rename(folder / f"config.{number}.yaml")
    write_text(path, text)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    part.rename(path)
