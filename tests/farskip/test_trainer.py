"""The training loop: the step is the right step on any number of ranks, and what is told about it."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from farskip.batch import Batch
from farskip.metrics import StepReport
from farskip.testing import RankPool, assert_close, assert_equal_bits
from farskip.testing_training import (
    MAX_GRAD_NORM,
    TinyBatches,
    TinyData,
    metrics_of,
    tensors_of,
    tiny_batch,
    tiny_config,
    tiny_objective,
    train_tiny,
)
from farskip.trainer import _fetch, train
from farskip.training_config import (
    Precision,
    TrainingConfig,
)
from farskip.training_protocols import SingleProcess


class _Concatenated(TinyData):
    """Every two batches as one."""

    def train_batches(self) -> TinyBatches:
        return _ConcatenatedBatches(list(range(100)))


class _ConcatenatedBatches(TinyBatches):
    def __next__(self) -> Batch:
        pair = [super(_ConcatenatedBatches, self).__next__() for _ in range(2)]
        names = [field.name for field in dataclasses.fields(Batch)]
        return Batch(**{name: torch.cat([getattr(batch, name) for batch in pair]) for name in names})


@dataclass(frozen=True)
class _Step:
    """What a run of a few steps left: the last step's clipped gradients, norms and losses, the weights."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def _few_steps(folder: str, kind: str, accumulation: int, data: TinyData | None = None) -> _Step:
    objective = tiny_objective(kind)
    reports: list[StepReport] = []
    train_tiny(objective, Path(folder), tiny_config(3, accumulation=accumulation), data=data, on_step=[reports.append])
    module = objective.model.module
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return _Step(
        losses=[report.loss for report in reports],
        norms=[report.grad_norm for report in reports],
        gradients=gradients,
        weights=tensors_of(module),
    )


def _assert_same_step(actual: _Step, expected: _Step) -> None:
    assert actual.losses == pytest.approx(expected.losses, rel=1e-6)
    assert actual.norms == pytest.approx(expected.norms, rel=1e-5)
    assert min(expected.norms) > MAX_GRAD_NORM, "clipping did not happen"
    # The same sums in another order, fp32: three steps of rounding stay far below the usual bound of 1e-4.
    assert_close(actual.gradients, expected.gradients, rel_norm=1e-5)
    # AdamW divides by the root of the squared gradient, which magnifies rounding where a gradient is nearly zero.
    assert_close(actual.weights, expected.weights, max_error=1e-5)


@pytest.mark.parametrize("kind", ["pretrain", "distill"])
def test_two_micro_batches_are_their_concatenation(tmp_path: Path, kind: str) -> None:
    whole = _few_steps(str(tmp_path / "whole"), kind, 1, _Concatenated())
    parts = _few_steps(str(tmp_path / "parts"), kind, 2)
    _assert_same_step(parts, whole)


@pytest.mark.parametrize("kind", ["pretrain", "distill"])
def test_two_ranks_are_one_rank_with_the_concatenated_batch(rank_pool: RankPool, tmp_path: Path, kind: str) -> None:
    whole = _few_steps(str(tmp_path / "whole"), kind, 1, _Concatenated())
    first, second = rank_pool.run(_few_steps, 2, str(tmp_path / "ranks"), kind, 1)
    _assert_same_step(first, whole)
    assert first.losses == second.losses and first.norms == second.norms
    assert_equal_bits(second.weights, first.weights)


def test_the_loss_is_the_mean_over_all_labels(tmp_path: Path) -> None:
    objective = tiny_objective()
    batches = [next(batches) for batches in [TinyData().train_batches()] for _ in range(2)]
    assert batches[0].num_labels() != batches[1].num_labels(), "the mean of means would be the same"
    total = sum(float(objective.loss(batch).loss.detach()) for batch in batches)
    expected = total / sum(batch.num_labels() for batch in batches)
    reports: list[StepReport] = []
    train_tiny(objective, tmp_path, tiny_config(1, accumulation=2), on_step=[reports.append])
    assert reports[0].loss == pytest.approx(expected, rel=1e-6)
    assert reports[0].means["cross_entropy"] == pytest.approx(expected, rel=1e-6)


class _Balancer:
    def __init__(self) -> None:
        self.scales: list[float] = []
        self.num_updates = 0

    def set_scale(self, scale: float) -> None:
        self.scales.append(scale)

    def update(self) -> Mapping[str, float]:
        self.num_updates += 1
        return {"imbalance": 0.25}


def test_the_balancer_gets_each_micro_batchs_share_and_its_values_are_logged(tmp_path: Path) -> None:
    balancer = _Balancer()
    train_tiny(tiny_objective(), tmp_path, tiny_config(3, accumulation=2), balancer=balancer)
    assert balancer.scales == [0.5] * 6
    assert balancer.num_updates == 3
    assert [line["imbalance"] for line in metrics_of(tmp_path)] == [0.25] * 3


def _rank_with_balancer(folder: str) -> list[float]:
    balancer = _Balancer()
    train_tiny(tiny_objective(), Path(folder), tiny_config(1, accumulation=2), balancer=balancer)
    return balancer.scales


def test_a_micro_batchs_share_is_that_of_all_ranks_together(rank_pool: RankPool, tmp_path: Path) -> None:
    """The auxiliary loss is a sum over ranks already; a share per rank would divide it by their number once more."""
    assert rank_pool.run(_rank_with_balancer, 2, str(tmp_path)) == [[0.5, 0.5]] * 2


class _OneBatch(TinyData):
    """The same batch for ever, as one overfits to see whether a model can learn at all."""

    def train_batches(self) -> TinyBatches:
        return _OneBatches(list(range(100)))


