"""Held-out cross entropy and KL, with an interval, and how much of a damage was repaired.

Decides: the estimate (sum over positions divided by their number, over all ranks) and its uncertainty (normal theory
for a ratio over sequences, which are taken as independent; positions of one sequence are not). The per-sequence sums
are kept, so that two models measured on the same text are compared pairwise.
Refuses: to compare measurements of different text; to print a ratio of which the denominator is noise.

Legend: B sequences per batch, S positions per sequence, T counted positions, N sequences of all ranks, R ranks.
"""

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from farskip.batch import IGNORED_LABEL, Batch
from farskip.objectives import cross_entropy_of, forward_kl_of
from farskip.training_config import DistilledPositions, Precision
from farskip.training_protocols import Communicator, LanguageModel

NORMAL_95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""

DAMAGE_NOISE_FACTOR = 3.0
"""How many standard errors a damage must exceed before a share of it is worth printing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What a model does on held-out text. Equal on all ranks.

    Attributes:
        cross_entropy: nats per labeled position.
        cross_entropy_ci95: half the width of its 95 % interval; infinite with fewer than two sequences.
        kl: KL(teacher || model), nats per real token; None without teacher.
        kl_ci95: half the width of its 95 % interval.
        num_tokens: labeled positions of all ranks.
        sequence_losses: cross entropy summed over each sequence's labeled positions, rank by rank.
        sequence_tokens: how many these are.
    """

    cross_entropy: float
    cross_entropy_ci95: float
    kl: float | None
    kl_ci95: float | None
    num_tokens: int
    sequence_losses: tuple[float, ...]
    sequence_tokens: tuple[int, ...]


def evaluate(
    model: LanguageModel,
    batches: Iterable[Batch],
    communicator: Communicator,
    *,
    teacher: LanguageModel | None = None,
    precision: Precision = Precision.fp32,
    positions: DistilledPositions = DistilledPositions.all,
    chunk_tokens: int = 1024,
) -> Evaluation:
    """Measure a model on held-out text, all ranks together.

    Args:
        model: in whatever mode; runs in eval mode and gets its mode back.
        batches: this rank's share; equally many on every rank, because the model's own collectives need all ranks.
        communicator: the ranks.
        teacher: measure the KL from it too.
        precision: bf16 runs the models under autocast.
        positions: over which positions the KL is taken.
        chunk_tokens: positions whose logits are in memory at a time.

    Returns:
        The same on every rank.

    Raises:
        ValueError: when ranks have different numbers of batches, there is none, or no position has a label.
    """
    batches = list(batches)
    device = next(model.module.parameters()).device
    _check_equal_counts(len(batches), communicator, device)
    modules = [model.module, *([teacher.module] if teacher is not None else [])]
    modes = [module.training for module in modules]
    rows: list[Tensor] = []
    try:
        for module in modules:
            module.eval()
        for batch in batches:
            with torch.no_grad(), autocast(device, precision):
                rows.append(_sequence_sums(model, teacher, batch.to(device), positions, chunk_tokens))
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.train(mode)
    sums_N4 = _gather(torch.cat(rows), communicator)
    loss_N, labels_N, kl_N, counted_N = sums_N4.unbind(-1)
    if labels_N.sum() == 0:
        raise ValueError("no held-out position has a label: check the held-out text and the chat template's roles")
    cross_entropy, error = _ratio(loss_N, labels_N)
    kl, kl_error = _ratio(kl_N, counted_N) if teacher is not None else (None, None)
    return Evaluation(
        cross_entropy=cross_entropy,
        cross_entropy_ci95=NORMAL_95 * error,
        kl=kl,
        kl_ci95=None if kl_error is None else NORMAL_95 * kl_error,
        num_tokens=int(labels_N.sum()),
        sequence_losses=tuple(loss_N.tolist()),
        sequence_tokens=tuple(int(n) for n in labels_N.tolist()),
    )


def paired_difference(first: Evaluation, second: Evaluation) -> tuple[float, float]:
    """Cross entropy of the second model minus that of the first, and half the width of its 95 % interval.

    The difference is taken sequence by sequence, so what makes some sequences harder than others drops out.

    Raises:
        ValueError: when the two were not measured on the same sequences.
    """
    if first.sequence_tokens != second.sequence_tokens:
        raise ValueError("the evaluations are of different text: use the same held-out batches and ranks for all")
    difference_N = torch.tensor(second.sequence_losses, dtype=torch.float64) - torch.tensor(
        first.sequence_losses, dtype=torch.float64
    )
    difference, error = _ratio(difference_N, torch.tensor(first.sequence_tokens, dtype=torch.float64))
    return difference, NORMAL_95 * error


