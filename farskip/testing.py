"""Tools for tests, of this project and of those who build on it.

Decides what "equal" and "close" mean (by relative norm per named tensor, or by bits) and how memory that nobody wrote
is made visible. Refuses comparisons of different shapes, dtypes or names. Ranks live in `farskip.testing_ranks`.
"""

import importlib.util
import itertools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from farskip.testing_ranks import RankError, RankPool, run_ranks

__all__ = [
    "RankError",
    "RankPool",
    "assert_close",
    "assert_equal_bits",
    "load_beside",
    "no_host_waits",
    "pairwise",
    "poison_empty",
    "run_ranks",
]

_EMPTY = frozenset({"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"})
"""Operators that return memory as it happens to be."""

_HOST_READS = frozenset(
    {
        *("_local_scalar_dense", "equal", "is_nonzero"),  # a value: .item(), bool(), .tolist() of one, allclose
        *("bincount", "masked_select", "nonzero", "_unique2", "unique_consecutive", "unique_dim"),  # a size
        "lift_fresh",  # a tensor of Python numbers: a copy from the host, behind which it waits
    }
)
"""Operators for which the host waits on CUDA: for a value, or because the result's size depends on one."""

_HOST_COPIES = ("cpu", "numpy", "tolist")
"""Methods that bring a whole tensor to the host. On CPU they call no operator."""


def assert_close(
    actual: torch.Tensor | Mapping[str, torch.Tensor],
    expected: torch.Tensor | Mapping[str, torch.Tensor],
    *,
    rel_norm: float | None = None,
    max_error: float | None = None,
    name: str = "tensor",
) -> None:
    """Fails unless every tensor is close to its reference, and says which ones are not, worst first.

    Args:
        actual: A tensor, or tensors by name.
        expected: The reference, of the same names, shapes and dtypes.
        rel_norm: Bound on ``|actual - expected| / |expected|`` (Euclidean, in float64). Where the reference is zero,
            `actual` must be exactly zero.
        max_error: Bound on ``max |actual - expected| / max(1, max |expected|)``.
        name: What to call a tensor that came without a name.

    Raises:
        ValueError: Neither bound is given.
        AssertionError: A tensor is out of bounds or not finite, or names, shapes or dtypes differ.

    Note:
        A tensor that holds a NaN or an infinity is never close, not even to the same one.
    """
    if rel_norm is None and max_error is None:
        raise ValueError("assert_close has no bound: give rel_norm, max_error or both")
    failures: list[tuple[float, str]] = []
    for key, ours, reference in _pairs(actual, expected, name):
        ours, reference = ours.detach().to(torch.float64), reference.detach().to(torch.float64)
        difference = ours - reference
        norm = float(torch.linalg.vector_norm(reference))
        measured = {
            "rel_norm": (_ratio(float(torch.linalg.vector_norm(difference)), norm), rel_norm),
            "max_error": (_largest(difference) / max(1.0, _largest(reference)), max_error),
        }
        for measure, (value, bound) in measured.items():
            # Written so that a NaN fails.
            if bound is not None and not value <= bound:
                text = f"{key}: {measure} {value:.3g} > {bound:g}; |reference| {norm:.3g}{_worst(ours, reference)}"
                failures.append((value if math.isfinite(value) else math.inf, text))
    _raise(failures)


def assert_equal_bits(
    actual: torch.Tensor | Mapping[str, torch.Tensor],
    expected: torch.Tensor | Mapping[str, torch.Tensor],
    *,
    name: str = "tensor",
) -> None:
    """Fails unless every tensor holds the reference's bits; -0.0 differs from 0.0, and a NaN equals the same NaN.

    Args:
        actual: A tensor, or tensors by name.
        expected: The reference, of the same names, shapes and dtypes.
        name: What to call a tensor that came without a name.

    Raises:
        AssertionError: A bit differs, or names, shapes or dtypes do.
    """
    failures: list[tuple[float, str]] = []
    for key, ours, reference in _pairs(actual, expected, name):
        differs = (_bytes(ours) != _bytes(reference)).any(dim=-1).reshape(ours.shape)
        if differs.any():
            count = int(differs.sum())
            where = _worst(ours.detach().to(torch.float64), reference.detach().to(torch.float64))
            failures.append((count / ours.numel(), f"{key}: {count} of {ours.numel()} values differ in bits{where}"))
    _raise(failures)


@contextmanager
def poison_empty() -> Iterator[None]:
    """Fills what `torch.empty` and its kin return with NaN, and integers with their extreme, inside the block.

    An output that a kernel or a buffer's owner forgot to write then shows in any comparison instead of passing on
    memory that happened to be zero. Backward passes that start inside the block are covered as well.

    Note:
        Memory that an operator allocates for itself in C++ is not reached.
    """
    with _Poison():
        yield


