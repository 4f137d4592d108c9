"""Kernels under test: on a GPU they are compiled, without one they run in Triton's interpreter.

Triton decides which when it is first imported, from TRITON_INTERPRET, once per process. So the variable is set here,
before any test module of this folder is imported. Where something else imported triton earlier without it (another
folder's tests, a plugin), the tests of this folder run in a child process instead, file by file.
"""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

VARIABLE = "TRITON_INTERPRET"


def decided_for_compiler() -> bool:
    """Whether triton is imported already and took itself for a compiler, on a machine where it cannot run kernels."""
    if "triton" not in sys.modules or torch.cuda.is_available():
        return False
    from farskip.triton_kernels.common_triton import INTERPRETING

    return not INTERPRETING


if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ[VARIABLE] = "1"


class ChildItem(pytest.Item):
    """A test module that runs in a process of its own."""

    def runtest(self) -> None:
        words = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(self.path)]
        words += ["--rootdir", str(self.config.rootpath), "-c", str(self.config.inipath or os.devnull)]
        done = subprocess.run(words, env={**os.environ, VARIABLE: "1"}, capture_output=True, text=True)
        if done.returncode not in (0, int(pytest.ExitCode.NO_TESTS_COLLECTED)):
            pytest.fail(f"{self.path.name} failed in its own process:\n{done.stdout}\n{done.stderr}", pytrace=False)


class ChildModule(pytest.File):
    """Stands for a test module that this process cannot run."""

    def collect(self) -> Iterator[pytest.Item]:
        item = ChildItem.from_parent(self, name="in_a_process_of_its_own")
        item.add_marker(pytest.mark.timeout(600))
        if self.path.stem == "test_interpreter_choice":  # as its own mark says where it runs in this process
            item.add_marker(pytest.mark.slow)
        yield item


def pytest_pycollect_makemodule(module_path: Path, parent: Any) -> pytest.File | None:
    return ChildModule.from_parent(parent, path=module_path) if decided_for_compiler() else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Triton 3.6's interpreter makes loop bounds of one-element arrays, which its numpy (below 2.4) warns of."""
    quiet = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(quiet)


@pytest.fixture(autouse=True)
def as_quiet_as_a_gpu() -> Iterator[None]:
    """The interpreter computes with numpy, which warns of infinities and NaNs, in masked lanes too; a GPU does not."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels run: "cuda" compiled, "cpu" interpreted."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def relative_error() -> Callable[[torch.Tensor, torch.Tensor], float]:
    """Norm of the difference over the norm of the reference, in fp64; a reference of zero must be met exactly."""

    def measure(value: torch.Tensor, reference: torch.Tensor) -> float:
        assert value.shape == reference.shape
        reference = reference.detach().double().cpu()
        difference = (value.detach().double().cpu() - reference).norm()
        return float(difference / reference.norm()) if reference.norm() > 0 else float(difference)

    return measure


@pytest.fixture
def poison_empty() -> Iterator[None]:
    """Memory that nobody wrote reads as NaN, or as the smallest integer."""
    fill, deterministic = (
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.are_deterministic_algorithms_enabled(),
    )
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill


OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.fixture
def check_op() -> Callable[..., None]:
    """torch's own checks of a custom op: schema, fake tensor, autograd, compilation with dynamic shapes."""

    def check(op: Any, *args: Any) -> None:
        with warnings.catch_warnings():
            # torch 2.15's own check looks at .grad of tensors that are no leaves
            warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf", UserWarning)
            report = torch.library.opcheck(op, args, test_utils=OPCHECKS)
        assert report == dict.fromkeys(OPCHECKS, "SUCCESS")

    return check
