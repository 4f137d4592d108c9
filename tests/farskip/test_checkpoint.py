"""Checkpoints: whole or not at all, sharded tensors once, damage told in one line, the best and the newest kept."""

import errno
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from farskip import checkpoint
from farskip.checkpoint import MANIFEST, CheckpointStore, Progress, latest_checkpoint, read_manifest
from farskip.testing import RankPool
from farskip.testing_training import ReplicatedRanks, TinyModule
from farskip.training_protocols import SingleProcess

CPU = torch.device("cpu")
TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(2.5)}


def _store(folder: Path, keep_last: int = 2) -> CheckpointStore:
    return CheckpointStore(folder, SingleProcess(torch.nn.Linear(1, 1)), keep_last=keep_last, device=CPU)


def _empty(names: set[str]) -> dict[str, Tensor]:
    return {name: torch.full_like(TENSORS[name], -1.0) for name in names}


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    progress = Progress(step=7, best_value=0.1 + 0.2, best_step=5, num_worse=1)
    state: dict[str, Any] = {
        "data": {"next": 3, "order": [1, 2]},
        "rng": torch.get_rng_state(),
        "none": None,
        "python": (3, (1, 2), None),
    }
    path = _store(tmp_path).save(TENSORS, state, progress)
    filled: dict[str, Tensor] = {}

    def tensors_for(names: set[str]) -> dict[str, Tensor]:
        filled.update(_empty(names))
        return filled

    loaded, loaded_progress = _store(tmp_path).load(path, tensors_for)
    assert loaded_progress == progress
    assert loaded["data"] == state["data"] and loaded["python"] == state["python"] and loaded["none"] is None
    assert torch.equal(loaded["rng"], state["rng"])
    assert filled.keys() == TENSORS.keys()
    assert all(torch.equal(filled[name], TENSORS[name]) for name in TENSORS)
    assert path == tmp_path / "step_00000007" == latest_checkpoint(tmp_path)
    manifest = read_manifest(path)
    assert (manifest.step, manifest.world_size, manifest.torch) == (7, 1, torch.__version__)
    assert set(manifest.files) == set(_names(path)) - {MANIFEST}


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    store = _store(tmp_path)
    for step in range(1, 6):
        store.save(TENSORS, {}, Progress(step=step), is_best=step == 2)
    assert _names(tmp_path) == ["best", "step_00000002", "step_00000004", "step_00000005"]
    assert (tmp_path / "best").resolve() == tmp_path / "step_00000002"
    assert read_manifest(tmp_path / "best").step == 2
    store.save(TENSORS, {}, Progress(step=6), is_best=True)
    assert _names(tmp_path) == ["best", "step_00000005", "step_00000006"]


def test_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    store = _store(tmp_path)
    store.save(TENSORS, {"try": 1}, Progress(step=1))
    path = store.save(TENSORS, {"try": 2}, Progress(step=1))
    assert store.load(path, _empty)[0] == {"try": 2}
    assert _names(tmp_path) == ["step_00000001"]


def test_leftovers_are_no_checkpoint_and_are_replaced(tmp_path: Path) -> None:
    store = _store(tmp_path)
    store.save(TENSORS, {}, Progress(step=1))
    (tmp_path / "step_00000002.tmp").mkdir()
    (tmp_path / "step_00000002.tmp" / "half").write_text("x")
    (tmp_path / "step_00000003").mkdir()
    assert latest_checkpoint(tmp_path) == tmp_path / "step_00000001"
    assert latest_checkpoint(tmp_path / "nowhere") is None
    with pytest.raises(
        ValueError, match=r"step_00000003 is not a checkpoint: it has no manifest\.json; move it away and resume from"
    ):
        store.load(tmp_path / "step_00000003", _empty)
    path = store.save(TENSORS, {}, Progress(step=2))
    assert "half" not in _names(path)


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "rank_00000.pt"])
@pytest.mark.parametrize(("damage", "message"), [(_truncate, "it is truncated"), (Path.unlink, "is missing")])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, damage: Callable[[Path], None], message: str) -> None:
    path = _store(tmp_path).save(TENSORS, {}, Progress(step=1))
    damage(path / name)
    with pytest.raises(
        ValueError, match=rf"{name} .*{message}.*; move it away and resume from another checkpoint"
    ) as caught:
        _store(tmp_path).load(path, _empty)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "rank_00000.pt"])
