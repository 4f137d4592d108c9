"""Held-out measurements: the mean, its interval, the pooling over ranks, and the share of a damage that was closed."""

import dataclasses
import math

import pytest
import torch

from farskip.batch import IGNORED_LABEL, Batch
from farskip.evaluation import Evaluation, damage_closed, evaluate
from farskip.testing import RankPool
from farskip.testing_training import ReplicatedRanks, TinyData, TinyLanguageModel, TinyModule, tiny_batch
from farskip.training_config import Precision
from farskip.training_protocols import SingleProcess


def _evaluate(model: TinyLanguageModel, batches: list[Batch], teacher: TinyLanguageModel | None = None) -> Evaluation:
    return evaluate(model, batches, SingleProcess(model.module), teacher=teacher, chunk_tokens=5)


def test_means_equal_plain_computation() -> None:
    model, teacher = TinyLanguageModel(TinyModule(seed=0)), TinyLanguageModel(TinyModule(seed=1))
    batches = [tiny_batch(seed) for seed in range(4)]
    result = _evaluate(model, batches, teacher)
    loss, num_labels, kl, num_positions = 0.0, 0, 0.0, 0
    with torch.no_grad():
        for batch in batches:
            log_q = torch.log_softmax(model.head(model.hidden(batch).flatten(0, 1)).double(), -1)
            log_p = torch.log_softmax(teacher.head(teacher.hidden(batch).flatten(0, 1)).double(), -1)
            labels = batch.labels_BS.flatten()
            loss += float(torch.nn.functional.nll_loss(log_q, labels, reduction="sum"))
            kl += float((log_p.exp() * (log_p - log_q)).sum())
            num_labels += batch.num_labels()
            num_positions += labels.numel()
    # fp32 logits in both; the sums differ in rounding.
    assert result.cross_entropy == pytest.approx(loss / num_labels, rel=1e-5)
    assert result.kl == pytest.approx(kl / num_positions, rel=1e-5)
    assert result.num_tokens == num_labels == sum(result.sequence_tokens)
    assert sum(result.sequence_losses) == pytest.approx(loss, rel=1e-5)
    assert len(result.sequence_tokens) == 8
    without = _evaluate(model, batches)
    assert without.kl is None and without.kl_ci95 is None
    assert without.cross_entropy == pytest.approx(result.cross_entropy, rel=1e-5)


def test_the_interval_covers_the_truth_about_nineteen_times_in_twenty() -> None:
    """Samples of 32 sequences from a fixed population of 512: how often the interval holds the population's mean."""
    model = TinyLanguageModel()
    population = [tiny_batch(seed, num_sequences=1) for seed in range(512)]
    truth = _evaluate(model, population).cross_entropy
    whole = _evaluate(model, population)
    generator = torch.Generator().manual_seed(0)
    hits, num_trials = 0, 300
    for _ in range(num_trials):
        picked = torch.randint(512, (32,), generator=generator).tolist()
        batch = _with_sequences(whole, picked)
        hits += abs(batch.cross_entropy - truth) <= batch.cross_entropy_ci95
    # 95 % of 300 is 285, with a standard deviation of 3.8; the normal quantile on 32 sequences costs about one percent.
    assert 268 <= hits <= 297


def _with_sequences(whole: Evaluation, picked: list[int]) -> Evaluation:
    """The evaluation of some of the sequences, recomputed through the public function on a model that returns them."""
    from farskip.evaluation import NORMAL_95, _ratio

    losses = torch.tensor([whole.sequence_losses[i] for i in picked], dtype=torch.float64)
    tokens = torch.tensor([whole.sequence_tokens[i] for i in picked], dtype=torch.float64)
    value, error = _ratio(losses, tokens)
    return dataclasses.replace(whole, cross_entropy=value, cross_entropy_ci95=NORMAL_95 * error)


def test_one_sequence_has_no_interval() -> None:
    result = _evaluate(TinyLanguageModel(), [tiny_batch(0, num_sequences=1)])
    assert result.cross_entropy_ci95 == math.inf


def test_a_sequence_without_label_does_not_count() -> None:
    batch = tiny_batch(0)
    blank = dataclasses.replace(batch, labels_BS=torch.full_like(batch.labels_BS, IGNORED_LABEL))
    model = TinyLanguageModel()
    alone, padded = _evaluate(model, [batch]), _evaluate(model, [batch, blank])
    assert padded.cross_entropy == alone.cross_entropy
    assert padded.cross_entropy_ci95 == alone.cross_entropy_ci95
    with pytest.raises(ValueError, match="no held-out position has a label"):
        _evaluate(model, [blank])


def test_no_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"held-out batches per rank are \[0\]"):
        _evaluate(TinyLanguageModel(), [])


def test_dropout_is_off_and_the_mode_comes_back() -> None:
    model = TinyLanguageModel(TinyModule(dropout=0.9))
    model.module.train()
    model.tiny.norm.eval()
    results = [_evaluate(model, [tiny_batch(0)]).cross_entropy for _ in range(2)]
    assert results[0] == results[1]
    assert model.module.training
    assert all(parameter.grad is None for parameter in model.module.parameters())


