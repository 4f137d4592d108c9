"""How training ends: early, late, by request, by a number that is not finite, by a dead rank, by a full disk."""

import dataclasses
import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from farskip import checkpoint, trainer
from farskip.batch import IGNORED_LABEL, Batch
from farskip.checkpoint import latest_checkpoint, read_manifest
from farskip.metrics import StepReport
from farskip.objectives import PretrainObjective
from farskip.shutdown import ShutdownRequest
from farskip.testing import RankPool, assert_equal_bits
from farskip.testing_training import (
    CHUNK_TOKENS,
    TinyBatches,
    TinyData,
    TinyLanguageModel,
    metrics_of,
    tensors_of,
    tiny_config,
    tiny_objective,
    train_tiny,
)
from farskip.trainer import NonFiniteError, StopReason
from farskip.training_config import (
    CheckpointConfig,
    HeldoutConfig,
)
from farskip.training_protocols import LossSums


class _Poisoned(PretrainObjective):
    """Its loss (or only its gradient) becomes a given value from one micro-batch on."""

    def __init__(self, *, from_call: int, loss: float | None = None, gradient: float | None = None) -> None:
        super().__init__(TinyLanguageModel(), chunk_tokens=CHUNK_TOKENS)
        self._left, self._loss, self._gradient = from_call, loss, gradient

    def loss(self, batch: Batch) -> LossSums:
        sums = super().loss(batch)
        self._left -= 1
        if self._left >= 0:
            return sums
        poisoned = sums.loss
        if self._loss is not None:
            poisoned = poisoned * self._loss
        if self._gradient is not None:
            poisoned.register_hook(lambda gradient: gradient * self._gradient)
        return LossSums(loss=poisoned, sums=sums.sums)


@pytest.mark.parametrize(("value", "text"), [(float("nan"), "nan"), (float("inf"), "inf"), (float("-inf"), "-inf")])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, value: float, text: str) -> None:
    objective = _Poisoned(from_call=3, loss=value)
    weights: list[dict[str, Tensor]] = []
    config = tiny_config(6, checkpoint=CheckpointConfig(every_steps=2))
    keep: Callable[[StepReport], None] = lambda report: weights.append(tensors_of(objective.model.module))  # noqa: E731
    with pytest.raises(
        NonFiniteError, match=rf"step 4: the loss is {text} on rank 0; the last good checkpoint is .*step_00000002"
    ) as caught:
        train_tiny(objective, tmp_path, config, on_step=[keep])
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000002"]
    assert_equal_bits(tensors_of(objective.model.module), weights[2])
    assert [line["step"] for line in metrics_of(tmp_path)] == [1, 2, 3]


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    objective = _Poisoned(from_call=1, gradient=float("inf"))
    with pytest.raises(
        NonFiniteError, match=r"step 2: the gradient norm is (inf|nan) on all ranks; there is no checkpoint yet"
    ):
        train_tiny(objective, tmp_path, tiny_config(6))
    assert latest_checkpoint(tmp_path / "checkpoints") is None


def _rank_one_is_poisoned(folder: str) -> str:
    objective = _Poisoned(from_call=2 if dist.get_rank() == 1 else 99, loss=float("nan"))
    with pytest.raises(NonFiniteError) as caught:
        train_tiny(objective, Path(folder), tiny_config(6, checkpoint=CheckpointConfig(every_steps=1)))
    return str(caught.value)


def test_a_nan_on_one_rank_stops_all_with_the_same_line(rank_pool: RankPool, tmp_path: Path) -> None:
    first, second = rank_pool.run(_rank_one_is_poisoned, 2, str(tmp_path), timeout_s=20)
    assert first == second
    assert first.startswith("step 3: the loss is nan on rank 1; the last good checkpoint is ")
    saved = latest_checkpoint(tmp_path / "checkpoints")
    assert saved is not None and read_manifest(saved).step == 2


def test_a_held_out_value_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    objective = tiny_objective()

    def poison(report: StepReport) -> None:
        if report.step == 1:
            embedding = objective.model.module.get_parameter("embedding.weight")
            rows = next(TinyData().heldout_batches(1)).input_ids_BS[0, :1]
            with torch.no_grad():
                embedding[rows] = float("nan")

    class WithoutThatToken(TinyData):
        def train_batches(self) -> TinyBatches:
            return _Constant([0])

    config = tiny_config(2, heldout=HeldoutConfig(every_steps=2, num_batches=1))
    with pytest.raises(NonFiniteError, match="step 2: the held-out value is nan; there is no checkpoint yet"):
        train_tiny(objective, tmp_path, config, data=WithoutThatToken(), on_step=[poison])