def damage_closed(original: Evaluation, rewired: Evaluation, repaired: Evaluation) -> float | None:
    """Share of the rewiring's damage that training took away: (L_rewired - L_repaired) / (L_rewired - L_original).

    Returns:
        1 when the repaired model is as good as the original. None when the damage is below three times its own standard
        error, measured on the paired difference of each sequence.

    Raises:
        ValueError: when the three were not measured on the same sequences.
    """
    damage, ci95 = paired_difference(original, rewired)
    remaining, _ = paired_difference(repaired, rewired)
    if not damage > DAMAGE_NOISE_FACTOR * ci95 / NORMAL_95:
        return None
    return remaining / damage


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """What a model's forward runs under."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision is Precision.bf16 else nullcontext()


def _sequence_sums(
    model: LanguageModel, teacher: LanguageModel | None, batch: Batch, positions: DistilledPositions, chunk_tokens: int
) -> Tensor:
    """Per sequence, fp64 [B, 4]: cross entropy, labeled positions, KL, positions of the KL."""
    num_sequences, length = batch.labels_BS.shape
    if teacher is None:
        _, values_TM, rows_T = cross_entropy_of(model, batch, chunk_tokens=chunk_tokens)
        loss_T, kl_T = values_TM[:, 0], torch.zeros_like(values_TM[:, 0])
    else:
        _, values_TM, rows_T = forward_kl_of(model, teacher, batch, positions=positions, chunk_tokens=chunk_tokens)
        loss_T, kl_T = values_TM[:, 1], values_TM[:, 0]
    is_labeled_T = batch.labels_BS.flatten()[rows_T] != IGNORED_LABEL
    columns_T4 = torch.stack([loss_T, is_labeled_T, kl_T, torch.ones_like(kl_T)], dim=-1).to(torch.float64)
    sums_B4 = columns_T4.new_zeros(num_sequences, 4)
    return sums_B4.index_add_(0, rows_T // length, columns_T4)


def _check_equal_counts(num_batches: int, communicator: Communicator, device: torch.device) -> None:
    counts_R = torch.zeros(communicator.data_size, dtype=torch.float64, device=device)
    counts_R[communicator.data_rank] = num_batches
    counts = [int(n) for n in _sum_of_shares(counts_R, communicator).tolist()]
    if min(counts) != max(counts) or counts[0] == 0:
        raise ValueError(
            f"held-out batches per rank are {counts}: every rank needs the same number, at least 1; "
            "hold out more text or ask for fewer batches"
        )


def _gather(rows_n4: Tensor, communicator: Communicator) -> Tensor:
    """All ranks' rows, rank by rank, equal on every rank: a sum in which each rank fills its own place."""
    counts_R = rows_n4.new_zeros(communicator.data_size)
    counts_R[communicator.data_rank] = rows_n4.shape[0]
    counts = [int(n) for n in _sum_of_shares(counts_R, communicator).tolist()]
    start = sum(counts[: communicator.data_rank])
    all_rows_N4 = rows_n4.new_zeros(sum(counts), rows_n4.shape[1])
    all_rows_N4[start : start + rows_n4.shape[0]] = rows_n4
    return _sum_of_shares(all_rows_N4, communicator).cpu()


def _sum_of_shares(tensor: Tensor, communicator: Communicator) -> Tensor:
    """The sum over the shares of the data, from all processes: decisions hang on it, so all get the same."""
    return communicator.sum_over_processes(tensor) / (communicator.world_size // communicator.data_size)


def _ratio(sums_N: Tensor, counts_N: Tensor) -> tuple[float, float]:
    """sum / count over sequences, and its standard error by linearization; infinite with fewer than two sequences."""
    ratio = float(sums_N.sum() / counts_N.sum())
    num_sequences = int((counts_N > 0).sum())
    if num_sequences < 2:
        return ratio, math.inf
    residual_N = sums_N - ratio * counts_N
    variance = num_sequences / (num_sequences - 1) * float(residual_N.square().sum()) / float(counts_N.sum()) ** 2
    return ratio, math.sqrt(variance)
