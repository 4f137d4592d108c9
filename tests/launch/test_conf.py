"""Every key in conf/ is one that a command's --help explains."""

import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

CONF = Path(__file__).resolve().parents[2] / "conf"
OF_HYDRA = ("defaults", "hydra")
"""Blocks that Hydra documents."""

PROGRAM = "import sys; from farskip.launch.main import main; sys.exit(main([*sys.argv[1].split('_'), '--help']))"


@cache
def explained(command: str) -> frozenset[str]:
    """The dotted keys that a command lists with an explanation below; bench_overlap is `farskip bench overlap`."""
    done = subprocess.run([sys.executable, "-P", "-c", PROGRAM, command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return frozenset(re.findall(r"^  ([\w.]+)=.*\n(?:    \S.*\n)*      +\S", done.stdout, flags=re.MULTILINE))


def keys(node: Any, prefix: str = "") -> Iterator[str]:
    """The dotted keys of a YAML file, inner ones included."""
    if isinstance(node, dict):
        for name, value in node.items():
            if prefix or name not in OF_HYDRA:
                yield f"{prefix}{name}"
                yield from keys(value, f"{prefix}{name}.")


def unexplained(found: Iterator[str], known: frozenset[str]) -> list[str]:
    """Keys that are no setting, no group of settings and nothing inside a setting (which may be a mapping)."""
    return [
        key for key in found if not any(key == k or key.startswith(f"{k}.") or k.startswith(f"{key}.") for k in known)
    ]


def primary() -> list[Path]:
    return sorted(CONF.glob("*.yaml"))


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONF)))
def test_every_key_is_explained(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# "), "the first line says what the file is for"
    group = path.parent.relative_to(CONF).as_posix()
    prefix = "" if group == "." else f"{group.replace('/', '.')}."
    commands = [path] if group == "." else primary()
    content = OmegaConf.to_container(OmegaConf.create(text))
    missing = [unexplained(keys(content, prefix), explained(command.stem)) for command in commands]
    # A group serves the commands whose configuration has it.
    assert min(missing, key=len) == []


def test_an_unexplained_key_is_found() -> None:
    found = keys({"defaults": ["x"], "run": {"seed": 1, "sed": 2}, "model": {"config": {"any": 1}}})
    assert unexplained(found, frozenset({"run.seed", "model.config"})) == ["run.sed"]
