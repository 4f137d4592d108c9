"""Jobs for the tests of `farskip.launch.ranks`: spawned processes find a function by the name of its module.

Decides nothing about farskip; starts nothing by itself.
"""

import time
from pathlib import Path

import torch.distributed as dist

from farskip.launch.config import DistillConfig, PretrainConfig
from farskip.launch.distill import distill
from farskip.launch.hydra_command import run_hydra
from farskip.launch.pretrain import pretrain
from farskip.launch.ranks import Ranks
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
