"""What is built holds everything, and nothing but `farskip` lands in site-packages."""

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = {name: ROOT / folder for name, folder in SETTINGS["tool"]["setuptools"]["package-dir"].items()}
BESIDE = {"tests", "scripts", "benchmarks", "docs"}
"""Folders with Python files that are no part of the package."""

LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv*", ".link_tree", ".*_cache", ".hypothesis", "__pycache__", "*.egg-info", "build", "dist", "runs",
    "outputs", "multirun",
)  # fmt: skip


def shipped() -> set[str]:
    """What the wheel must hold beside its own metadata, by its name in the wheel."""
    names = {"farskip/py.typed"}
    for package, folder in FOLDERS.items():
        for path in [*folder.rglob("*.py"), *folder.rglob("*.yaml")]:
            names.add(f"{package.replace('.', '/')}/{path.relative_to(folder)}")
    return names


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the wheel and the sdist, built from a copy: a build leaves files that the next one would pick up."""
    source = tmp_path_factory.mktemp("source") / "farskip"
    shutil.copytree(ROOT, source, ignore=LEFT_OUT)
    out = tmp_path_factory.mktemp("built")
    command = [
        sys.executable,
        "-P",
        "-m",
        "build",
        "--no-isolation",
        "--outdir",
        str(out),
        "--sdist",
        "--wheel",
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    (path,) = built.glob("*.whl")
    return zipfile.ZipFile(path)


def test_every_folder_with_code_is_listed() -> None:
    """A folder that is missing from `packages` works in an editable installation and is absent from the wheel."""
    assert set(SETTINGS["tool"]["setuptools"]["packages"]) == set(FOLDERS)
    with_code = {
        path.name
        for path in ROOT.iterdir()
        if path.is_dir() and not path.name.startswith(".") and next(path.rglob("*.py"), None) is not None
    }
    assert with_code - BESIDE - {"build"} == {folder.name for folder in FOLDERS.values()}


@pytest.mark.parametrize("package", FOLDERS)
def test_folders_are_packages_and_flat(package: str) -> None:
    folder = FOLDERS[package]
    assert (folder / "__init__.py").is_file(), "a folder without it cannot be imported in an editable installation"
    assert package == "farskip" or package == f"farskip.{folder.name}"
    nested = [path for path in folder.rglob("*.py") if path.parent != folder]
    assert nested == [], "a package inside a folder would have to be listed, and is forgotten without a warning"


def test_no_module_has_the_name_of_a_folder() -> None:
    """`farskip/models.py` would hide the folder models/."""
    names = {package.partition(".")[2] for package in FOLDERS} - {""}
    assert not [
        path for name in names for path in (ROOT / "farskip" / name, ROOT / "farskip" / f"{name}.py") if path.exists()
    ]


def test_the_wheel_holds_everything_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if not name.endswith("/")}
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == shipped()
    assert {name.partition("/")[0] for name in inside} == {"farskip"}


def test_the_wheel_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    (folder,) = {name.partition("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    text = email.message_from_bytes(wheel.read(f"{folder}/METADATA"))
    assert (text["Name"], text["Version"]) == ("farskip", SETTINGS["project"]["version"])
    assert (text["License-Expression"], text["Requires-Python"]) == ("Apache-2.0", ">=3.11")
    assert text.get_all("Provides-Extra") == ["megatron", "test"]
    assert f"{folder}/licenses/LICENSE" in wheel.namelist()
    assert "farskip = farskip.launch.main:main" in wheel.read(f"{folder}/entry_points.txt").decode()


def test_the_sdist_holds_what_the_tests_need(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {str(path.relative_to(ROOT)) for folder in FOLDERS.values() for path in folder.rglob("*.py")}
    needed |= {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("*.py")}
    needed |= {"Makefile", "constraints.txt", "LICENSE", "scripts/link_tree.py", ".ci/run"}
    assert needed - names == set()


def test_the_installed_wheel_works(built: Path, tmp_path: Path) -> None:
    """Away from the checkout, without what the editable installation adds to the path."""
    (path,) = built.glob("*.whl")
    zipfile.ZipFile(path).extractall(tmp_path)
    assert {entry.name for entry in tmp_path.iterdir() if not entry.name.endswith(".dist-info")} == {"farskip"}
    program = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in str(f)]\n"
        "from farskip.launch.main import main; import farskip.conf, farskip.models; print(farskip.models.__file__)\n"
        "sys.exit(main(['--help']))"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "farskip" / "models"))


def names_of(requirements: list[str]) -> set[str]:
    return {re.split(r"[^A-Za-z0-9_.-]", text)[0].lower().replace("_", "-") for text in requirements}


def test_constraints_name_a_version_of_every_dependency() -> None:
    """And no index, file or hash: those belong to the machine that installs."""
    lines = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    assert not [line for line in lines if not re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9.]+", line)]
    project = SETTINGS["project"]
    direct = names_of(project["dependencies"]).union(*map(names_of, project["optional-dependencies"].values()))
    assert direct - names_of(lines) == set()