def test_a_file_of_the_right_size_but_wrong_content_is_told(tmp_path: Path, name: str) -> None:
    path = _store(tmp_path).save(TENSORS, {}, Progress(step=1))
    (path / name).write_bytes(b"x" * (path / name).stat().st_size)
    with pytest.raises(
        ValueError, match=r"cannot be read: .*; move it away and resume from another checkpoint"
    ) as caught:
        _store(tmp_path).load(path, _empty)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 1}'])
def test_a_damaged_manifest_is_told(tmp_path: Path, content: str) -> None:
    path = _store(tmp_path).save(TENSORS, {}, Progress(step=1))
    (path / MANIFEST).write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json cannot be read .*; move it away and resume from another"):
        read_manifest(path)


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = _store(tmp_path).save(TENSORS, {}, Progress(step=1))
    content = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(content | {"format": 9}))
    with pytest.raises(ValueError, match="has checkpoint format 9, this farskip reads 1"):
        read_manifest(path)


def test_another_model_is_refused(tmp_path: Path) -> None:
    path = _store(tmp_path).save(TENSORS, {}, Progress(step=1))
    with pytest.raises(ValueError, match="b is in the checkpoint but not in the model"):
        _store(tmp_path).load(path, lambda names: {"a": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match="c is in the model but not in the checkpoint"):
        _store(tmp_path).load(path, lambda names: {**_empty(names), "c": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"a has shape \(2, 3\) in the checkpoint and \(3, 2\) in the model"):
        _store(tmp_path).load(path, lambda names: {**_empty(names), "a": torch.zeros(3, 2)})


class _FullDisk:
    """A stand-in for a function that writes: it writes a little, then the disk is full."""

    def __init__(self, when: Callable[..., bool] = lambda *args: True) -> None:
        self._when = when
        self._original = checkpoint._write_file

    def __call__(self, path: Path, content: bytes) -> None:
        if self._when(path):
            path.write_bytes(content[:1])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._original(path, content)


@pytest.mark.parametrize("name", ["rank_00000.pt", MANIFEST])
def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_new(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = _store(tmp_path)
    store.save(TENSORS, {}, Progress(step=1), is_best=True)
    monkeypatch.setattr(checkpoint, "_write_file", _FullDisk(lambda path: path.name == name))
    with pytest.raises(RuntimeError, match=r"step_00000002 was not written: rank 0: .*No space left") as caught:
        store.save(TENSORS, {}, Progress(step=2), is_best=True)
    assert "\n" not in str(caught.value)
    assert _names(tmp_path) == ["best", "step_00000001"]
    assert store.load(tmp_path / "best", _empty)[1].step == 1


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"),
    ],
)
def test_a_full_disk_under_the_tensors(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.save", _fail_on_tensors(torch.save, error))
    store = _store(tmp_path)
    with pytest.raises(RuntimeError, match=r"was not written: rank 0: .*No space left"):
        store.save(TENSORS, {}, Progress(step=2))
    assert _names(tmp_path) == []


def _fail_on_tensors(original: Callable[..., None], error: Exception) -> Callable[..., None]:
    def save(content: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(content, Tensor):
            raise error
        original(content, *args, **kwargs)

    return save


@pytest.mark.slow
def test_a_really_full_disk(tmp_path: Path, require: Callable[..., str]) -> None:
    require("root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], check=True)
    try:
        store = _store(disk)
        store.save(TENSORS, {}, Progress(step=1))
        with pytest.raises(RuntimeError, match="was not written: rank 0: ") as caught:
            store.save({"a": torch.zeros(2**20)}, {}, Progress(step=2))
        assert "\n" not in str(caught.value)
        assert _names(disk) == ["step_00000001"]
        store.load(disk / "step_00000001", _empty)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


class _Sharded(ReplicatedRanks):
    """Parameters named "experts" are cut along their first dimension."""

    def __init__(self) -> None:
        super().__init__(TinyModule())
        self._mesh = init_device_mesh("cpu", (self.world_size,))

    def wrap_for_checkpoint(self, name: str, tensor: Tensor) -> Tensor:
        return DTensor.from_local(tensor, self._mesh, [Shard(0)], run_check=False) if "experts" in name else tensor


def _rank_saves_and_loads_shards(folder: str) -> tuple[list[float], dict[str, Any], list[int]]:
    ranks = _Sharded()
    store = CheckpointStore(Path(folder), ranks, keep_last=1, device=CPU)
    local = torch.arange(6.0).reshape(3, 2) + 100 * ranks.rank
    tensors = {"experts": ranks.wrap_for_checkpoint("experts", local), "shared": torch.tensor([1.0, 2.0])}
    path = store.save(tensors, {"rank": ranks.rank}, Progress(step=1))
    own = torch.zeros(3, 2)
    shared = torch.zeros(2)
    state, _ = store.load(path, lambda _: {"experts": ranks.wrap_for_checkpoint("experts", own), "shared": shared})
    assert torch.equal(own, local)
    return shared.tolist(), state, list(tensors["experts"].shape)


def test_two_ranks_write_shards_once_and_read_their_own(rank_pool: RankPool, tmp_path: Path) -> None:
    results = rank_pool.run(_rank_saves_and_loads_shards, 2, str(tmp_path))
    assert results == [([1.0, 2.0], {"rank": 0}, [6, 2]), ([1.0, 2.0], {"rank": 1}, [6, 2])]
    assert {"rank_00000.pt", "rank_00001.pt"} <= set(_names(tmp_path / "step_00000001"))


def _rank_has_no_space(folder: str, where: str) -> str:
    ranks = ReplicatedRanks(TinyModule())
    store = CheckpointStore(Path(folder), ranks, keep_last=2, device=CPU)
    store.save(TENSORS, {}, Progress(step=1))
    patch = pytest.MonkeyPatch()
    if ranks.rank == 1 and where == "rank file":
        patch.setattr(checkpoint, "_write_file", _FullDisk())
    if ranks.rank == 1 and where == "tensors":
        patch.setattr("torch.save", _fail_on_tensors(torch.save, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    try:
        with pytest.raises(RuntimeError, match="was not written") as caught:
            store.save({f"t{i}": torch.rand(8) for i in range(8)}, {}, Progress(step=2))
    finally:
        patch.undo()
    dist.barrier()
    assert _names(Path(folder)) == ["step_00000001"]
    dist.barrier()
    store.save(TENSORS, {}, Progress(step=3))
    return str(caught.value)


@pytest.mark.parametrize("where", ["rank file", "tensors"])
def test_one_rank_without_space_stops_all_of_them(rank_pool: RankPool, tmp_path: Path, where: str) -> None:
    first, second = rank_pool.run(_rank_has_no_space, 2, str(tmp_path), where, timeout_s=20)
    assert "rank 1: " in second and "No space left" in second
    assert ("see the message of rank 1" in first) or ("rank 1: " in first and "No space left" in first)
    assert _names(tmp_path) == ["step_00000001", "step_00000003"]


def test_a_rank_whose_files_are_elsewhere_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_elsewhere(path: Path, content: bytes) -> None:
        if path.name == MANIFEST:
            path.write_bytes(content)

    monkeypatch.setattr(checkpoint, "_write_file", write_elsewhere)
    with pytest.raises(RuntimeError, match=r"the file of rank 0 is not in .*; all ranks must share one file system"):
        _store(tmp_path).save(TENSORS, {}, Progress(step=1))
    assert _names(tmp_path) == []
