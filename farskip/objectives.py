"""What training minimizes: next-token cross entropy, or the KL from a frozen teacher.

Decides: which positions of a batch count, and what is measured beside the loss.
Refuses: to average, to run backward, to know about ranks.

Legend: B sequences, S positions per sequence, T counted positions, D hidden size, M values per position.
"""

import torch
from torch import Tensor

from farskip.batch import IGNORED_LABEL, Batch
from farskip.distillation import chunked_forward_kl, distilled_positions_of
from farskip.losses import chunked_cross_entropy
from farskip.training_config import DistilledPositions
from farskip.training_protocols import LanguageModel, LossSums


class PretrainObjective:
    """Cross entropy over the labeled positions.

    Args:
        model: what is trained.
        chunk_tokens: positions whose logits are in memory at a time.
    """

    teacher: LanguageModel | None = None

    def __init__(self, model: LanguageModel, *, chunk_tokens: int) -> None:
        self.model = model
        self._chunk_tokens = chunk_tokens

    def num_tokens(self, batch: Batch) -> int:
        return batch.num_labels()

    def loss(self, batch: Batch) -> LossSums:
        loss, _, rows_T = cross_entropy_of(self.model, batch, chunk_tokens=self._chunk_tokens)
        return LossSums(loss=loss, sums={"cross_entropy": (loss.detach(), len(rows_T))})


class DistillationObjective:
    """Forward KL from a frozen teacher; no label enters the loss. The cross entropy is measured beside it.

    Args:
        model: the student.
        teacher: the frozen original.
        positions: every real token, or only the labeled ones.
        chunk_tokens: positions whose logits (teacher's and student's) are in memory at a time.

    Raises:
        ValueError: when a parameter of the teacher is trainable, or belongs to the student too.

    Source: FarSkip-Collective, section 3.1.
    """

    teacher: LanguageModel | None

    def __init__(
        self,
        model: LanguageModel,
        teacher: LanguageModel,
        *,
        positions: DistilledPositions = DistilledPositions.all,
        chunk_tokens: int,
    ) -> None:
        student_storage = {parameter.data_ptr() for parameter in model.module.parameters() if parameter.numel()}
        for name, parameter in teacher.module.named_parameters():
            if parameter.requires_grad:
                raise ValueError(f"the teacher's parameter {name} is trainable: freeze it with requires_grad_(False)")
            if parameter.data_ptr() in student_storage:
                raise ValueError(f"the teacher's parameter {name} is the student's too: give the teacher its own copy")
        self.model = model
        self.teacher = teacher
        self._frozen = teacher
        self._positions = positions
        self._chunk_tokens = chunk_tokens

    def num_tokens(self, batch: Batch) -> int:
        return int(distillation_mask(batch, self._positions).sum())

    def loss(self, batch: Batch) -> LossSums:
        kl, values_TM, rows_T = forward_kl_of(
            self.model, self._frozen, batch, positions=self._positions, chunk_tokens=self._chunk_tokens
        )
        sums = {
            "kl": (kl.detach(), len(rows_T)),
            "cross_entropy": (values_TM[:, 1].sum(dtype=torch.float64), batch.num_labels()),
        }
        return LossSums(loss=kl, sums=sums)


def distillation_mask(batch: Batch, positions: DistilledPositions) -> Tensor:
    """Which positions the KL is summed over, bool [B, S]."""
    if positions is DistilledPositions.labeled:
        return batch.labels_BS != IGNORED_LABEL
    return distilled_positions_of(batch)


def cross_entropy_of(model: LanguageModel, batch: Batch, *, chunk_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """One model's cross entropy on a batch.

    Returns:
        The sum (0-d, differentiable), the values [T, 1] and the flat positions (b * S + s) [T] they belong to.
    """
    rows_T = (batch.labels_BS != IGNORED_LABEL).flatten().nonzero().squeeze(-1)
    hidden_TD = model.hidden(batch).flatten(0, 1)[rows_T]
    labels_T = batch.labels_BS.flatten()[rows_T]
    loss, values_TM = chunked_cross_entropy(hidden_TD, labels_T, model.head, chunk_tokens=chunk_tokens)
    return loss, values_TM, rows_T


def forward_kl_of(
    model: LanguageModel, teacher: LanguageModel, batch: Batch, *, positions: DistilledPositions, chunk_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """KL(teacher || model) on a batch.

    Returns:
        The sum (0-d, differentiable in the model), the values [T, 2] (KL, cross entropy; 0 where there is no label) and
        the flat positions (b * S + s) [T] they belong to.
    """
    rows_T = distillation_mask(batch, positions).flatten().nonzero().squeeze(-1)
    with torch.no_grad():
        teacher_hidden_TD = teacher.hidden(batch).flatten(0, 1)[rows_T]
    hidden_TD = model.hidden(batch).flatten(0, 1)[rows_T]
    labels_T = batch.labels_BS.flatten()[rows_T]
    loss, values_TM = chunked_forward_kl(
        hidden_TD, model.head, teacher_hidden_TD, teacher.head, labels_T, chunk_tokens=chunk_tokens
    )
    return loss, values_TM, rows_T