class _Poison(TorchDispatchMode):
    """At the level of operators: a mode of functions would be off inside `backward`, itself a function."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "aten" and func.overloadpacket.__name__ in _EMPTY:
            result.fill_(_poison_value(result.dtype))
        return result


@contextmanager
def no_host_waits() -> Iterator[None]:
    """On CPU, refuses inside the block what would make the host wait for the device on CUDA: that a value is read, that
    a size depends on one, that a tensor is made of Python numbers. Backward passes inside it are covered as well.

    Raises:
        AssertionError: naming the operator or method, from where it was called.

    Note:
        Not seen: what an operator does inside C++, and ``.to("cpu")``, which here is no copy.
    """

    def refused(name: str) -> Any:
        def method(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError(f"Tensor.{name}: the host waits for the device")

        return method

    for name in _HOST_COPIES:
        setattr(torch.Tensor, name, refused(name))  # hides the one that it inherits
    try:
        with _NoHostReads():
            yield
    finally:
        for name in _HOST_COPIES:
            delattr(torch.Tensor, name)


class _NoHostReads(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, keywords = func.overloadpacket.__name__, kwargs or {}
        waits = name in _HOST_READS
        if name == "repeat_interleave":
            waits = isinstance(args[-1], torch.Tensor) and keywords.get("output_size") is None
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            waits = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        if waits and func.namespace == "aten":
            raise AssertionError(f"{func}: the host waits for the device")
        return func(*args, **keywords)


def _poison_value(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point or dtype.is_complex:
        return math.nan
    if dtype is torch.bool:
        return True
    limits = torch.iinfo(dtype)
    return limits.min or limits.max


def _pairs(
    actual: torch.Tensor | Mapping[str, torch.Tensor], expected: torch.Tensor | Mapping[str, torch.Tensor], name: str
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Both sides by name, after names, shapes, dtypes and devices were compared."""
    ours = {name: actual} if isinstance(actual, torch.Tensor) else actual
    references = {name: expected} if isinstance(expected, torch.Tensor) else expected
    if ours.keys() != references.keys():
        missing, extra = sorted(references.keys() - ours.keys()), sorted(ours.keys() - references.keys())
        raise AssertionError(f"names differ: missing {missing}, extra {extra}")
    if not ours:
        raise AssertionError("nothing to compare: there are no tensors")
    for key, tensor in ours.items():
        for what in ("shape", "dtype", "device"):
            mine, theirs = getattr(tensor, what), getattr(references[key], what)
            if mine != theirs:
                raise AssertionError(f"{key}: {what} is {mine}, the reference's is {theirs}")
        yield key, tensor, references[key]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """(numel, bytes per value) uint8."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).reshape(flat.numel(), tensor.element_size())


def _largest(tensor: torch.Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _ratio(error: float, norm: float) -> float:
    """error / norm, where zero is only close to zero."""
    if norm == 0.0:
        return 0.0 if error == 0.0 else math.inf
    return error / norm


def _worst(actual: torch.Tensor, expected: torch.Tensor) -> str:
    """Where the difference is largest, or not a number, as text."""
    difference = (actual - expected).abs().nan_to_num(nan=math.inf)
    if not difference.numel():
        return ""
    index = tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
    return f"; worst at {index}: {float(actual[index]):.9g}, reference {float(expected[index]):.9g}"


def _raise(failures: list[tuple[float, str]]) -> None:
    if failures:
        failures.sort(key=lambda failure: -failure[0])
        raise AssertionError("\n".join(text for _, text in failures))


def load_beside(file: str, name: str) -> ModuleType:
    """A file of a test folder as a module: test folders are no packages, and ranks load tests by their path.

    Args:
        file: ``__file__`` of the one that asks.
        name: of the other, without its ending.

    Returns:
        The module, one and the same for all who ask for it by this name.
    """
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(file).with_name(f"{name}.py"))
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look themselves up
        spec.loader.exec_module(module)
    return sys.modules[name]


def pairwise(dimensions: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Points of a grid that together hold every pair of values of two dimensions; greedy and deterministic.

    Args:
        dimensions: the values of each one, by name.

    Returns:
        A value of every dimension per point, far fewer points than the whole grid has.
    """
    names = list(dimensions)
    missing = {
        frozenset({(a, i), (b, j)})
        for a, b in itertools.combinations(names, 2)
        for i in range(len(dimensions[a]))
        for j in range(len(dimensions[b]))
    }

    def gain(point: dict[str, int], name: str, value: int) -> int:
        return sum(frozenset({(name, value), other}) in missing for other in point.items())

    found = []
    while missing:
        point = dict(min(missing, key=lambda pair: sorted((names.index(name), value) for name, value in pair)))
        for name in names:
            if name not in point:
                gains = [gain(point, name, value) for value in range(len(dimensions[name]))]
                point[name] = gains.index(max(gains))
        missing -= {frozenset(pair) for pair in itertools.combinations(point.items(), 2)}
        found.append({name: dimensions[name][point[name]] for name in names})
    return found
