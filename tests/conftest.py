"""What every test may ask for: ranks, snapshots, tools of the machine. `gpu` and `multi_gpu` skip by themselves."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from farskip.testing import RankPool


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-snapshots", action="store_true", help="write the snapshots anew instead of comparing")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # A file of kernels is one long item, a process of its own: started last, one would keep one core busy alone.
    items.sort(key=lambda item: item.path.parent.name != "triton_kernels")
    needed = {item: 2 if item.get_closest_marker("multi_gpu") else 1 for item in items if _needs_gpu(item)}
    if not needed:
        return
    import torch

    found = torch.cuda.device_count()
    for item, count in needed.items():
        if found < count:
            item.add_marker(pytest.mark.skip(reason=f"needs {count} CUDA device(s), this machine has {found}"))


def _needs_gpu(item: pytest.Item) -> bool:
    return any(item.get_closest_marker(name) for name in ("gpu", "multi_gpu"))


@pytest.fixture(scope="session")
def rank_pool() -> "Iterator[RankPool]":
    """`rank_pool.run(fn, world_size, *args)`: gloo ranks that are started once per session and serve every size."""
    from farskip.testing import RankPool

    with RankPool() as pool:
        yield pool


@pytest.fixture
def require() -> Callable[..., str]:
    """`require("chromium")`: the tool's path, `require("root")`: the user; a skip without them, in CI a failure."""

    def check(name: str, *alternatives: str) -> str:
        """The first of several names of one tool that this machine has."""
        if name == "root":
            if os.geteuid() == 0:
                return "root"
        else:
            for candidate in (name, *alternatives):
                path = shutil.which(candidate)
                if path:
                    return path
        reason = f"needs {name}, which this machine lacks"
        if os.environ.get("CI", "").lower() == "true":
            pytest.fail(f"{reason}, and CI is set: .ci/run installs it")
        pytest.skip(reason)

    return check


@pytest.fixture
def check_snapshot(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`check_snapshot(text, "name.txt")` compares with that file beside the test; `--update-snapshots` writes it."""

    def check(text: str, name: str) -> None:
        path = Path(request.path).parent / name
        if request.config.getoption("--update-snapshots"):
            path.write_text(text, encoding="utf-8")
        assert path.exists(), f"{path.name} does not exist: run pytest --update-snapshots and read what it wrote"
        expected = path.read_text(encoding="utf-8")
        assert text == expected, f"differs from {path.name}; if that is meant: pytest --update-snapshots"

    return check