class _OneBatches(TinyBatches):
    batch = next(TinyBatches([0]))

    def __next__(self) -> Batch:
        super().__next__()
        return self.batch


class _Announced(SingleProcess):
    """Notes what it is told, and how many backwards reached the parameter before."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__(module)
        self.events: list[str] = []
        next(module.parameters()).register_post_accumulate_grad_hook(lambda _: self.events.append("backward"))

    def expect_last_backward(self) -> None:
        self.events.append("expect")

    def reduce_gradients(self) -> None:
        self.events.append("reduce")


@pytest.mark.parametrize("data", [TinyData(), _OneBatch()], ids=["batches", "one_batch"])
def test_the_last_backward_of_a_step_is_announced_and_no_other(tmp_path: Path, data: TinyData) -> None:
    objective = tiny_objective()
    ranks = _Announced(objective.model.module)
    train(objective, data, ranks, tiny_config(2, accumulation=3), tmp_path)
    assert ranks.events == ["backward", "backward", "expect", "backward", "reduce"] * 2


def test_reports_follow_every_step_and_lines_every_few(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reports: list[StepReport] = []
    train_tiny(tiny_objective(), tmp_path, tiny_config(5, log_every=2), on_step=[reports.append])
    assert [report.step for report in reports] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in metrics_of(tmp_path)] == [2, 4, 5]
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["2/5", "4/5", "5/5"]
    assert [report.learning_rate for report in reports][:2] == [0.005, 0.01]
    assert all(report.tokens_per_s == pytest.approx(12 / report.step_s) for report in reports)


class _Waiting(SingleProcess):
    """Waits a millisecond to reduce gradients, and long outside of steps."""

    waited_s = 1e3

    def reduce_gradients(self) -> None:
        self.waited_s += 1e-3

    def exposed_communication_s(self) -> float:
        since, self.waited_s = self.waited_s, 0.0
        return since


def test_exposed_communication_is_a_share_of_the_step(tmp_path: Path) -> None:
    objective, reports = tiny_objective(), list[StepReport]()
    ranks = _Waiting(objective.model.module)
    train(objective, TinyData(), ranks, tiny_config(2), tmp_path, on_step=[reports.append])
    assert [report.exposed_share for report in reports] == [pytest.approx(1e-3 / report.step_s) for report in reports]


class _WaitingShares:
    """Shares that are none, and behind every update a second of waiting for those of others."""

    def __init__(self, ranks: "_WaitingBehindUpdates", module: torch.nn.Module) -> None:
        self._ranks, self._parameters = ranks, dict(module.named_parameters())

    def of(self, name: str) -> torch.nn.Parameter:
        return self._parameters[name]

    def is_divided(self, name: str) -> bool:
        return False

    def begin(self) -> None:
        pass

    def finish(self) -> None:
        self._ranks.waited_s += 1.0

    def wrap_for_checkpoint(self, name: str, tensor: Tensor) -> Tensor:
        return tensor


class _WaitingBehindUpdates(SingleProcess):
    """A communicator that waits in updates only, and in callbacks, which are none of a step."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__(module)
        self.shares = _WaitingShares(self, module)
        self.waited_s = 0.0

    def exposed_communication_s(self) -> float:
        since, self.waited_s = self.waited_s, 0.0
        return since


def test_what_an_update_waits_for_is_exposed_in_the_step_after(tmp_path: Path) -> None:
    objective = tiny_objective()
    ranks = _WaitingBehindUpdates(objective.model.module)
    reports: list[StepReport] = []

    def wait(report: StepReport) -> None:
        reports.append(report)
        ranks.waited_s += 100.0

    train(objective, TinyData(), ranks, tiny_config(3), tmp_path, on_step=[wait])
    exposed_s = [report.exposed_share * report.step_s for report in reports]
    assert exposed_s == pytest.approx([0.0, 1.0, 1.0])


def test_bf16_trains_fp32_parameters(tmp_path: Path) -> None:
    exact, rough = tiny_objective(), tiny_objective()
    train_tiny(exact, tmp_path / "fp32", tiny_config(3))
    train_tiny(rough, tmp_path / "bf16", tiny_config(3, precision=Precision.bf16))
    weights = tensors_of(rough.model.module)
    assert all(value.dtype is torch.float32 for value in weights.values())
    assert any(not torch.equal(value, tensors_of(exact.model.module)[name]) for name, value in weights.items())
    # The learning rate is at most 1e-2, and rounding may turn the sign of a tiny gradient: three steps, both ways.
    assert_close(weights, tensors_of(exact.model.module), max_error=6e-2)


def _rank_draws(folder: str) -> float:
    train_tiny(tiny_objective(), Path(folder), tiny_config(1))
    return torch.rand(1).item()


def test_ranks_draw_different_dropout(rank_pool: RankPool, tmp_path: Path) -> None:
    first, second = rank_pool.run(_rank_draws, 2, str(tmp_path))
    assert first != second


def test_a_bad_config_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"training\.num_steps=0"):
        train_tiny(tiny_objective(), tmp_path / "run", TrainingConfig(num_steps=0))
    assert not (tmp_path / "run").exists()


def test_positions_are_counted_before_batches_move_to_the_device() -> None:
    """The meta device has no value that could be read."""
    for kind in ("pretrain", "distill"):
        objective = tiny_objective(kind)
        fetched, num_loss_tokens = _fetch(objective, TinyData(num_batches=3).train_batches(), 2, torch.device("meta"))
        assert [batch.labels_BS.device.type for batch in fetched] == ["meta", "meta"]
        assert num_loss_tokens == sum(objective.num_tokens(tiny_batch(seed)) for seed in (0, 1)) > 0
