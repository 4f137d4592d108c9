"""A resumed run equals the run that was never stopped, bit for bit."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from farskip import checkpoint
from farskip.checkpoint import latest_checkpoint
from farskip.metrics import StepReport
from farskip.optimizer import build_optimizer
from farskip.shutdown import ShutdownRequest
from farskip.testing import RankPool, assert_equal_bits
from farskip.testing_training import (
    TinyModule,
    communicator_of,
    metrics_of,
    tensors_of,
    tiny_config,
    tiny_objective,
    train_tiny,
)
from farskip.trainer import StopReason
from farskip.training_config import (
    CheckpointConfig,
    HeldoutConfig,
    OptimizerConfig,
)
from farskip.training_state import tensors_to_fill


def _straight_and_resumed(folder: str) -> list[tuple[dict[str, Tensor], list[float]]]:
    config = tiny_config(6, heldout=HeldoutConfig(every_steps=2, num_batches=1), accumulation=2)
    outcomes = []
    for stop_after in (None, 3):
        run_folder = Path(folder) / str(stop_after)
        reports: list[StepReport] = []
        objective = tiny_objective("distill", dropout=0.3, tied=True)
        if stop_after is not None:
            request = ShutdownRequest()
            on_step = [reports.append, _stop_at(stop_after - 1, request)]
            result = train_tiny(objective, run_folder, config, shutdown=request, on_step=on_step)
            assert (result.reason, result.progress.step) == (StopReason.shutdown, stop_after)
            torch.rand(7)
            objective = tiny_objective("distill", dropout=0.3, tied=True)
        saved = latest_checkpoint(run_folder / "checkpoints")
        assert (saved is None) == (stop_after is None)
        result = train_tiny(objective, run_folder, config, on_step=[reports.append], resume=saved)
        assert (result.reason, result.progress.step) == (StopReason.finished, 6)
        newest = latest_checkpoint(run_folder / "checkpoints")
        assert newest is not None
        outcomes.append((tensors_of(objective.model.module) | _stored(newest), [report.loss for report in reports]))
    return outcomes


def _stop_at(step: int, request: ShutdownRequest) -> Callable[[StepReport], None]:
    """Ask during this step's callbacks: the next step is the last."""

    def callback(report: StepReport) -> None:
        if report.step == step:
            request.request()

    return callback


def _stored(path: Path) -> dict[str, Tensor]:
    """Everything in a checkpoint, optimizer state included."""
    filled: dict[str, Tensor] = {}
    module = TinyModule(tied=True)
    optimizer = build_optimizer(module, OptimizerConfig())
    ranks = communicator_of(module)
    store = checkpoint.CheckpointStore(path.parent, ranks, keep_last=1, device=torch.device("cpu"))

    def tensors_for(names: set[str]) -> dict[str, Tensor]:
        filled.update(tensors_to_fill(names, module, optimizer, ranks))
        return filled

    store.load(path, tensors_for)
    assert any(name.startswith("optimizer.exp_avg_sq.") for name in filled)
    return filled


def _assert_resumed_exactly(outcomes: list[tuple[dict[str, Tensor], list[float]]]) -> None:
    (straight, straight_losses), (resumed, resumed_losses) = outcomes
    assert len(straight_losses) == 6
    assert straight_losses == resumed_losses
    assert_equal_bits(resumed, straight)


def test_resume_is_exact(tmp_path: Path) -> None:
    _assert_resumed_exactly(_straight_and_resumed(str(tmp_path)))
    straight, resumed = (metrics_of(tmp_path / name) for name in ("None", "3"))
    measured = ("step", "loss", "kl", "cross_entropy", "grad_norm", "learning_rate", "heldout_kl")
    assert [[line.get(name) for name in measured] for line in resumed] == [
        [line.get(name) for name in measured] for line in straight
    ]


def test_resume_is_exact_on_two_ranks(rank_pool: RankPool, tmp_path: Path) -> None:
    first, second = rank_pool.run(_straight_and_resumed, 2, str(tmp_path))
    _assert_resumed_exactly(first)
    _assert_resumed_exactly(second)


def _two_more_steps(folder: str, saved: str) -> tuple[list[int], float]:
    reports: list[StepReport] = []
    train_tiny(tiny_objective(), Path(folder), tiny_config(3), on_step=[reports.append], resume=Path(saved))
    return [report.step for report in reports], torch.rand(1).item()


def test_ranks_that_take_over_a_run_of_another_number_draw_different_dropout(
    rank_pool: RankPool, tmp_path: Path
) -> None:
    saved = train_tiny(tiny_objective(), tmp_path / "one", tiny_config(1, accumulation=2)).last_checkpoint
    (steps, first), (_, second) = rank_pool.run(_two_more_steps, 2, str(tmp_path / "two"), str(saved))
    assert steps == [2, 3] and first != second


def test_a_used_folder_is_not_trained_into_again(tmp_path: Path) -> None:
    result = train_tiny(tiny_objective(), tmp_path, tiny_config(1))
    with pytest.raises(ValueError, match="already holds a run up to step_00000001: resume from that checkpoint"):
        train_tiny(tiny_objective(), tmp_path, tiny_config(1))
    again = train_tiny(tiny_objective(), tmp_path, tiny_config(1), resume=result.last_checkpoint)
    assert (again.reason, again.last_checkpoint) == (StopReason.finished, result.last_checkpoint)


def test_an_older_checkpoint_does_not_mix_with_newer_ones(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = tiny_config(3, checkpoint=CheckpointConfig(every_steps=1, keep_last=3))
    train_tiny(tiny_objective(), folder, config)
    older = folder / "checkpoints" / "step_00000001"
    with pytest.raises(ValueError, match=r"already holds a run up to step_00000003: .*move the newer checkpoints away"):
        train_tiny(tiny_objective(), folder, config, resume=older)
    branch = train_tiny(tiny_objective(), tmp_path / "branch", config, resume=older)
    assert branch.last_checkpoint == tmp_path / "branch" / "checkpoints" / "step_00000003"


def test_resume_of_a_truncated_checkpoint_is_one_line(tmp_path: Path) -> None:
    saved = train_tiny(tiny_objective(), tmp_path, tiny_config(1)).last_checkpoint
    assert saved is not None
    os.truncate(saved / "__0_0.distcp", 10)
    with pytest.raises(ValueError, match=r"__0_0\.distcp has 10 bytes.*resume from another checkpoint"):
        train_tiny(tiny_objective(), tmp_path, tiny_config(2), resume=saved)
