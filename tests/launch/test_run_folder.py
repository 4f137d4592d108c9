"""The run folder: one run at a time, and nothing is left in a folder that was refused."""

import multiprocessing
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from farskip.launch import run_folder
from farskip.launch.run_folder import check_run_folder, held_folder


def hold(folder: Path, is_held: Event, is_over: Event) -> None:
    """In another process."""
    with held_folder(folder):
        is_held.set()
        is_over.wait(60)


def test_a_folder_is_one_runs_at_a_time(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    is_held, is_over, folder = context.Event(), context.Event(), tmp_path / "run"
    other = context.Process(target=hold, args=(folder, is_held, is_over))
    other.start()
    assert is_held.wait(60)
    with (
        pytest.raises(ValueError, match=rf"^run.folder=.*run is in use by another run \(process {other.pid} on "),
        held_folder(folder),
    ):
        pass
    other.kill()  # the system lets go of what a dead process held
    other.join()
    with held_folder(folder):
        check_run_folder(folder, resume=False)
    assert list(folder.iterdir()) == []


def test_a_folder_that_nothing_came_of_is_gone(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wrong"), held_folder(tmp_path / "run"):
        raise ValueError("wrong")
    assert not (tmp_path / "run").exists()
    (tmp_path / "mine").mkdir()
    with held_folder(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").is_dir(), "the folder was there before"
    with held_folder(tmp_path / "used"):
        (tmp_path / "used" / "model").touch()
    assert (tmp_path / "used" / "model").exists()


def test_other_ranks_hold_nothing(tmp_path: Path) -> None:
    with held_folder(tmp_path / "run"), held_folder(tmp_path / "run", rank=1):
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_a_file_system_without_locks_is_no_hindrance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(run_folder.fcntl, "flock", refuse)
    with held_folder(tmp_path / "run"):
        pass
