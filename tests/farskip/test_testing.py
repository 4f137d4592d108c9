"""The tools the other tests stand on: comparisons, poisoned memory, and ranks that raise, hang or die."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from farskip.testing import (
    RankError,
    RankPool,
    assert_close,
    assert_equal_bits,
    load_beside,
    no_host_waits,
    pairwise,
    poison_empty,
    run_ranks,
)
from farskip.wiring import Wiring


@dataclass(frozen=True)
class Box:
    """Of this file, which no rank can import by name."""

    value: int


# -- comparisons --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
def test_close_accepts_the_same(dtype: torch.dtype) -> None:
    x = torch.arange(6).reshape(2, 3).to(dtype)
    assert_close(x, x.clone(), rel_norm=0.0, max_error=0.0)


def test_close_measures_the_relative_norm() -> None:
    reference = torch.tensor([3.0, 4.0])
    off = reference + torch.tensor([0.0, 0.05])
    assert_close(off, reference, rel_norm=0.0101)
    with pytest.raises(AssertionError, match=r"rel_norm 0\.01 > 0\.0099.*worst at \(1,\): 4\.05"):
        assert_close(off, reference, rel_norm=0.0099)


def test_close_measures_the_largest_error_against_at_least_one() -> None:
    small = torch.tensor([0.01, 0.0])
    assert_close(small + 1e-5, small, max_error=2e-5)
    with pytest.raises(AssertionError, match="max_error"):
        assert_close(small + 3e-5, small, max_error=2e-5)
    large = torch.tensor([100.0, 0.0])
    assert_close(large + 1e-3, large, max_error=2e-5)


def test_close_to_zero_is_zero() -> None:
    zero = torch.zeros(3)
    assert_close(zero, zero, rel_norm=1e-4)
    with pytest.raises(AssertionError, match="rel_norm inf"):
        assert_close(zero + 1e-30, zero, rel_norm=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_close_refuses_what_is_not_finite(bad: float) -> None:
    x = torch.tensor([1.0, bad])
    for bounds in ({"rel_norm": 1e9}, {"max_error": 1e9}):
        with pytest.raises(AssertionError):
            assert_close(x, x.clone(), **bounds)
        with pytest.raises(AssertionError):
            assert_close(x, torch.ones(2), **bounds)


def test_close_names_what_is_off_worst_first() -> None:
    reference = {"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(2)}
    actual = {"a": torch.ones(2) * 1.1, "b": torch.ones(2), "c": torch.ones(2) * 2}
    with pytest.raises(AssertionError) as caught:
        assert_close(actual, reference, rel_norm=1e-3)
    assert [line[0] for line in str(caught.value).splitlines()] == ["c", "a"]


@pytest.mark.parametrize(
    ("actual", "message"),
    [
        ({"a": torch.ones(2)}, r"missing \['b'\]"),
        ({"a": torch.ones(2), "b": torch.ones(1), "c": torch.ones(1)}, r"extra \['c'\]"),
        ({"a": torch.ones(2), "b": torch.ones(1, 1)}, "b: shape"),
        ({"a": torch.ones(2), "b": torch.ones(1, dtype=torch.float64)}, "b: dtype"),
    ],
)
def test_comparisons_refuse_other_names_shapes_dtypes(actual: dict[str, torch.Tensor], message: str) -> None:
    expected = {"a": torch.ones(2), "b": torch.ones(1)}
    with pytest.raises(AssertionError, match=message):
        assert_close(actual, expected, rel_norm=1.0)
    with pytest.raises(AssertionError, match=message):
        assert_equal_bits(actual, expected)


def test_comparisons_refuse_to_say_nothing() -> None:
    with pytest.raises(ValueError, match="no bound"):
        assert_close(torch.ones(1), torch.zeros(1))
    with pytest.raises(AssertionError, match="nothing to compare"):
        assert_equal_bits({}, {})


def test_equal_bits() -> None:
    x = torch.tensor([1.0, float("nan"), 0.0])
    assert_equal_bits(x, x.clone())
    assert_equal_bits(torch.arange(6).reshape(2, 3).T, torch.arange(6).reshape(2, 3).T.contiguous())
    for index, value in ((0, 1.0000001), (2, -0.0)):
        other = x.clone()
        other[index] = value
        with pytest.raises(AssertionError, match="1 of 3 values"):
            assert_equal_bits(other, x)


# -- poisoned memory ----------------------------------------------------------------------------------------------

_DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.int64, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
def test_poison_reaches_every_kind_of_empty(dtype: torch.dtype) -> None:
    like = torch.zeros(2, 3, dtype=dtype)
    with poison_empty():
        made = [
            torch.empty(2, 3, dtype=dtype),
            torch.empty_like(like),
            torch.empty_strided((2, 3), (3, 1), dtype=dtype),
            torch.empty_permuted((2, 3), (1, 0), dtype=dtype),
            like.new_empty(2, 3),
            like.new_empty_strided((2, 3), (3, 1)),
        ]
    for tensor in made:
        if dtype.is_floating_point or dtype.is_complex:
            assert tensor.to(torch.complex64).isnan().all()
        else:
            assert (tensor != 0).all()


def test_poison_reaches_backward_and_ends_with_the_block() -> None:
    class Forgetful(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
            return torch.empty_like(gradient)

    x = torch.ones(4, requires_grad=True)
    with poison_empty():
        Forgetful.apply(x).sum().backward()
        assert torch.empty(3, requires_grad=True).requires_grad
    assert x.grad is not None
    assert x.grad.isnan().all()
    assert torch.empty(0).numel() == 0
    plain = torch.zeros(1000)
    del plain
    assert not all(torch.empty(1000).isnan().all() for _ in range(3))


# -- waits of the host ----------------------------------------------------------------------------------------------


NUMBERS = torch.arange(4)


@pytest.mark.parametrize(
    "read",
    [
        lambda: NUMBERS.max().item(),
        lambda: bool(NUMBERS.any()),
        lambda: NUMBERS.tolist(),
        lambda: NUMBERS.cpu(),
        lambda: NUMBERS.numpy(),
        lambda: torch.equal(NUMBERS, NUMBERS),
        lambda: torch.bincount(NUMBERS, minlength=5),
        lambda: NUMBERS.nonzero(),
        lambda: torch.where(NUMBERS > 1),
        lambda: NUMBERS[NUMBERS > 1],
        lambda: NUMBERS.masked_select(NUMBERS > 1),
        lambda: NUMBERS.unique(),
        lambda: NUMBERS.repeat_interleave(NUMBERS),
        lambda: torch.tensor([1, 2]),
    ],
    ids=lambda read: None,
)
def test_what_makes_the_host_wait_is_refused(read: Callable[[], object]) -> None:
    read()
    with no_host_waits(), pytest.raises(AssertionError, match="the host waits"):
        read()
    read()


def test_what_the_host_need_not_wait_for_passes_and_backward_is_watched() -> None:
    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * gradient.sum().item()

    x = torch.ones(4, requires_grad=True)
    with no_host_waits():
        rows = x[NUMBERS].repeat_interleave(3).repeat_interleave(torch.full((12,), 2), output_size=24)
        rows.masked_fill(rows > 1, 0.0).sum().backward()
        output = Reads.apply(x).sum()
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            output.backward()


# -- ranks: the functions they run --------------------------------------------------------------------------------


def add_up(x: torch.Tensor, *, factor: int = 1) -> tuple[int, int, torch.Tensor]:
    total = x * factor * (dist.get_rank() + 1)
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), total


def facts() -> dict[str, object]:
    return {
        "pid": os.getpid(),
        "threads": torch.get_num_threads(),
        "draw": float(torch.rand(1)),
        "argv": [name for name in os.environ if name in ("RANK", "WORLD_SIZE", "MASTER_PORT")],
    }


def boxed(box: Box) -> tuple[Box, str]:
    return Box(value=box.value + 1), type(box).__module__


def wiring_name(wiring: Wiring) -> tuple[bool, str]:
    return isinstance(wiring, Wiring), str(__name__)


def raise_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise KeyError("the ninth gear")
    dist.barrier()


def hang_on(rank: int) -> None:
    if dist.get_rank() == rank:
        the_place_where_it_hangs()


def the_place_where_it_hangs() -> None:
    time.sleep(600)


def hang_on_while_others_wait(rank: int) -> None:
    hang_on(rank)
    dist.barrier()


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def exit_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(7)
    dist.barrier()


def die_with_a_child_on(rank: int) -> None:
    """The child keeps the dead rank's pipes open."""
    if dist.get_rank() == rank:
        if os.fork() == 0:
            time.sleep(20)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def return_a_lambda() -> object:
    return lambda: None