class _Constant(TinyBatches):
    """One token that no held-out text starts with, for ever."""

    def __next__(self) -> Batch:
        first = int(next(TinyData().heldout_batches(1)).input_ids_BS[0, 0])
        ids_BS = torch.full((1, 4), (first + 1) % 17)
        return Batch(input_ids_BS=ids_BS, labels_BS=ids_BS, position_ids_BS=torch.arange(4)[None])


def _rank_one_is_asked_to_stop(folder: str) -> tuple[StopReason, int, str]:
    request = ShutdownRequest()

    def ask(report: StepReport) -> None:
        if report.step == 2 and dist.get_rank() == 1:
            request.request()

    result = train_tiny(tiny_objective(), Path(folder), tiny_config(9), shutdown=request, on_step=[ask])
    assert result.last_checkpoint is not None
    return result.reason, result.progress.step, result.last_checkpoint.name


def test_ranks_agree_on_the_step_at_which_they_stop(rank_pool: RankPool, tmp_path: Path) -> None:
    first, second = rank_pool.run(_rank_one_is_asked_to_stop, 2, str(tmp_path))
    assert first == second == (StopReason.shutdown, 3, "step_00000003")


def test_only_the_save_after_a_shutdown_has_a_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[tuple[float, str]] = []

    @contextmanager
    def watch(seconds: float, message: str) -> Iterator[None]:
        limits.append((seconds, message))
        yield

    monkeypatch.setattr(trainer, "deadline", watch)
    request = ShutdownRequest()
    config = tiny_config(9, checkpoint=CheckpointConfig(every_steps=1, shutdown_timeout_s=12.5))
    ask: Callable[[StepReport], None] = lambda report: request.request() if report.step == 2 else None  # noqa: E731
    train_tiny(tiny_objective(), tmp_path, config, shutdown=request, on_step=[ask])
    message = "rank 0: the checkpoint after SIGTERM took longer than 12.5 s; ending without it"
    assert limits == [(12.5, message)]


