"""The run folder: whether a run may use it, and the settings that are written into it. Does not import torch."""

import os
from pathlib import Path
from typing import Any

_CONFIG = "config.yaml"

STAGE_TIMES = "stage_times.json"
"""Milliseconds of stages, forward and backward, as the warm-up measured them; `farskip simulate --times` reads it."""


def check_run_folder(folder: Path, *, resume: bool, wiring: Any = None) -> None:
    """Refuse a folder that already holds a finished or begun run, before any work is done.

    Args:
        folder: of the run.
        resume: whether a run that it holds is to be continued.
        wiring: the settings of the wiring, which a run keeps to its end; None where there are none.

    Raises:
        ValueError: the folder is in use and `resume` is off, its run has another wiring, or nothing can be written
            there.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"run.folder={folder} is a file: give a folder")
    if not resume and folder.exists() and any(folder.iterdir()):
        raise ValueError(f"run.folder={folder} is not empty: give another folder, or run.resume=true to continue")
    if resume and wiring is not None:
        _check_wiring(folder, wiring)
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"run.folder={folder}: cannot write in {nearest}; give a folder in a place of yours")


def _check_wiring(folder: Path, wiring: Any) -> None:
    """A checkpoint holds weights, and weights fit any wiring: only the settings beside it tell which one it was."""
    from omegaconf import OmegaConf

    path = folder / _CONFIG
    if not path.is_file():
        return
    before: Any = OmegaConf.to_container(OmegaConf.load(path)).get("wiring", {})  # type: ignore[union-attr]
    now: Any = OmegaConf.to_container(OmegaConf.structured(wiring))
    for key, value in now.items():
        if before.get(key, value) != value:
            raise ValueError(
                f"wiring.{key}={value}, and the run in {folder} has wiring.{key}={before[key]}: resume it with that, "
                "or start another one in another run.folder"
            )


def write_config(config: Any, folder: Path) -> None:
    """config.yaml in the run folder: every setting of the run, as it was resolved."""
    from omegaconf import OmegaConf

    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / _CONFIG, OmegaConf.to_yaml(OmegaConf.structured(config)))


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    part.rename(path)
