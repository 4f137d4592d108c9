"""Builds the virtual environment that `make` works in: one line while it runs, the end of the log where it fails.

Decides nothing about versions (pyproject.toml and the constraints file do) and does not touch the calling Python.
Usage: python3 scripts/install.py VENV [CONSTRAINTS]. Standard library only.
"""

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MINIMUM = (3, 11)
SECONDS_PER_LINE = 15
"""Between two lines of progress where the output is not a terminal."""


def create(venv: Path) -> None:
    """Creates the environment, or keeps the one that is there if its pip runs.

    Args:
        venv: Its folder.

    Raises:
        RuntimeError: This Python is too old or cannot create environments.
    """
    if sys.version_info < MINIMUM:
        raise RuntimeError(
            f"farskip needs Python 3.11 or newer, {sys.executable} is {sys.version.split()[0]}; make PYTHON=python3.12"
        )
    python = venv / "bin" / "python"
    if python.exists() and subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0:
        return
    made = subprocess.run([sys.executable, "-m", "venv", "--clear", venv], capture_output=True, text=True)
    if made.returncode:
        raise RuntimeError(
            f"{sys.executable} -m venv {venv} failed (on Debian: apt-get install python3-venv): {made.stdout[-300:]}"
        )


def show(line: str, started: float, last: float) -> float:
    """Writes what pip is doing: over the same line on a terminal, else one line every few seconds.

    Args:
        line: A line of pip's output.
        started: When pip was started, in seconds of `time.monotonic`.
        last: When a line was last written.

    Returns:
        When a line was last written, now included.
    """
    now = time.monotonic()
    text = " ".join(line.split())[:70]
    if sys.stdout.isatty():
        print(f"\r  {now - started:4.0f} s  {text:<70}", end="", flush=True)
        return now
    if now - last >= SECONDS_PER_LINE:
        print(f"  {now - started:4.0f} s  {text}", flush=True)
        return now
    return last


def install(venv: Path, constraints: str) -> None:
    """Installs the checkout, editable, with what the tests need.

    Args:
        venv: The environment.
        constraints: File with the versions to install, or "" for the newest that pyproject.toml allows.

    Raises:
        RuntimeError: pip failed; the message ends with the end of its log.
    """
    command = [str(venv / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check"]
    command += ["--progress-bar", "off", "--editable", f"{ROOT}[test,megatron]"]
    if constraints:
        command += ["--constraint", constraints]
    started = time.monotonic()
    last = started
    log = venv / "install.log"
    with (
        log.open("w", encoding="utf-8") as kept,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip,
    ):
        assert pip.stdout is not None, "the output was asked for as a pipe"
        for line in pip.stdout:
            kept.write(line)
            if not line.startswith(("Requirement already satisfied", "Looking in")):
                last = show(line, started, last)
    if sys.stdout.isatty():
        print()
    if pip.returncode:
        tail = "".join(log.read_text(encoding="utf-8").splitlines(keepends=True)[-25:])
        raise RuntimeError(f"pip ended with {pip.returncode}; the whole log is {log}\n{tail}")
    print(f"  installed in {time.monotonic() - started:.0f} s, log in {log}", flush=True)


def main(argv: list[str]) -> int:
    """Creates the environment and leaves the stamp that make compares with pyproject.toml and the constraints.

    Args:
        argv: The environment's folder, and the constraints file or nothing.

    Returns:
        The exit code.
    """
    venv = Path(argv[0])
    print(f"Installing farskip and what it needs into {venv} (once; a few minutes and up to 6 GB)", flush=True)
    try:
        create(venv)
        install(venv, argv[1] if len(argv) > 1 else "")
    except RuntimeError as error:
        print(f"install: {error}", file=sys.stderr)
        return 1
    (venv / ".installed").touch()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