def _rank_one_leaves(folder: str) -> str:
    def leave(report: StepReport) -> None:
        if report.step == 2 and dist.get_rank() == 1:
            # What its peers see of a killed process: closed sockets.
            dist.destroy_process_group()
            raise KeyboardInterrupt

    request = ShutdownRequest()
    try:
        train_tiny(
            tiny_objective(),
            Path(folder),
            tiny_config(9, checkpoint=CheckpointConfig(every_steps=2)),
            shutdown=request,
            on_step=[lambda report: request.request() if report.step == 2 else None, leave],
        )
    except (KeyboardInterrupt, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing happened"


def test_a_rank_that_is_gone_is_told_and_nothing_is_saved(rank_pool: RankPool, tmp_path: Path) -> None:
    first, second = rank_pool.run(_rank_one_leaves, 2, str(tmp_path), timeout_s=12)
    assert second == "KeyboardInterrupt: "
    assert first.startswith("RuntimeError: rank 0: no answer from rank 1 after step 2: ")
    assert "\n" not in first
    # Step 2's own checkpoint was not begun when rank 1 left; nothing that looks like one may stay behind.
    assert list((tmp_path / "checkpoints").glob("*")) == []


def test_a_full_disk_ends_the_run_and_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = checkpoint._write_file

    def full(path: Path, content: bytes) -> None:
        if "step_00000002" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(path, content)

    monkeypatch.setattr(checkpoint, "_write_file", full)
    with pytest.raises(RuntimeError, match=r"step_00000002 was not written: rank 0: .*No space left on device"):
        train_tiny(tiny_objective(), tmp_path, tiny_config(5, checkpoint=CheckpointConfig(every_steps=1)))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000001"]


def test_training_lowers_the_loss_and_keeps_the_best_checkpoint(tmp_path: Path) -> None:
    class Repeating(TinyData):
        def train_batches(self) -> TinyBatches:
            return TinyBatches([0, 1] * 40)

    objective = tiny_objective()
    # Random tokens: learning them by heart makes the held-out loss worse, which is what early stopping is for.
    config = tiny_config(80, heldout=HeldoutConfig(every_steps=5, num_batches=4, patience=2))
    result = train_tiny(objective, tmp_path, config, data=Repeating())
    lines = metrics_of(tmp_path)
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert result.reason is StopReason.early_stopped
    values = {line["step"]: line["heldout_cross_entropy"] for line in lines if "heldout_cross_entropy" in line}
    best = min(values, key=lambda step: values[step])
    assert result.progress.best_step == best and result.progress.best_value == values[best]
    assert result.progress.step == best + 10 == max(values)
    assert (tmp_path / "checkpoints" / "best").resolve().name == f"step_{best:08d}"
    assert result.best_checkpoint is not None and read_manifest(result.best_checkpoint).step == best
    assert result.heldout is not None and result.heldout.cross_entropy == values[best + 10]


def test_distillation_lowers_the_kl_and_is_judged_by_it(tmp_path: Path) -> None:
    config = tiny_config(40, heldout=HeldoutConfig(every_steps=20, num_batches=2))
    result = train_tiny(tiny_objective("distill"), tmp_path, config)
    lines = metrics_of(tmp_path)
    assert lines[-1]["kl"] < 0.5 * lines[0]["kl"]
    assert lines[-1]["loss"] == lines[-1]["kl"] != lines[-1]["cross_entropy"]
    assert result.heldout is not None
    assert result.progress.best_value == result.heldout.kl == lines[-1]["heldout_kl"]


def test_a_small_improvement_is_none_when_more_is_asked_for(tmp_path: Path) -> None:
    config = tiny_config(40, heldout=HeldoutConfig(every_steps=1, num_batches=1, patience=3, min_improvement=100.0))
    result = train_tiny(tiny_objective(), tmp_path, config)
    assert (result.reason, result.progress.step, result.progress.best_step) == (StopReason.early_stopped, 4, 1)


def test_steps_before_the_first_that_is_judged_are_neither_best_nor_worse(tmp_path: Path) -> None:
    """The first value stays the best one, because no improvement is enough: it is that of step 3."""
    config = tiny_config(40, heldout=HeldoutConfig(every_steps=1, num_batches=1, patience=3, min_improvement=100.0))
    result = train_tiny(tiny_objective(), tmp_path, config, judged_from=3)
    assert (result.reason, result.progress.step, result.progress.best_step) == (StopReason.early_stopped, 6, 3)
    assert [line["step"] for line in metrics_of(tmp_path) if "heldout_cross_entropy" in line] == [1, 2, 3, 4, 5, 6]


def test_the_end_of_the_data_is_evaluated_and_saved(tmp_path: Path) -> None:
    config = tiny_config(40, accumulation=2, heldout=HeldoutConfig(every_steps=30, num_batches=1))
    result = train_tiny(tiny_objective(), tmp_path, config, data=TinyData(num_batches=7))
    assert (result.reason, result.progress.step) == (StopReason.data_used_up, 3)
    assert result.last_checkpoint is not None and read_manifest(result.last_checkpoint).step == 3
    assert result.heldout is not None and result.best_checkpoint == result.last_checkpoint


def _rank_has_less_data(folder: str) -> tuple[StopReason, int]:
    data = TinyData(dist.get_rank(), 2, num_batches=5 - dist.get_rank())
    result = train_tiny(tiny_objective(), Path(folder), tiny_config(40), data=data)
    return result.reason, result.progress.step


def test_all_ranks_stop_when_one_has_no_data_left(rank_pool: RankPool, tmp_path: Path) -> None:
    assert rank_pool.run(_rank_has_less_data, 2, str(tmp_path), timeout_s=20) == [(StopReason.data_used_up, 4)] * 2


def test_no_data_at_all_trains_nothing(tmp_path: Path) -> None:
    result = train_tiny(tiny_objective(), tmp_path, tiny_config(4), data=TinyData(num_batches=0))
    assert (result.reason, result.progress.step, result.last_checkpoint) == (StopReason.data_used_up, 0, None)


def test_a_step_without_any_label_is_refused(tmp_path: Path) -> None:
    class Blank(TinyBatches):
        def __next__(self) -> Batch:
            batch = super().__next__()
            return dataclasses.replace(batch, labels_BS=torch.full_like(batch.labels_BS, IGNORED_LABEL))

    class BlankData(TinyData):
        def train_batches(self) -> TinyBatches:
            return Blank([0])

    with pytest.raises(ValueError, match="step 1: no position of any rank has a label; check the chat template"):
        train_tiny(tiny_objective(), tmp_path, tiny_config(1), data=BlankData())
