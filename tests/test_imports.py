"""Importing a module of ours changes nothing but `sys.modules`, and what must do without torch does."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "farskip": "farskip",
    "models": "farskip.models",
    "parallel": "farskip.parallel",
    "triton_kernels": "farskip.triton_kernels",
    "launch": "farskip.launch",
    "conf": "farskip.conf",
}

# Third-party modules are imported first, so that what they do to the process is not held against ours.
PROGRAM = """
import importlib, json, logging, os, random, signal, sys, threading, warnings
import torch, torch.distributed, numpy
theirs, ours = json.loads(sys.stdin.read())
missing = []
for name in theirs:
    try:
        importlib.import_module(name)
    except ImportError as error:
        missing.append(f"{name}: {error}")

def state():
    return {
        "process group": torch.distributed.is_initialized(),
        "CUDA": torch.cuda.is_initialized(),
        "environment": dict(os.environ),
        "threads": threading.active_count(),
        "torch threads": torch.get_num_threads(),
        "default dtype": str(torch.get_default_dtype()),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "torch's random state": hash(bytes(torch.get_rng_state().tolist())),
        "random state": hash(random.getstate()),
        "numpy's random state": hash(numpy.random.get_state()[1].tobytes()),
        "sys.path": list(sys.path),
        "working folder": os.getcwd(),
        "files": sorted(os.listdir()),
        "signal handlers": [str(signal.getsignal(number)) for number in sorted(signal.valid_signals())],
        "logging": [str(handler) for handler in logging.getLogger().handlers] + [logging.getLogger().level],
        "warning filters": len(warnings.filters),
        "excepthook": str(sys.excepthook),
    }

changes = {}
for name in ours:
    before = state()
    try:
        importlib.import_module(name)
    except BaseException as error:
        changes[name] = f"{type(error).__name__}: {error}"
        continue
    after = state()
    differing = [key for key in before if before[key] != after[key]]
    if differing:
        changes[name] = differing
print(json.dumps({"missing": missing, "changes": changes}))
"""

WITHOUT_TORCH = (
    "farskip",
    "farskip.batch",
    "farskip.launch.doctor",
    "farskip.launch.main",
    "farskip.launch.simulate",
    "farskip.launch.trace",
    "farskip.models.model_shape",
    "farskip.parallel.degrees",
    "farskip.schedule",
    "farskip.simulator",
    "farskip.stage_costs",
    "farskip.stage_graph",
    "farskip.what_if",
    "farskip.wiring",
)

BLOCKING_PROGRAM = """
import importlib, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ImportError(f"{name} was imported")

sys.meta_path.insert(0, Block())
importlib.import_module(sys.argv[1])
"""


def modules() -> list[str]:
    found = []
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).glob("*.py")):
            found.append(package if path.stem == "__init__" else f"{package}.{path.stem}")
    return found


def third_party() -> list[str]:
    """What our files import at their top, so outside of functions."""
    names = set()
    for folder in FOLDERS:
        for path in (ROOT / folder).glob("*.py"):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.Import):
                    names |= {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    names.add(node.module)
    return sorted(name for name in names if name.partition(".")[0] != "farskip")


def without_torch() -> list[str]:
    traces = [name for name in modules() if name.startswith("farskip.trace")]
    return sorted((set(WITHOUT_TORCH) & set(modules())) | set(traces))


def side_effects(names: list[str], folder: Path, path: Path | None = None) -> dict[str, object]:
    """What importing each of the modules changed, in one fresh process whose working folder is `folder`."""
    start = f"import sys; sys.path.insert(0, {str(path)!r})\n" if path else ""
    done = subprocess.run(
        [sys.executable, "-P", "-c", start + PROGRAM],
        input=json.dumps([third_party(), names]),
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["missing"] == []
    return report["changes"]


def test_importing_changes_nothing(tmp_path: Path) -> None:
    assert side_effects(modules(), tmp_path) == {}


_PLANTED = {
    "environment": "import os\nos.environ['FARSKIP_X'] = '1'",
    "threads": "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
    "process group": (
        "import tempfile, torch.distributed as dist\n"
        "store = dist.FileStore(tempfile.mkdtemp() + '/store', 1)\n"
        "dist.init_process_group('gloo', store=store, rank=0, world_size=1)"
    ),
    "torch threads": "import torch\ntorch.set_num_threads(3)",
    "torch's random state": "import torch\ntorch.manual_seed(12345)",
    "signal handlers": "import signal\nsignal.signal(signal.SIGTERM, lambda *_: None)",
    "files": "open('left_behind', 'w').close()",
    "logging": "import logging\nlogging.basicConfig()",
}


@pytest.mark.slow
def test_planted_side_effects_are_found(tmp_path: Path) -> None:
    names = {}
    for number, (effect, source) in enumerate(_PLANTED.items()):
        (tmp_path / f"planted_{number}.py").write_text(source, encoding="utf-8")
        names[f"planted_{number}"] = effect
    # The folder for bytecode is made by the first import, which is not what is measured.
    (tmp_path / "__pycache__").mkdir()
    changes = side_effects(list(names), tmp_path, tmp_path)
    assert {name: effect in changes.get(name, []) for name, effect in names.items()} == dict.fromkeys(names, True)


@pytest.mark.parametrize("name", without_torch())
def test_works_without_torch(name: str) -> None:
    done = subprocess.run([sys.executable, "-P", "-c", BLOCKING_PROGRAM, name], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_block_blocks() -> None:
    words = [sys.executable, "-P", "-c", BLOCKING_PROGRAM, "farskip.testing"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1
    assert "torch was imported" in done.stderr
