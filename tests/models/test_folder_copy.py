"""Copies of parts of files, sizes in words, and folders that appear whole or not at all."""

import os
from pathlib import Path

import pytest

from farskip.models import folder_copy
from farskip.models.folder_copy import append_bytes, replaced_when_complete, size_text


@pytest.mark.parametrize(("start", "count"), [(0, 10), (3, 5), (9, 1), (10, 0), (0, 0)])
def test_a_part_of_a_file_is_appended(start: int, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_copy, "_PIECE_BYTES", 3)
    (tmp_path / "source").write_bytes(b"0123456789")
    seen: list[int] = []
    with open(tmp_path / "target", "xb") as target:
        os.write(target.fileno(), b"head:")
        append_bytes(tmp_path / "source", target.fileno(), start, count, seen.append)
    assert (tmp_path / "target").read_bytes() == b"head:" + b"0123456789"[start : start + count]
    assert sum(seen) == count and all(1 <= each <= 3 for each in seen)


def test_a_shorter_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"0123456789")
    with (
        open(tmp_path / "target", "xb") as target,
        pytest.raises(ValueError, match="source: it became shorter while it was copied"),
    ):
        append_bytes(tmp_path / "source", target.fileno(), 3, 8, lambda count: None)


def test_parents_that_were_made_for_nothing_go_again(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()

    def fill() -> None:
        with replaced_when_complete(tmp_path / "old" / "new" / "deeper" / "folder") as fresh:
            (fresh / "file").touch()
            raise KeyError

    with pytest.raises(KeyError):
        fill()
    assert list(tmp_path.rglob("*")) == [tmp_path / "old"]


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (10_240_000_000, "10.2 GB"), (2.5e15, "2500.0 TB")],
)
def test_sizes_in_words(num_bytes: int, text: str) -> None:
    assert size_text(num_bytes) == text


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    (real / "old").touch()
    link.symlink_to(real)
    with replaced_when_complete(link) as fresh:
        (fresh / "new").touch()
    assert link.is_symlink() and [path.name for path in real.iterdir()] == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_two_writers_of_one_place_do_not_meet(tmp_path: Path) -> None:
    """As on two machines with one disk, where process numbers repeat: the one that fails removes its own work only."""
    with replaced_when_complete(tmp_path / "model") as fresh:
        (fresh / "mine").touch()
        with pytest.raises(OSError, match="disk"), replaced_when_complete(tmp_path / "model"):
            raise OSError("disk")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["mine"]
