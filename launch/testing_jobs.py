"""Jobs for the tests of `farskip.launch.ranks`: spawned processes find a function by the name of its module.

Decides nothing about farskip; starts nothing by itself.
"""

import atexit
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

from farskip.launch import ranks as ranks_module
from farskip.launch.config import DistillConfig, PretrainConfig, RunConfig
from farskip.launch.distill import distill
from farskip.launch.hydra_command import run_hydra
from farskip.launch.pretrain import pretrain
from farskip.launch.ranks import Ranks
from farskip.parallel.together import first_rank_says
from farskip.report import write_conversion_report


def pretrain_job(ranks: Ranks, words: list[str]) -> None:
    """`farskip pretrain WORDS` on ranks that stand already."""
    run_hydra("pretrain", PretrainConfig, lambda config: pretrain(ranks, config), words, intro="")


def distill_job(ranks: Ranks, words: list[str]) -> None:
    """`farskip distill WORDS` on ranks that stand already, with its report."""

    def job(config: DistillConfig) -> bool:
        outcome = distill(ranks, config)
        if outcome is not None and ranks.rank == 0:
            write_conversion_report(Path(config.run.folder), outcome.measured, outcome.wiring)
        return outcome is not None

    run_hydra("distill", DistillConfig, job, words, intro="")


def raise_on_rank_1(ranks: Ranks, message: str) -> None:
    """Rank 1 raises; rank 0 waits for it in a collective, as ranks do."""
    if ranks.rank == 1:
        raise ValueError(message)
    dist.barrier()


def wait_for_words_of_rank_0(ranks: Ranks, folder: str) -> None:
    """Rank 0 raises instead; rank 1 waits for it without a limit, and leaves a file when it is let go."""
    if ranks.rank == 0:
        raise ValueError("left")
    try:
        first_rank_says()
    finally:
        (Path(folder) / "let go").touch()


def hang_on_rank_0(ranks: Ranks, seconds: float) -> None:
    """Rank 1 raises; rank 0 does something that no collective ends."""
    if ranks.rank == 1:
        raise ValueError("left")
    time.sleep(seconds)


def crash_on_rank_1(ranks: Ranks, message: str) -> None:
    """A bug on rank 1."""
    if ranks.rank == 1:
        raise KeyError(message)
    dist.barrier()


def wait_for_file(ranks: Ranks, folder: str) -> None:
    """Says that it is there, and does nothing for long."""
    (Path(folder) / f"here_{ranks.rank}").touch()
    time.sleep(600)


def local_rank_as_on_cuda(job: Callable[[Ranks, Any], None], config: Any, run: RunConfig, *place: Any) -> None:
    """A rank that believes to be on CUDA. Destroying its process group, or coming as far as the destructors when the
    process ends, kills it, where NCCL would hang."""

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def init_gloo(backend: str, **settings: Any) -> None:
        assert backend == "nccl"
        start("gloo", **settings)

    start = dist.init_process_group
    atexit.register(die)  # handlers run from the last to the first
    with (
        patch.object(ranks_module, "_device", lambda name, local_rank: f"cuda:{local_rank}"),
        patch("torch.cuda.set_device"),
        patch.object(dist, "init_process_group", init_gloo),
        patch.object(dist, "destroy_process_group", die),
    ):
        ranks_module._local_rank(job, config, run, *place)
