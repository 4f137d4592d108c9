"""Builds `.link_tree/farskip`, a real folder in which every module stands where it is imported from.

It holds one symlink per file of the core and one per mapped folder, so `PYTHONPATH=.link_tree` resolves
`farskip.models` without an installation (make test-gpu), and mypy sees the whole package (scripts/check_types.py).
Standard library only.
"""

import shutil
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def mapped_folders(root: Path = ROOT) -> dict[str, Path]:
    """The folders of the package, read from pyproject.toml.

    Args:
        root: The checkout.

    Returns:
        Package name ("farskip", "farskip.models", ...) to folder.
    """
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    return {name: root / folder for name, folder in settings["tool"]["setuptools"]["package-dir"].items()}


def source_files(root: Path = ROOT) -> list[Path]:
    """Every Python file of the package, in order of their path."""
    return sorted(path for folder in mapped_folders(root).values() for path in folder.rglob("*.py"))


def build_link_tree(root: Path = ROOT) -> Path:
    """Writes the tree anew, so that a deleted module does not live on in it.

    Args:
        root: The checkout.

    Returns:
        The folder to put on the path; `farskip` is inside.
    """
    tree = root / ".link_tree"
    if tree.exists():
        shutil.rmtree(tree)
    package = tree / "farskip"
    package.mkdir(parents=True)
    for name, folder in mapped_folders(root).items():
        if name == "farskip":
            for path in sorted(folder.iterdir()):
                if path.suffix == ".py" or path.name == "py.typed":
                    (package / path.name).symlink_to(path)
        else:
            (package / name.removeprefix("farskip.")).symlink_to(folder)
    return tree


if __name__ == "__main__":
    print(build_link_tree().relative_to(ROOT))