def warn() -> None:
    warnings.warn("careful", UserWarning, stacklevel=1)


def leave_a_group_behind() -> None:
    dist.new_group([0])
    dist.all_reduce(torch.ones(1), async_op=True)


class Holder:
    @staticmethod
    def inside() -> int:
        return dist.get_rank()

    def method(self) -> None: ...


# -- ranks: what becomes of them ----------------------------------------------------------------------------------


def _alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if any(child.pid == pid for child in multiprocessing.active_children())]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_pool_runs_a_collective(rank_pool: RankPool, world_size: int) -> None:
    results = rank_pool.run(add_up, world_size, torch.ones(3), factor=2)
    total = float(world_size * (world_size + 1))
    assert [(rank, size) for rank, size, _ in results] == [(rank, world_size) for rank in range(world_size)]
    for _, _, tensor in results:
        assert_equal_bits(tensor, torch.full((3,), total))


def test_pool_keeps_its_processes_and_their_state_apart(rank_pool: RankPool) -> None:
    first, second = rank_pool.run(facts, 2), rank_pool.run(facts, 2)
    assert [rank["pid"] for rank in first] == [rank["pid"] for rank in second]
    assert len({rank["pid"] for rank in first} | {os.getpid()}) == 3
    assert {rank["threads"] for rank in first} == {1}
    assert {rank["draw"] for rank in first + second} == {first[0]["draw"]}
    assert all(rank["argv"] == [] for rank in first)


