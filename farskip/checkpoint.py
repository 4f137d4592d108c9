"""Training checkpoints: written by torch.distributed.checkpoint into a temporary folder, renamed when every rank has
finished.

Decides: what a checkpoint is (a folder with a manifest, which is written last), what is kept, and how a damaged one is
told.

    checkpoints/step_00000200/    .metadata, __0_0.distcp ...   tensors: model and optimizer, sharded ones once
                                  rank_00000.pt ...             one file per rank: random numbers, position in the data
                                  manifest.json                 step, ranks, versions, progress, size of every file
    checkpoints/best -> step_00000200

Refuses: to read a folder without manifest, with a file missing or of another size, or of another model; to keep
anything of a checkpoint that could not be written whole. All ranks must see the same file system.
"""

import io
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from farskip.training_protocols import Communicator

MANIFEST = "manifest.json"
FORMAT = 1
TEMPORARY = ".tmp"
BEST = "best"
_ANOTHER = "move it away and resume from another checkpoint of the run"

_CUT_SHORT = "unexpected pos"
"""What torch's writer says when less was written than it gave, which a disk does that is full."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a run is, and what its held-out evaluations said.

    Attributes:
        step: optimizer steps taken.
        best_value: lowest held-out value so far.
        best_step: where it was measured.
        num_worse: evaluations since then.
    """

    step: int = 0
    best_value: float | None = None
    best_step: int | None = None
    num_worse: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What stands in manifest.json."""

    format: int
    step: int
    world_size: int
    torch: str
    farskip: str
    progress: Progress
    files: dict[str, int]


def latest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint with the highest step in a run's checkpoint folder, if there is one."""
    complete = _complete(folder)
    return complete[-1] if complete else None


def _complete(folder: Path) -> list[Path]:
    # The names are zero-padded: sorted by name is sorted by step. Temporary folders end otherwise, and have no
    # manifest.
    found = [path for path in folder.glob("step_*") if path.suffix != TEMPORARY and (path / MANIFEST).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def read_manifest(path: Path) -> Manifest:
    """Read a checkpoint's manifest and compare every file with it.

    Raises:
        ValueError: one line that names what is missing, truncated or foreign.
    """
    remedy = _ANOTHER
    if not (path / MANIFEST).is_file():
        raise ValueError(f"{path} is not a checkpoint: it has no {MANIFEST}; {remedy}")
    try:
        content = json.loads((path / MANIFEST).read_text())
        manifest = Manifest(**{**content, "progress": Progress(**content["progress"])})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path / MANIFEST} cannot be read ({error}); {remedy}") from error
    if manifest.format != FORMAT:
        raise ValueError(f"{path} has checkpoint format {manifest.format}, this farskip reads {FORMAT}")
    for name, size in manifest.files.items():
        if not (path / name).is_file():
            raise ValueError(f"{path / name} is missing from the checkpoint; {remedy}")
        found = (path / name).stat().st_size
        if found != size:
            raise ValueError(
                f"{path / name} has {found} bytes, the manifest says {size}: it is truncated or changed; {remedy}"
            )
    return manifest


