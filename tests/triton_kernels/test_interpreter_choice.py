"""The folder's conftest decides for the interpreter in time, and copes where somebody imported triton before."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow  # sessions of pytest inside sessions

HERE = Path(__file__).resolve().parent

DUMMY = {
    "torch": "import torch\ndef test_dummy():\n    assert torch.ones(1).sum() == 1\n",
    "triton": "import torch, triton\ndef test_dummy():\n    assert triton.JITFunction is not None\n",
}

INSIDE = """
import torch
from farskip.triton_kernels.route import route

def test_kernel_runs():
    assert route(torch.randn(3, 4), 2, backend="triton").experts.shape == (3, 2)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels are compiled")
@pytest.mark.parametrize("earlier", list(DUMMY))
def test_a_session_that_collected_other_tests_before(tmp_path: Path, earlier: str) -> None:
    """One module of this folder passes and one fails, so that a child process that ran nothing would be noticed."""
    (tmp_path / "tests" / "earlier").mkdir(parents=True)
    (tmp_path / "tests" / "kernels").mkdir()
    (tmp_path / "tests" / "earlier" / "test_dummy.py").write_text(DUMMY[earlier])
    (tmp_path / "tests" / "kernels" / "conftest.py").write_text((HERE / "conftest.py").read_text())
    (tmp_path / "tests" / "kernels" / "test_good.py").write_text(INSIDE)
    (tmp_path / "tests" / "kernels" / "test_wrong.py").write_text(INSIDE.replace("(3, 2)", "(3, 1)"))
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\ntimeout = 100\n")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 2 passed" in done.stdout