def test_pool_passes_objects_of_the_tests_own_classes(rank_pool: RankPool) -> None:
    ((box, module),) = rank_pool.run(boxed, 1, Box(value=1))
    assert box == Box(value=2)
    assert module == Box.__module__


def test_pool_does_not_load_an_installed_module_twice(rank_pool: RankPool) -> None:
    ((same, _),) = rank_pool.run(wiring_name, 1, Wiring.named("farskip", 2))
    assert same


def test_pool_finds_static_methods(rank_pool: RankPool) -> None:
    assert rank_pool.run(Holder.inside, 2) == [0, 1]


@pytest.mark.parametrize("fn", [lambda: None, Holder().method, print], ids=["lambda", "method", "builtin"])
def test_pool_refuses_what_ranks_cannot_find(rank_pool: RankPool, fn: object) -> None:
    with pytest.raises(ValueError, match="top level of a file"):
        rank_pool.run(fn, 1)  # type: ignore[arg-type]


def test_pool_refuses_senseless_numbers(rank_pool: RankPool) -> None:
    with pytest.raises(ValueError, match="at least one rank"):
        rank_pool.run(facts, 0)
    with pytest.raises(ValueError, match="positive timeout"):
        rank_pool.run(facts, 1, timeout_s=0)


def test_a_warning_fails_a_rank_as_it_fails_a_test(rank_pool: RankPool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert rank_pool.run(warn, 1) == [None]
    with pytest.raises(RankError, match="UserWarning: careful"):
        rank_pool.run(warn, 1)


def test_groups_left_behind_do_not_reach_the_next_case(rank_pool: RankPool) -> None:
    for _ in range(3):
        rank_pool.run(leave_a_group_behind, 2)


_FAILURES = {
    "raises": (raise_on, r"rank 1 of 2 failed: raise_on in [^\n]*test_testing\.py\n(?s:.*)KeyError: 'the ninth gear'"),
    "hangs": (hang_on, r"rank 1 of 2 gave no answer in time: hang_on(?s:.*)rank 1 was(?s:.*)the_place_where_it_hangs"),
    "hangs, others wait": (
        hang_on_while_others_wait,
        r"rank 0 of 2 failed(?s:.*)barrier(?s:.*)rank 1 was still running at(?s:.*)the_place_where_it_hangs",
    ),
    "is killed": (die_on, r"rank 1 of 2 was killed by SIGKILL: die_on"),
    "exits": (exit_on, r"rank 1 of 2 ended with exit code 7: exit_on"),
    "leaves a child": (die_with_a_child_on, r"rank 1 of 2 was killed by SIGKILL"),
}


@pytest.mark.parametrize("how", _FAILURES)
def test_a_failed_case_names_its_rank_and_leaves_nothing_behind(how: str) -> None:
    fn, message = _FAILURES[how]
    with RankPool() as pool:
        before = [rank["pid"] for rank in pool.run(facts, 2)]
        started = time.monotonic()
        with pytest.raises(RankError, match=message):
            pool.run(fn, 2, 1, timeout_s=4.0)
        assert time.monotonic() - started < 12.0
        assert _alive(before) == []
        after = [rank["pid"] for rank in pool.run(facts, 2)]
        assert not set(before) & set(after)
    assert _alive(after) == []


def test_a_result_that_cannot_travel_is_an_error(rank_pool: RankPool) -> None:
    with pytest.raises(RankError, match=r"(?s)rank 0 of 1 failed.*lambda"):
        rank_pool.run(return_a_lambda, 1)


def test_run_ranks_ends_its_processes() -> None:
    before = set(multiprocessing.active_children())
    pids = [rank["pid"] for rank in run_ranks(facts, 2)]
    assert len(set(pids)) == 2
    assert set(multiprocessing.active_children()) == before


def test_a_pool_that_is_never_closed_does_not_keep_the_program_alive() -> None:
    program = f"""
import importlib.util, sys
sys.dont_write_bytecode = True
from farskip.testing import RankPool
spec = importlib.util.spec_from_file_location("cases", {__file__!r})
cases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cases)
if __name__ == "__main__":
    pool = RankPool()
    print(len(pool.run(cases.facts, 1)))
"""
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "1"), done.stderr


