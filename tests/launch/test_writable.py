"""Places that cannot be written are refused in one line before anything is computed."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from farskip.launch import writable
from farskip.testing_traces import training_trace

Command = Callable[[list[str]], tuple[int, str, str]]


@pytest.fixture
def locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that nobody may write in, be it root: as the system answers for a file system mounted read-only."""
    folder = tmp_path / "locked"
    folder.mkdir()
    monkeypatch.setattr(writable.os, "access", lambda path, mode: Path(path) != folder and os.path.exists(path))
    return folder


COMMANDS = {
    "convert": (["convert", "nowhere", "FILE", "--wiring", "farskip"], "OUT FILE: "),
    "simulate --json": (["simulate", "--num-layers", "2", "--json", "FILE"], "--json FILE: "),
    "simulate --png": (["simulate", "--num-layers", "2", "--png", "FILE"], "--png FILE: "),
    "trace --html": (["trace", "TRACE", "--html", "FILE"], "--html FILE: "),
    "trace --junit": (["trace", "TRACE", "--assert", "overlap >= 1%", "--junit", "FILE"], "--junit FILE: "),
    "doctor --json": (["doctor", "--json", "FILE"], "--json FILE: "),
    "bench overlap out": (["bench", "overlap", "link=local", "out=FILE"], "out=FILE: "),
}


@pytest.mark.parametrize(("words", "names"), COMMANDS.values(), ids=COMMANDS)
def test_a_folder_that_is_not_ours(
    words: list[str], names: str, locked: Path, tmp_path: Path, farskip_command: Command
) -> None:
    file = str(locked / "x.json")
    trace = str(training_trace(rank=0).write(tmp_path / "rank0.json"))
    code, out, error = farskip_command([word.replace("FILE", file).replace("TRACE", trace) for word in words])
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert f"{names.replace('FILE', file)}cannot write in {locked}; give a place of yours" in error
    assert list(locked.iterdir()) == []


def test_a_file_is_not_a_folder_and_its_folder_is_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^--json X: this is a folder; give a file$"):
        writable.check_file("--json X", tmp_path)
    with pytest.raises(ValueError, match=r"^--json X: the folder .*absent does not exist; create it first$"):
        writable.check_file("--json X", tmp_path / "absent" / "x.json")
    writable.check_file("--json X", tmp_path / "x.json")
    writable.check_place("OUT X", tmp_path / "absent" / "deep" / "x")
    writable.check_place("OUT /", "/")
