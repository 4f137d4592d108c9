"""What the commands have in common: a schedule is chosen by steps that compute as those of training do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from farskip.batch import Batch
from farskip.launch import job
from farskip.launch.config import ParallelConfig
from farskip.testing_training import TinyData, tiny_config, tiny_objective, train_tiny
from farskip.training_config import Precision
from farskip.training_protocols import LossSums


class Watched:
    """An objective that notes in which dtype autocast, if any, has it computed."""

    def __init__(self) -> None:
        self._objective = tiny_objective()
        self.model, self.teacher = self._objective.model, None
        self.num_tokens = self._objective.num_tokens
        self.seen: list[torch.dtype | None] = []

    def loss(self, batch: Batch) -> LossSums:
        self.seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        return self._objective.loss(batch)


@pytest.mark.parametrize(("precision", "dtype"), [(Precision.fp32, None), (Precision.bf16, torch.bfloat16)], ids=str)
def test_stage_times_are_measured_in_the_precision_of_training(
    precision: Precision, dtype: torch.dtype | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def repeat(model: Any, step: Callable[[], None], num_steps: int) -> None:
        for _ in range(num_steps):
            step()

    monkeypatch.setattr(job, "tune_schedule", repeat)
    tuned, trained = Watched(), Watched()
    prepared: Any = type("Prepared", (), {"model": tuned.model.module})
    data: Any = TinyData()
    job.tune(prepared, tuned, data, ParallelConfig(warmup_steps=2), precision)
    train_tiny(trained, tmp_path, tiny_config(2, precision=precision))
    assert tuned.seen == trained.seen == [dtype, dtype]