def test_pool_starts_no_threads(rank_pool: RankPool) -> None:
    before = threading.active_count()
    rank_pool.run(facts, 1)
    assert threading.active_count() == before


@pytest.mark.slow
def test_many_cases_leave_nothing_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """File descriptors, processes and files in the temporary folder, over cases that pass, raise and die."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def state() -> tuple[int, int, list[Path]]:
        return len(os.listdir("/proc/self/fd")), len(multiprocessing.active_children()), list(tmp_path.iterdir())

    run_ranks(facts, 2)
    before = state()
    with RankPool() as pool:
        for number in range(60):
            pool.run(add_up, 1 + number % 3, torch.ones(number))
            if number % 20 == 10:
                with pytest.raises(RankError):
                    pool.run(raise_on if number % 40 == 10 else die_on, 2, 1)
    assert state() == before


def test_pairwise_holds_every_pair_in_few_points() -> None:
    dimensions = {"a": (1, 2, 3), "b": ("x", "y"), "c": ([0], [1], [2], [3]), "d": (True,)}
    points = pairwise(dimensions)
    for (first, ones), (second, others) in itertools.combinations(dimensions.items(), 2):
        for one, other in itertools.product(ones, others):
            assert any(point[first] == one and point[second] == other for point in points), f"{one}, {other}"
    assert all(point.keys() == dimensions.keys() for point in points)
    assert len(points) <= 16, "the whole grid has 24; twelve are needed for a and c alone"
    assert points == pairwise(dimensions)


def test_a_file_beside_is_one_module_for_all(tmp_path: Path) -> None:
    name = "a_file_that_no_other_test_has"
    (tmp_path / f"{name}.py").write_text("value = []\n")
    try:
        assert load_beside(str(tmp_path / "test_one.py"), name) is load_beside(str(tmp_path / "test_two.py"), name)
    finally:
        del sys.modules[name]