def test_bf16_is_close_to_fp32_but_not_it() -> None:
    model = TinyLanguageModel()
    exact = _evaluate(model, [tiny_batch(0)]).cross_entropy
    rough = evaluate(model, [tiny_batch(0)], SingleProcess(model.module), precision=Precision.bf16).cross_entropy
    assert rough != exact
    # bf16 keeps 8 bits.
    assert rough == pytest.approx(exact, rel=2e-2)


def _rank_evaluates(num_batches: list[int]) -> Evaluation:
    model, teacher = TinyLanguageModel(TinyModule(seed=0)), TinyLanguageModel(TinyModule(seed=1))
    ranks = ReplicatedRanks(model.module)
    data = TinyData(ranks.rank, ranks.world_size)
    batches = data.heldout_batches(num_batches[ranks.rank])
    return evaluate(model, batches, ranks, teacher=teacher, chunk_tokens=5)


def test_two_ranks_measure_what_one_rank_measures(rank_pool: RankPool) -> None:
    first, second = rank_pool.run(_rank_evaluates, 2, [3, 3])
    assert first == second
    model, teacher = TinyLanguageModel(TinyModule(seed=0)), TinyLanguageModel(TinyModule(seed=1))
    alone = _evaluate(model, list(TinyData().heldout_batches(6)), teacher)
    # The same sequences in another order: only the order of the additions differs.
    assert first.cross_entropy == pytest.approx(alone.cross_entropy, rel=1e-12)
    assert first.cross_entropy_ci95 == pytest.approx(alone.cross_entropy_ci95, rel=1e-9)
    assert first.kl == pytest.approx(alone.kl, rel=1e-12)
    assert first.kl_ci95 == pytest.approx(alone.kl_ci95, rel=1e-9)
    assert first.num_tokens == alone.num_tokens
    assert sorted(first.sequence_losses) == pytest.approx(sorted(alone.sequence_losses), rel=1e-12)


def _rank_sees_unequal_batches() -> str:
    with pytest.raises(ValueError, match=r"held-out batches per rank are \[3, 2\]") as caught:
        _rank_evaluates([3, 2])
    return str(caught.value)


def test_unequal_batches_are_refused_on_every_rank(rank_pool: RankPool) -> None:
    first, second = rank_pool.run(_rank_sees_unequal_batches, 2)
    assert first == second


def _measured(losses: list[float]) -> Evaluation:
    tokens = (10,) * len(losses)
    return Evaluation(
        cross_entropy=sum(losses) / sum(tokens),
        cross_entropy_ci95=0.0,
        kl=None,
        kl_ci95=None,
        num_tokens=sum(tokens),
        sequence_losses=tuple(losses),
        sequence_tokens=tokens,
    )


def test_damage_closed_is_the_share_of_the_loss_that_came_back() -> None:
    original = _measured([20.0, 30.0, 40.0, 10.0])
    rewired = _measured([30.0, 40.1, 50.0, 19.9])
    repaired = _measured([21.0, 31.0, 41.0, 11.0])
    share = damage_closed(original, rewired, repaired)
    assert share == pytest.approx((140.0 - 104.0) / (140.0 - 100.0))
    assert damage_closed(original, rewired, original) == pytest.approx(1.0)
    assert damage_closed(original, rewired, rewired) == 0.0


def test_the_noise_is_that_of_the_paired_difference() -> None:
    """Sequences that differ much among themselves do not hide a damage that is the same in each of them."""
    original = _measured([1.0, 100.0, 1000.0, 10.0])
    rewired = _measured([1.5, 100.5, 1000.5, 10.5])
    assert damage_closed(original, rewired, original) == pytest.approx(1.0)


def test_no_share_of_a_damage_that_is_noise() -> None:
    original = _measured([20.0, 30.0, 40.0, 10.0])
    assert damage_closed(original, _measured([25.0, 26.0, 44.0, 9.0]), original) is None
    assert damage_closed(original, original, original) is None
    assert damage_closed(original, _measured([10.0, 20.0, 30.0, 0.0]), original) is None
    # Differences 1, 1, 1 and x are (3 + x) / (1 - x) standard errors from 0: 3.4 and 2.3 here.
    assert damage_closed(original, _measured([21.0, 31.0, 41.0, 10.1]), original) is not None
    assert damage_closed(original, _measured([21.0, 31.0, 41.0, 9.8]), original) is None


def test_one_sequence_is_never_more_than_noise() -> None:
    assert damage_closed(_measured([1.0]), _measured([9.0]), _measured([1.0])) is None


def test_different_text_is_refused() -> None:
    with pytest.raises(ValueError, match="different text"):
        damage_closed(_measured([1.0, 2.0]), _measured([1.0, 2.0]), _measured([1.0]))
