"""Forward KL against its closed form, zero weights included, and which positions count."""

import math

import pytest
import torch

from farskip.batch import IGNORED_LABEL, Batch
from farskip.distillation import chunked_forward_kl, distilled_positions_of, token_forward_kl
from farskip.objectives import DistillationObjective
from farskip.testing import assert_close
from farskip.testing_training import TinyLanguageModel, TinyModule, tiny_batch

NUM_POSITIONS, WIDTH, TEACHER_WIDTH, VOCAB = 9, 5, 3, 7


def _inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    labels_T = torch.randint(VOCAB, (NUM_POSITIONS,), generator=generator)
    labels_T[2] = IGNORED_LABEL
    return (
        draw(NUM_POSITIONS, WIDTH).requires_grad_(),
        draw(VOCAB, WIDTH).requires_grad_(),
        draw(NUM_POSITIONS, TEACHER_WIDTH),
        draw(VOCAB, TEACHER_WIDTH),
        labels_T,
    )


@pytest.mark.parametrize("chunk_tokens", [1, 4, 9], ids=lambda n: f"C{n}")
def test_kl_and_gradients_equal_the_closed_form(chunk_tokens: int) -> None:
    hidden_TD, weight_VD, teacher_TD, teacher_VD, labels_T = _inputs()
    loss, values_T2 = chunked_forward_kl(
        hidden_TD,
        lambda h: h @ weight_VD.T,
        teacher_TD,
        lambda h: h @ teacher_VD.T,
        labels_T,
        chunk_tokens=chunk_tokens,
    )
    loss.backward()
    p_TV = torch.softmax(teacher_TD @ teacher_VD.T, -1)
    q_TV = torch.softmax(hidden_TD.detach() @ weight_VD.detach().T, -1)
    kl_T = (p_TV * (p_TV / q_TV).log()).sum(-1)
    assert_close(values_T2[:, 0], kl_T, rel_norm=1e-13)
    assert float(loss.detach()) == pytest.approx(float(kl_T.sum()), rel=1e-13)
    assert hidden_TD.grad is not None and weight_VD.grad is not None
    # dKL/dlogits = q - p.
    assert_close(hidden_TD.grad, (q_TV - p_TV) @ weight_VD.detach(), rel_norm=1e-13)
    assert_close(weight_VD.grad, (q_TV - p_TV).T @ hidden_TD.detach(), rel_norm=1e-13)
    rows_T = torch.arange(NUM_POSITIONS)
    ce_T = torch.where(labels_T >= 0, -q_TV[rows_T, labels_T.clamp(min=0)].log(), 0.0)
    assert_close(values_T2[:, 1], ce_T, rel_norm=1e-13)