class CheckpointStore:
    """One run's checkpoints. Every public method is a collective of all ranks.

    Args:
        folder: the run's ``checkpoints`` folder, on a file system that all ranks share.
        communicator: the ranks.
        keep_last: newest checkpoints kept; the best one stays besides.
        device: where the communicator reduces small tensors.
    """

    def __init__(self, folder: Path, communicator: Communicator, *, keep_last: int, device: torch.device) -> None:
        self.folder = folder
        self._communicator = communicator
        self._device = device
        self._keep_last = keep_last

    def path_of(self, step: int) -> Path:
        """The folder of one step's checkpoint."""
        return self.folder / f"step_{step:08d}"

    def save(
        self, tensors: dict[str, torch.Tensor], rank_state: dict[str, Any], progress: Progress, *, is_best: bool = False
    ) -> Path:
        """Write one checkpoint, or nothing.

        Args:
            tensors: equal names on every rank; sharded ones as DTensors.
            rank_state: plain values and tensors of this rank.
            progress: equal on every rank.
            is_best: let ``best`` point to it.

        Returns:
            The checkpoint's folder.

        Raises:
            RuntimeError: one line when any rank could not write; the half-written folder is gone, older checkpoints
                stay.
        """
        rank = self._communicator.rank
        path = self.path_of(progress.step)
        temporary = path.with_name(path.name + TEMPORARY)
        whole = False
        try:
            self._agree(lambda: _make_empty(temporary) if rank == 0 else None, path)
            self._agree(lambda: self._write(temporary, tensors, rank_state), path)
            self._agree(lambda: self._publish(temporary, path, progress, is_best) if rank == 0 else None, path)
            whole = True
        finally:
            if rank == 0 and not whole:
                shutil.rmtree(temporary, ignore_errors=True)
        return path

    def _write(self, temporary: Path, tensors: dict[str, torch.Tensor], rank_state: dict[str, Any]) -> None:
        buffer = io.BytesIO()
        torch.save(rank_state, buffer)
        # Before the collective write: a rank that fails alone in here must not leave the others inside a collective.
        own_error: OSError | None = None
        try:
            _write_file(temporary / _rank_file(self._communicator.rank), buffer.getvalue())
        except OSError as error:
            own_error = error
        with _quiet_single_process():
            dcp.save(
                tensors, storage_writer=dcp.FileSystemWriter(temporary), no_dist=self._communicator.world_size == 1
            )
        if own_error is not None:
            raise own_error

    def _publish(self, temporary: Path, path: Path, progress: Progress, is_best: bool) -> None:
        world_size = self._communicator.world_size
        missing = [r for r in range(world_size) if not (temporary / _rank_file(r)).is_file()]
        if missing:
            raise OSError(f"the file of rank {missing[0]} is not in {temporary}; all ranks must share one file system")
        manifest = Manifest(
            format=FORMAT,
            step=progress.step,
            world_size=world_size,
            torch=torch.__version__,
            farskip=_own_version(),
            progress=progress,
            files={file.name: file.stat().st_size for file in sorted(temporary.iterdir())},
        )
        _write_file(temporary / MANIFEST, json.dumps(asdict(manifest), indent=1, allow_nan=False).encode())
        if path.exists():
            # A run that resumed from an older checkpoint comes past this step again.
            replaced = path.with_name(path.name + ".replaced" + TEMPORARY)
            shutil.rmtree(replaced, ignore_errors=True)
            path.rename(replaced)
            temporary.rename(path)
            shutil.rmtree(replaced)
        else:
            temporary.rename(path)
        if is_best:
            link = self.folder / (BEST + TEMPORARY)
            link.unlink(missing_ok=True)
            link.symlink_to(path.name)
            link.replace(self.folder / BEST)
        self._prune()

    def _prune(self) -> None:
        best = self.folder / BEST
        kept_name = best.readlink().name if best.is_symlink() else None
        for old in _complete(self.folder)[: -self._keep_last]:
            if old.name != kept_name:
                # The manifest first: a removal that is cut off leaves no checkpoint that looks whole.
                (old / MANIFEST).unlink()
                shutil.rmtree(old)

    def load(
        self, path: Path, tensors_for: Callable[[set[str]], dict[str, torch.Tensor]]
    ) -> tuple[dict[str, Any], Progress]:
        """Read a checkpoint into existing tensors, in place.

        Args:
            path: the checkpoint's folder.
            tensors_for: given the names in the checkpoint, the tensors to fill.

        Returns:
            What this rank gave to ``save`` as ``rank_state``, and the progress. Of a checkpoint of another number of
            ranks: what rank 0 gave.

        Raises:
            ValueError: one line when it is damaged or of another model.
        """
        manifest, world_size = read_manifest(path), self._communicator.world_size
        try:
            with _quiet_single_process():
                reader = dcp.FileSystemReader(path)
                stored = reader.read_metadata().state_dict_metadata
                tensors = tensors_for(set(stored))
                _compare(path, stored, tensors)
                dcp.load(tensors, storage_reader=reader, no_dist=world_size == 1)
        except CheckpointException as error:
            raise ValueError(f"{path} cannot be read: {_first_failure(error)}; {_ANOTHER}") from error
        except (EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path / '.metadata'} cannot be read: {_one_line(error)}; {_ANOTHER}") from error
        rank_file = path / _rank_file(self._communicator.rank if manifest.world_size == world_size else 0)
        try:
            rank_state: dict[str, Any] = torch.load(rank_file, map_location="cpu", weights_only=True)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise ValueError(f"{rank_file} cannot be read: {_one_line(error)}; {_ANOTHER}") from error
        return rank_state, manifest.progress

    def _agree(self, action: Callable[[], None], path: Path) -> None:
        """Do something on this rank; every rank raises when any could not."""
        message = ""
        try:
            action()
        except CheckpointException as error:
            message = _first_failure(error)
        except OSError as error:
            message = f"rank {self._communicator.rank}: {_one_line(error)}"
        failed_R = torch.zeros(self._communicator.world_size, dtype=torch.float64, device=self._device)
        failed_R[self._communicator.rank] = bool(message)
        failed_R = self._communicator.sum_over_processes(failed_R)
        if failed_R.any():
            ranks = ", ".join(str(rank) for rank in failed_R.nonzero().flatten().tolist())
            raise RuntimeError(
                f"checkpoint {path} was not written: {message or f'see the message of rank {ranks}'}; "
                "earlier checkpoints are untouched, free some space or set another run folder and resume"
            )


def _compare(path: Path, stored: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    for name in sorted(stored.keys() ^ tensors.keys()):
        where = "the checkpoint but not in the model" if name in stored else "the model but not in the checkpoint"
        raise ValueError(f"{path}: {name} is in {where}; resume with the model and settings the run was started with")
    for name, tensor in tensors.items():
        size = tuple(stored[name].size)
        if size != tuple(tensor.shape):
            raise ValueError(
                f"{path}: {name} has shape {size} in the checkpoint and {tuple(tensor.shape)} in the model; "
                "resume with the model the run was started with"
            )


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _write_file(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.pt"


def _own_version() -> str:
    try:
        return metadata.version("farskip")
    except metadata.PackageNotFoundError:
        # Run from a source tree that is not installed.
        return "source"


@contextmanager
def _quiet_single_process() -> Iterator[None]:
    """Without torch's remark that one process saves alone, which is what was asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def _first_failure(error: CheckpointException) -> str:
    rank, (cause, _) = sorted(error.failures.items())[0]
    if _CUT_SHORT in str(cause):
        return f"rank {rank}: No space left: a file could not be written whole"
    return f"rank {rank}: {_one_line(cause)}"


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
