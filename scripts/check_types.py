"""Runs mypy over the whole package through the link tree, and fails if it checked fewer files than there are.

On the editable install mypy follows next to nothing and reports success; the count is what tells the two apart.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

# The script's own folder is on sys.path when it is started by its path.
from link_tree import ROOT, build_link_tree, source_files


def checked_files(report: str) -> int:
    """Number of files that mypy's last line claims; 0 where it claims none."""
    found = re.search(r"(?:checked|in) (\d+) source files?\b", report)
    return int(found[1]) if found else 0


def original_paths(report: str) -> str:
    """The report with the tree's paths written as the checkout's, so that an editor can open them."""
    report = re.sub(r"^farskip/(?=(?:models|parallel|triton_kernels|launch|conf)/)", "", report, flags=re.MULTILINE)
    return report


def main(root: Path = ROOT) -> int:
    """Checks the package.

    Args:
        root: The checkout.

    Returns:
        The exit code: mypy's, or 1 where it checked too few files.
    """
    tree = build_link_tree(root)
    expected = len(source_files(root))
    command = [sys.executable, "-P", "-m", "mypy", "--config-file", str(root / "pyproject.toml")]
    command += ["--cache-dir", str(root / ".mypy_cache"), "farskip"]
    environment = os.environ | {"MYPYPATH": str(tree)}
    finished = subprocess.run(
        command, cwd=tree, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    sys.stdout.write(original_paths(finished.stdout))
    checked = checked_files(finished.stdout)
    if checked < expected:
        print(f"check_types: mypy checked {checked} of {expected} files; see .link_tree and [tool.setuptools]")
        return finished.returncode or 1
    return finished.returncode


if __name__ == "__main__":
    sys.exit(main())
