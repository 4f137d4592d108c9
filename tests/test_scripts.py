"""The scripts that make calls: the link tree, the count of checked files, the installation."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script as a module, with its neighbours importable as they are when it is started."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small_checkout(folder: Path) -> Path:
    """A project of the same shape with one faulty module in a mapped folder."""
    shutil.copytree(ROOT / "scripts", folder / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    for name in ("farskip", "models", "parallel", "triton_kernels", "launch", "conf"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text('"""A folder."""\n', encoding="utf-8")
    (folder / "farskip" / "core.py").write_text("def number() -> int:\n    return 1\n", encoding="utf-8")
    (folder / "models" / "user.py").write_text(
        "from farskip.core import number\n\n\ndef text() -> str:\n    return number()\n", encoding="utf-8"
    )
    return folder


def test_the_link_tree_resolves_every_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As make test-gpu uses it: nothing installed (-S hides the environment), only the tree on the path."""
    link_tree = script("link_tree", monkeypatch)
    checkout = small_checkout(tmp_path)
    link_tree.build_link_tree(checkout)
    (checkout / "farskip" / "gone.py").touch()
    tree = link_tree.build_link_tree(checkout)
    assert (tree / "farskip" / "gone.py").exists()
    (checkout / "farskip" / "gone.py").unlink()
    link_tree.build_link_tree(checkout)
    assert sorted(path.name for path in (tree / "farskip").iterdir()) == sorted(
        ["__init__.py", "core.py", "models", "parallel", "triton_kernels", "launch", "conf"]
    )
    program = "import farskip.models.user, farskip.conf; print(farskip.models.user.number())"
    done = subprocess.run(
        [sys.executable, "-S", "-P", "-c", program], capture_output=True, text=True, env={"PYTHONPATH": str(tree)}
    )
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


def test_types_are_checked_across_folders(tmp_path: Path) -> None:
    checkout = small_checkout(tmp_path)
    command = [sys.executable, str(checkout / "scripts" / "check_types.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 1, done.stdout + done.stderr
    assert 'models/user.py:5: error: Incompatible return value type (got "int", expected "str")' in done.stdout
    (checkout / "models" / "user.py").write_text(
        "from farskip.core import number\n\nVALUE = number()\n", encoding="utf-8"
    )
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert (done.returncode, done.stdout) == (0, "Success: no issues found in 8 source files\n")


@pytest.mark.parametrize(
    ("report", "count"),
    [
        ("Success: no issues found in 22 source files\n", 22),
        ("Success: no issues found in 1 source file\n", 1),
        ("x.py:1: error: y\nFound 3 errors in 1 file (checked 22 source files)\n", 22),
        ("mypy: can't read file\n", 0),
    ],
)
def test_the_count_is_read_from_the_report(report: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert script("check_types", monkeypatch).checked_files(report) == count


@pytest.mark.parametrize("checked", [0, 7])
def test_too_few_checked_files_fail(
    checked: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check_types = script("check_types", monkeypatch)
    report = f"Success: no issues found in {checked} source files\n"
    monkeypatch.setattr(
        check_types.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, stdout=report)
    )
    assert check_types.main(small_checkout(tmp_path)) == 1
    assert f"mypy checked {checked} of 8 files" in capsys.readouterr().out


def test_an_old_python_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install = script("install", monkeypatch)
    monkeypatch.setattr(install, "MINIMUM", (99, 0))
    with pytest.raises(RuntimeError, match=r"^farskip needs Python 3\.11 or newer.*make PYTHON=python3\.12$"):
        install.create(tmp_path / "venv")
    assert not (tmp_path / "venv").exists()


def test_a_failed_installation_leaves_no_stamp(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So that the next make tries again; pip is replaced by a program that fails after two lines."""
    install = script("install", monkeypatch)
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    python = venv / "bin" / "python"
    python.write_text("#!/bin/sh\ncase $3 in --version) exit 0;; esac\necho Collecting x\necho ERROR: no x\nexit 3\n")
    python.chmod(0o755)
    assert install.main([str(venv), "constraints.txt"]) == 1
    assert "pip ended with 3" in (error := capsys.readouterr().err)
    assert error.rstrip().endswith("ERROR: no x")
    assert not (venv / ".installed").exists()


@pytest.mark.parametrize("target", ["demo", "test", "test-slow", "lint", "clean"])
def test_make_has_the_targets(target: str) -> None:
    if shutil.which("make") is None:
        pytest.skip("needs make")
    # -n prints; `+` and $(shell ...) parts run, and none of them changes anything.
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    }
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def make(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """make without what an outer make hands down."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    }
    return subprocess.run(["make", *words], cwd=cwd, capture_output=True, text=True, env=environment)


def test_make_test_gpu_collects_only_files_with_such_tests(tmp_path: Path) -> None:
    """And runs them from the source tree with a Python that has none of the package installed (-n: not here)."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "tests" / "farskip").mkdir(parents=True)
    (tmp_path / "tests" / "test_plain.py").write_text("import hydra\n", encoding="utf-8")
    (tmp_path / "pyproject.toml").touch()
    done = make("-n", "test-gpu", cwd=tmp_path)
    assert done.returncode == 2
    assert "no test is marked gpu" in done.stderr
    mark = "pytestmark = pytest.mark." + "gpu\n"
    (tmp_path / "tests" / "farskip" / "test_cuda.py").write_text(mark, encoding="utf-8")
    done = make("-n", "test-gpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith(" tests/farskip/test_cuda.py")


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        ("import models\n\nmodels.x()\n", "TID251"),
        ("from triton_kernels.route import route\n\nroute()\n", "TID251"),
        ("from . import wiring\n\nwiring.x()\n", "TID252"),
        ("COUNT = 0\n\n\ndef f() -> None:\n    global COUNT\n    COUNT += 1\n", "PLW0603"),
        ("from farskip.models.attach import attach\n\nx_TD = attach(h_BSD=1)\n", None),
    ],
    ids=["folder", "other-project", "relative", "global", "suffixes"],
)
def test_ruff_enforces_the_rules_of_the_house(source: str, rule: str | None) -> None:
    command = [sys.executable, "-P", "-m", "ruff", "check", "--output-format=concise", "--stdin-filename"]
    done = subprocess.run([*command, "farskip/planted.py", "-"], cwd=ROOT, input=source, capture_output=True, text=True)
    assert (done.returncode == 0) is (rule is None), done.stdout
    assert rule is None or f" {rule} " in done.stdout
