"""gloo's threads: ahead of compute where it is asked for and allowed, and only they."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist
from torch import nn

from farskip.parallel import gloo_threads
from farskip.parallel.data_parallel import DataParallel
from farskip.parallel.gloo_threads import GlooThreads, set_gloo_threads
from farskip.parallel.mesh import another_group, build_mesh

if TYPE_CHECKING:
    from farskip.testing import RankPool

linux = pytest.mark.skipif(not hasattr(os, "sched_setscheduler"), reason="only Linux says how a thread is scheduled")


def policies() -> dict[str, set[str]]:
    """How gloo's threads and the others of this process are scheduled."""
    kinds = {os.SCHED_OTHER: "ordinary", os.SCHED_FIFO | os.SCHED_RESET_ON_FORK: "realtime"}
    found: dict[str, set[str]] = {"gloo": set(), "others": set()}
    for task in Path("/proc/self/task").iterdir():
        whose = "gloo" if "gloo" in (task / "comm").read_text() else "others"
        found[whose].add(kinds[os.sched_getscheduler(int(task.name))])
    return found


def may_be_realtime() -> bool:
    before = os.sched_getscheduler(0)
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except PermissionError:
        return False
    os.sched_setscheduler(0, before, os.sched_param(0))
    return True


def turned_to_and_fro() -> None:
    summed = torch.ones(8)
    dist.all_reduce(summed)
    allowed = may_be_realtime()
    for wish, kind in ((GlooThreads.auto, "realtime" if allowed else "ordinary"), (GlooThreads.ordinary, "ordinary")):
        assert set_gloo_threads(wish) == (kind == "realtime")
        assert policies() == {"gloo": {kind}, "others": {"ordinary"}}
        dist.all_reduce(summed)
    assert torch.equal(summed, torch.full((8,), 8.0))
    set_gloo_threads("auto")
    later = another_group(None)
    dist.all_reduce(summed, group=later)
    assert policies()["gloo"] == ({"realtime", "ordinary"} if allowed else {"ordinary"}), "a later group's are its own"
    set_gloo_threads("auto")
    assert policies()["gloo"] == {"realtime" if allowed else "ordinary"}


@linux
def test_only_threads_of_gloo_are_put_ahead_and_back(rank_pool: "RankPool") -> None:
    rank_pool.run(turned_to_and_fro, 2)


def num_gloo_threads() -> int:
    return len(list(gloo_threads._gloo_threads()))


def threads_of_gradient_sums() -> None:
    model, frozen = nn.Linear(3, 2), nn.Linear(3, 2).requires_grad_(False)
    mesh = build_mesh(1)
    before = num_gloo_threads()
    DataParallel(mesh, dict(frozen.named_parameters()))
    assert num_gloo_threads() == before, "a model that is not trained sums nothing"
    ranks = DataParallel(mesh, dict(model.named_parameters()))
    there = num_gloo_threads()
    model(torch.ones(1, 3)).sum().backward()
    ranks.reduce_gradients()
    assert num_gloo_threads() == there > before, "threads that come with the first step are not put ahead"


@linux
def test_threads_that_sum_gradients_are_there_before_the_first_step(rank_pool: "RankPool") -> None:
    rank_pool.run(threads_of_gradient_sums, 2)


@pytest.mark.parametrize("waited", [0, 7])
def test_a_thread_that_has_not_run_yet_is_waited_for_until_it_has_its_name(
    waited: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    thread = tmp_path / "17"
    thread.mkdir()
    (thread / "comm").write_text("python\n")
    (thread / "status").write_text(
        f"Name:\tpython\nvoluntary_ctxt_switches:\t{waited}\nnonvoluntary_ctxt_switches:\t0\n"
    )
    slept = []

    def first_runs(seconds: float) -> None:
        slept.append(seconds)
        (thread / "comm").write_text("pt_gloo_runloop\n")

    monkeypatch.setattr(gloo_threads, "_TASKS", tmp_path)
    monkeypatch.setattr(gloo_threads.time, "sleep", first_runs)
    assert list(gloo_threads._gloo_threads()) == ([17] if waited == 0 else [])
    assert len(slept) == (waited == 0)


@linux
def test_a_process_without_gloo_has_none() -> None:
    assert not dist.is_initialized()
    assert set_gloo_threads("auto") is False
    assert policies()["others"] == {"ordinary"}


@linux
def test_what_is_not_allowed_is_refused_or_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise PermissionError

    monkeypatch.setattr(gloo_threads, "_gloo_threads", lambda: iter([os.getpid()]))
    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    assert set_gloo_threads("auto") is False
    with pytest.raises(ValueError, match=r"^gloo_threads=realtime: this process may not .* gloo_threads=ordinary$"):
        set_gloo_threads("realtime")


def test_without_linux_it_is_refused_or_left_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gloo_threads, "_TASKS", tmp_path / "no_such_folder")
    assert set_gloo_threads("auto") is False
    with pytest.raises(ValueError, match=r"^gloo_threads=realtime needs Linux"):
        set_gloo_threads("realtime")


def test_nothing_is_sent_outside_of_collectives() -> None:
    """Beside send and receive a realtime thread of gloo's can keep the core from the one that it waits for."""
    root = Path(gloo_threads.__file__).resolve().parents[1]
    words = ("isend", "irecv", "dist.send(", "dist.recv(")
    found = [
        path.name
        for folder in ("farskip", "models", "parallel", "launch")
        for path in (root / folder).glob("*.py")
        if path.name != "gloo_threads.py" and any(word in path.read_text() for word in words)
    ]
    assert not found


def test_an_unknown_wish_is_refused() -> None:
    with pytest.raises(ValueError, match="soon"):
        set_gloo_threads("soon")
