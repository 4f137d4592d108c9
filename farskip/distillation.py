"""Self-distillation of a rewired model from the frozen original: forward KL(teacher || student), pure functions of
tensors.

Decides: the divergence (forward KL, temperature 1, no label term), which positions count, and that teacher and student
logits stand in memory together for one chunk of positions only.
Refuses: to run a model; it gets hidden states and heads.

Legend: B sequences, S positions per sequence, T positions, C positions of one chunk, D hidden size, V vocabulary.
"""

import torch
from torch import Tensor

from farskip.batch import IGNORED_LABEL, Batch
from farskip.losses import Head, chunked_loss, token_cross_entropy, upcast


def token_forward_kl(teacher_logits_TV: Tensor, student_logits_TV: Tensor) -> Tensor:
    """KL(teacher || student) of each position's next-token distribution, in fp32 (fp64 logits stay fp64).

    A token the teacher gives zero weight adds exactly 0, whatever the student gives it.

    Args:
        teacher_logits_TV: [T, V], any float dtype; a logit may be -inf. No gradient goes into it.
        student_logits_TV: [T, V], any float dtype.

    Returns:
        [T], differentiable in the student's logits; infinite where the student excludes a token the teacher allows.

    Source: FarSkip-Collective, section 3.1.
    """
    log_p_TV = torch.log_softmax(upcast(teacher_logits_TV.detach()), dim=-1)
    log_q_TV = torch.log_softmax(upcast(student_logits_TV), dim=-1)
    p_TV = log_p_TV.exp()
    # p * (log p - log q), not p log p - p log q: equal models give exactly 0, nearly equal ones do not cancel.
    terms_TV = torch.where(p_TV > 0, p_TV * (log_p_TV - log_q_TV), torch.zeros_like(log_q_TV))
    return terms_TV.sum(-1)


def chunked_forward_kl(
    hidden_TD: Tensor,
    head: Head,
    teacher_hidden_TD: Tensor,
    teacher_head: Head,
    labels_T: Tensor,
    *,
    chunk_tokens: int,
) -> tuple[Tensor, Tensor]:
    """Forward KL summed over the given positions, with the student's cross entropy measured beside it.

    Args:
        hidden_TD: the student's hidden states after its final norm.
        head: the student's head.
        teacher_hidden_TD: the teacher's, same positions; its width may differ.
        teacher_head: the teacher's head, over the same vocabulary.
        labels_T: int64, for the cross entropy only; ``IGNORED_LABEL`` where there is none.
        chunk_tokens: positions per chunk.

    Returns:
        The sum of the KL (0-d fp64, differentiable in the student) and the values per position [T, 2]: KL and cross
        entropy.

    Raises:
        ValueError: when the two heads have vocabularies of different size.
    """

    def values(logits_CV: Tensor, rows: slice) -> Tensor:
        with torch.no_grad():
            teacher_logits_CV = teacher_head(teacher_hidden_TD[rows])
        if teacher_logits_CV.shape != logits_CV.shape:
            raise ValueError(
                f"the teacher has {teacher_logits_CV.shape[-1]} tokens and the student {logits_CV.shape[-1]}: "
                "distillation needs one vocabulary, use the original of this model as teacher"
            )
        kl_C = token_forward_kl(teacher_logits_CV, logits_CV)
        with torch.no_grad():
            ce_C = token_cross_entropy(logits_CV, labels_T[rows])
        return torch.stack([kl_C, ce_C], dim=-1)

    return chunked_loss(hidden_TD, head, values, chunk_tokens=chunk_tokens)


def distilled_positions_of(batch: Batch) -> Tensor:
    """Which positions the KL is summed over: every position of a document that has at least one label.

    The teacher's prediction is a target at every real token: also in a user's turn and at a document's last token,
    where there is no label. A document without any label is padding and is left out.

    Returns:
        bool [B, S].
    """
    document_BS = (batch.position_ids_BS == 0).to(torch.int64).cumsum(dim=-1)
    # Numbered from 0 in each row, also in a row that starts inside a document: at most S numbers.
    document_BS = document_BS - document_BS[:, :1]
    is_labeled_BS = (batch.labels_BS != IGNORED_LABEL).to(torch.int64)
    num_labels_BS = torch.zeros_like(document_BS).scatter_add(-1, document_BS, is_labeled_BS)
    return num_labels_BS.gather(-1, document_BS) > 0
