"""The life of one rank of `farskip.testing_ranks`: loads a test's function, runs it inside a process group, answers.

Decides how a function is found by file path and name (tests are not importable by name), and what a case starts with:
gloo over a file store, one thread, seed 0, the caller's warning filters. The process group is destroyed on every path.
"""

import contextlib
import faulthandler
import hashlib
import importlib
import importlib.util
import itertools
import pickle
import random
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

STACK_SIGNAL: signal.Signals | None = getattr(signal, "SIGUSR1", None)
"""On this signal a rank writes the stacks of its threads to its file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What one rank needs to run one case; `arguments` are unpickled after the function's module is loaded."""

    path: str
    module: str
    qualname: str
    arguments: bytes
    """Pickled positional and keyword arguments, and the caller's warning filters."""
    rank: int
    world_size: int
    store: str
    timeout_s: float


def serve(connection: Connection, stack: str) -> None:
    """The life of a rank: cases from the pipe until it ends."""
    torch.set_num_threads(1)
    with open(stack, "w", encoding="utf-8") as stack_file:
        if STACK_SIGNAL is not None:
            faulthandler.register(STACK_SIGNAL, file=stack_file, all_threads=True)
        connection.send(("ok", b""))
        while True:
            try:
                message = connection.recv_bytes()
            except (EOFError, ConnectionResetError):
                return
            _answer(connection, pickle.loads(message))


def _answer(connection: Connection, case: Case) -> None:
    """Runs one case and answers; the process group is destroyed on every path out."""
    try:
        try:
            fn = _load(case)
            args, kwargs, filters = pickle.loads(case.arguments)
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(case.store, case.world_size),
                rank=case.rank,
                world_size=case.world_size,
                timeout=timedelta(seconds=0.75 * case.timeout_s),
            )
            random.seed(0)
            torch.manual_seed(0)
            with _warning_filters(filters):
                result = pickle.dumps(fn(*args, **kwargs))
        except BaseException:
            connection.send(("error", traceback.format_exc().encode()))
        else:
            connection.send(("ok", result))
        # The parent's "finish", or the end of the pipe where another rank failed.
        with contextlib.suppress(EOFError, ConnectionResetError):
            connection.recv_bytes()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.send(("ok", b""))


def _load(case: Case) -> Callable[..., Any]:
    """The function, from the module of that name if it lives in that file, else from the file itself.

    A module that can be imported must not be loaded a second time: its classes would exist twice. One that cannot, such
    as a test, is registered under the caller's name for it, so that objects of its classes can be unpickled.
    """
    target: Any = _importable(case) or _from_file(case)
    for name in case.qualname.split("."):
        target = getattr(target, name)
    return target


def _importable(case: Case) -> ModuleType | None:
    loaded = sys.modules.get(case.module)
    if (
        loaded is not None
        and getattr(loaded, "__file__", None)
        and Path(str(loaded.__file__)).resolve() == Path(case.path)
    ):
        return loaded
    try:
        spec = importlib.util.find_spec(case.module)
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None or Path(spec.origin).resolve() != Path(case.path):
        return None
    return importlib.import_module(case.module)


def _from_file(case: Case) -> ModuleType:
    name = case.module
    if name in sys.modules:
        name = f"{name}_{hashlib.sha256(case.path.encode()).hexdigest()[:12]}"
        if name in sys.modules:
            return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, case.path)
    assert spec is not None and spec.loader is not None, f"{case.path} is a Python file, its caller came from it"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    # Unpickling an object of "tests.farskip.test_x" imports "tests" first.
    for parent in itertools.accumulate(name.split(".")[:-1], "{}.{}".format):
        sys.modules.setdefault(parent, ModuleType(parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextlib.contextmanager
def _warning_filters(filters: list[tuple[Any, ...]]) -> Iterator[None]:
    """The caller's filters, so that under pytest a warning fails a rank as it fails a test."""
    with warnings.catch_warnings():
        warnings.resetwarnings()
        for action, message, category, module, line in reversed(filters):
            warnings.filterwarnings(
                action,
                getattr(message, "pattern", message) or "",
                category,
                getattr(module, "pattern", module) or "",
                line,
            )
        yield