def test_gradcheck() -> None:
    hidden_TD, weight_VD, teacher_TD, teacher_VD, labels_T = _inputs()

    def loss(hidden_TD: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
        return chunked_forward_kl(
            hidden_TD, lambda h: h @ weight_VD.T, teacher_TD, lambda h: h @ teacher_VD.T, labels_T, chunk_tokens=4
        )[0]

    assert torch.autograd.gradcheck(loss, (hidden_TD, weight_VD))


def test_a_token_without_weight_at_the_teacher_adds_nothing() -> None:
    teacher_TV = torch.tensor([[0.0, -math.inf, 1.0], [2.0, -1e5, 0.0], [0.0, -math.inf, 0.0]])
    student_TV = torch.tensor([[0.5, 3.0, 0.0], [0.0, 0.0, 0.0], [0.0, -math.inf, 0.0]], requires_grad=True)
    kl_T = token_forward_kl(teacher_TV, student_TV)
    kl_T.sum().backward()
    p_TV, q_TV = torch.softmax(teacher_TV.double(), -1), torch.softmax(student_TV.detach().double(), -1)
    kept_TV = p_TV > 0
    terms_TV = torch.zeros_like(p_TV)
    terms_TV[kept_TV] = p_TV[kept_TV] * (p_TV[kept_TV] / q_TV[kept_TV]).log()
    # fp32 rounding of three terms.
    assert_close(kl_T.detach().double(), terms_TV.sum(-1), max_error=1e-6)
    assert student_TV.grad is not None
    assert_close(student_TV.grad.double(), q_TV - p_TV, max_error=1e-6)


def test_equal_models_have_exactly_no_divergence() -> None:
    logits_TV = 10 * torch.randn(50, 31, generator=torch.Generator().manual_seed(0))
    kl_T = token_forward_kl(logits_TV, logits_TV.clone())
    assert torch.equal(kl_T, torch.zeros_like(kl_T))


def test_a_token_that_the_student_excludes_is_infinitely_far() -> None:
    kl_T = token_forward_kl(torch.zeros(1, 2), torch.tensor([[0.0, -math.inf]]))
    assert kl_T.tolist() == [math.inf]


def test_no_gradient_reaches_the_teacher() -> None:
    hidden_TD, weight_VD, teacher_TD, teacher_VD, labels_T = _inputs()
    teacher_VD.requires_grad_()
    teacher_TD.requires_grad_()
    chunked_forward_kl(
        hidden_TD, lambda h: h @ weight_VD.T, teacher_TD, lambda h: h @ teacher_VD.T, labels_T, chunk_tokens=4
    )[0].backward()
    assert teacher_VD.grad is None and teacher_TD.grad is None


def test_different_vocabularies_are_refused() -> None:
    hidden_TD, weight_VD, teacher_TD, teacher_VD, labels_T = _inputs()
    with pytest.raises(ValueError, match="the teacher has 6 tokens and the student 7"):
        chunked_forward_kl(
            hidden_TD, lambda h: h @ weight_VD.T, teacher_TD, lambda h: h @ teacher_VD[:6].T, labels_T, chunk_tokens=4
        )


def test_positions_of_documents_that_have_a_label_count() -> None:
    none = IGNORED_LABEL
    batch = Batch(
        input_ids_BS=torch.zeros(3, 6, dtype=torch.int64),
        labels_BS=torch.tensor(
            [
                [1, 1, none, none, 1, none],  # two documents, the second one's first position without label
                [none, none, 1, none, none, none],  # one document, then padding that is one document
                [
                    5,
                    none,
                    none,
                    none,
                    none,
                    none,
                ],  # a row that starts inside a document, then padding position by position
            ]
        ),
        position_ids_BS=torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 0, 1, 2], [7, 8, 0, 0, 0, 0]]),
    )
    expected = [
        [True, True, True, True, True, True],
        [True, True, True, False, False, False],
        [True, True, False, False, False, False],
    ]
    assert distilled_positions_of(batch).tolist() == expected


def test_every_position_a_document_of_its_own() -> None:
    labels_BS = torch.tensor([[IGNORED_LABEL, 3, IGNORED_LABEL]])
    zeros_BS = torch.zeros(1, 3, dtype=torch.int64)
    batch = Batch(input_ids_BS=zeros_BS, labels_BS=labels_BS, position_ids_BS=zeros_BS)
    assert distilled_positions_of(batch).tolist() == [[False, True, False]]


def test_the_objective_measures_the_students_cross_entropy_beside_the_kl() -> None:
    teacher = TinyLanguageModel(TinyModule(seed=1))
    teacher.module.requires_grad_(False)
    student = TinyLanguageModel(TinyModule(seed=0))
    objective = DistillationObjective(student, teacher, chunk_tokens=5)
    batch = tiny_batch(0)
    sums = objective.loss(batch)
    hidden_TD, teacher_TD = student.hidden(batch).flatten(0, 1), teacher.hidden(batch).flatten(0, 1)
    logits_TV = student.head(hidden_TD)
    kl_T = token_forward_kl(teacher.head(teacher_TD), logits_TV)
    ce = torch.nn.functional.cross_entropy(logits_TV, batch.labels_BS.flatten(), reduction="sum")
    assert float(sums.loss.detach()) == pytest.approx(float(kl_T.sum().detach()), rel=1e-5)
    assert sums.sums["kl"][1] == objective.num_tokens(batch) == batch.input_ids_BS.numel()
    assert float(sums.sums["cross_entropy"][0]) == pytest.approx(float(ce.detach()), rel=1e-5)
    assert sums.sums["cross_entropy"][1] == batch.num_labels() < batch.input_ids_BS.numel()


def test_a_teacher_that_is_trainable_or_shares_weights_is_refused() -> None:
    student, teacher = TinyLanguageModel(), TinyLanguageModel()
    with pytest.raises(ValueError, match=r"embedding\.weight is trainable: freeze it"):
        DistillationObjective(student, teacher, chunk_tokens=4)
    teacher.module.requires_grad_(False)
    teacher.tiny.embedding.weight.data = student.tiny.embedding.weight.data
    with pytest.raises(ValueError, match=r"embedding\.weight is the student's too"):
        DistillationObjective(student, teacher, chunk_tokens=4)
