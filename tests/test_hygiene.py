"""What is in the repository reads the same on every machine, and says what it must."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# The folder of somebody's machine; "me" and "you" are nobody. Written so that the pattern does not match itself.
MACHINE_PATH = re.compile(r"(?<![\w.~$})-])/(?:work|root|home|Users|opt|mnt|scratch)/(?!me\b|you\b)[\w.]")
INDEX_OPTION = re.compile(r"(?:extra-)?index-url|find-links|trusted-host|file:/{2}/?[a-z]")


def tracked() -> list[Path]:
    """The files git knows or would add; without git (an sdist), every file outside hidden folders."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode == 0 and listed.stdout:
        return sorted(ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file())
    return sorted(path for path in ROOT.rglob("*") if path.is_file() and "/." not in str(path.relative_to(ROOT)))


def text_of(path: Path) -> str:
    """The file's text; empty for a binary file."""
    content = path.read_bytes()
    return "" if b"\0" in content else content.decode("utf-8")


def machine_traces(text: str) -> list[str]:
    """Lines that only make sense on one machine."""
    return [line for line in text.splitlines() if MACHINE_PATH.search(line) or INDEX_OPTION.search(line)]


def test_nothing_names_a_machine() -> None:
    assert ROOT / "pyproject.toml" in tracked()
    found = {
        str(path.relative_to(ROOT)): lines
        for path in tracked()
        if path != Path(__file__) and (lines := machine_traces(text_of(path)))
    }
    assert found == {}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("see /" + "home/someone/x", 1),
        ("open('/" + "work/main')", 1),
        ("pip install --" + "index-url https://example.org", 1),
        ("file:" + "///srv/wheels", 1),
        ("data.path=/home/me/corpus", 0),
        ("cd ~/home/x and runs/home/x, https://x.org/home/y", 0),
        ("../home/x ${X}/home/x", 0),
    ],
)
def test_a_planted_machine_is_found(text: str, found: int) -> None:
    assert len(machine_traces(text)) == found


def test_lines_end_plainly() -> None:
    """No carriage returns, one newline at the end."""
    bad = []
    for path in tracked():
        text = text_of(path)
        if "\r" in text or (text and not text.endswith("\n")):
            bad.append(str(path.relative_to(ROOT)))
    assert bad == []


def test_no_file_is_large() -> None:
    """A clone stays small: a recorded trace is gzipped, a figure is drawn by a command."""
    assert [str(path.relative_to(ROOT)) for path in tracked() if path.stat().st_size > 2**20] == []


def test_the_changelog_has_the_version() -> None:
    changelog = text_of(ROOT / "CHANGELOG.md")
    version = re.search(r'^version = "(.*)"$', text_of(ROOT / "pyproject.toml"), re.MULTILINE)
    assert version is not None
    assert f"## [{version[1]}]" in changelog or "## [Unreleased]" in changelog


def test_the_marks_of_the_tests_are_the_ones_make_knows() -> None:
    """A `slow` test that is marked in another way would run nowhere."""
    marks = set()
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        marks |= set(re.findall(r"pytest\.mark\.(\w+)", text_of(path)))
    assert marks <= {
        "parametrize",
        "slow",
        "gpu",
        "multi_gpu",
        "timeout",
        "skipif",
        "skip",
        "xfail",
        "filterwarnings",
        "usefixtures",
    }
