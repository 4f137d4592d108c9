"""Barriers that name their device, and what rank 0 says after a time that no collective would wait for."""

import re
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import _get_default_store, _set_pg_timeout

from farskip.parallel.data_parallel import DataParallel
from farskip.parallel.mesh import build_mesh
from farskip.parallel.together import barrier, first_rank_says, say_that_this_rank_failed

if TYPE_CHECKING:
    from farskip.testing import RankPool

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("device", "told"),
    [
        ("cpu", {}),
        ("cuda", {"device_ids": [3]}),
        ("cuda:1", {"device_ids": [1]}),
        (torch.device("cuda", 0), {"device_ids": [0]}),
    ],
    ids=str,
)
def test_nccl_is_told_the_device(device: Any, told: dict[str, Any]) -> None:
    with patch("torch.cuda.current_device", return_value=3), patch.object(dist, "barrier") as called:
        barrier(device)
    called.assert_called_once_with(**told)


def barrier_of_a_training() -> list[Any]:
    communicator = DataParallel(build_mesh(1), {"weight": nn.Parameter(torch.zeros(1))})
    communicator._device = torch.device("cuda", 5)
    with patch.object(dist, "barrier") as called:
        communicator.barrier()
    return [dict(each.kwargs) for each in called.call_args_list]


def test_the_barrier_of_a_training_is_told_it_too(rank_pool: "RankPool") -> None:
    assert rank_pool.run(barrier_of_a_training, 2) == [[{"device_ids": [5]}]] * 2


def test_there_is_no_other_barrier() -> None:
    """Benchmarks and tests are on gloo."""
    found = [
        str(path.relative_to(ROOT))
        for folder in ("farskip", "models", "parallel", "launch")
        for path in sorted((ROOT / folder).glob("*.py"))
        if re.search(r"\bdist\.barrier\b", path.read_text()) and not path.name.startswith("testing")
    ]
    assert found == ["parallel/together.py"]


def short_timeout(seconds: float) -> None:
    """Of the collectives of this rank, and of what it asks the store."""
    _set_pg_timeout(timedelta(seconds=seconds), dist.group.WORLD)
    _get_default_store().set_timeout(timedelta(seconds=seconds))


def heard_after(seconds: float) -> list[str]:
    short_timeout(0.5)
    heard = [first_rank_says("first" if dist.get_rank() == 0 else "not asked")]
    if dist.get_rank() == 0:
        time.sleep(seconds)
    heard.append(first_rank_says("däné \udcff"))
    heard.append(first_rank_says())
    return heard


def test_rank_0_may_take_longer_than_a_collective_waits(rank_pool: "RankPool") -> None:
    first, second = rank_pool.run(heard_after, 2, 1.5)
    assert first == ["first", "däné \udcff", ""]
    assert second == ["first", "däné \\udcff", ""]


def heard_of_a_failure(failing: int) -> str:
    rank = dist.get_rank()
    first_rank_says()
    if rank == failing:
        say_that_this_rank_failed()
        return ""
    if rank == 0:
        return ""
    with pytest.raises(RuntimeError) as caught:
        first_rank_says()
    return str(caught.value)


def test_a_rank_that_failed_lets_the_others_go(rank_pool: "RankPool") -> None:
    assert rank_pool.run(heard_of_a_failure, 2, 0)[1].startswith("rank 1: no answer from rank 0: it failed")
