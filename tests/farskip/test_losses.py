"""Chunked losses against their closed forms in fp64, and what they keep in memory."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from farskip.batch import IGNORED_LABEL
from farskip.distillation import chunked_forward_kl
from farskip.losses import chunked_cross_entropy, token_cross_entropy
from farskip.testing import assert_close, assert_equal_bits

NUM_POSITIONS, WIDTH, VOCAB = 13, 5, 11


def _inputs(dtype: torch.dtype = torch.float64, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden_TD = torch.randn(NUM_POSITIONS, WIDTH, dtype=torch.float64, generator=generator).to(dtype)
    weight_VD = torch.randn(VOCAB, WIDTH, dtype=torch.float64, generator=generator).to(dtype)
    labels_T = torch.randint(VOCAB, (NUM_POSITIONS,), generator=generator)
    labels_T[::4] = IGNORED_LABEL
    return hidden_TD.requires_grad_(), weight_VD.requires_grad_(), labels_T


def _closed_form(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> tuple[float, Tensor, Tensor]:
    """Loss and gradients written out: log-sum-exp minus the label's logit; softmax minus one at the label."""
    logits_TV = hidden_TD.detach() @ weight_VD.detach().T
    kept_T = labels_T != IGNORED_LABEL
    rows_T = kept_T.nonzero().squeeze(-1)
    loss = (logits_TV.exp().sum(-1).log()[rows_T] - logits_TV[rows_T, labels_T[rows_T]]).sum()
    slope_TV = logits_TV.exp() / logits_TV.exp().sum(-1, keepdim=True)
    slope_TV[rows_T, labels_T[rows_T]] -= 1.0
    slope_TV[~kept_T] = 0.0
    return float(loss), slope_TV @ weight_VD.detach(), slope_TV.T @ hidden_TD.detach()


@pytest.mark.parametrize("chunk_tokens", [1, 4, 13, 64], ids=lambda n: f"C{n}")
def test_cross_entropy_and_gradients_equal_the_closed_form(chunk_tokens: int) -> None:
    hidden_TD, weight_VD, labels_T = _inputs()
    loss, values_T1 = chunked_cross_entropy(hidden_TD, labels_T, lambda h: h @ weight_VD.T, chunk_tokens=chunk_tokens)
    (3.0 * loss).backward()
    expected, hidden_grad_TD, weight_grad_VD = _closed_form(hidden_TD, weight_VD, labels_T)
    # fp64 rounding over a few dozen additions.
    assert abs(float(loss.detach()) - expected) < 1e-12 * abs(expected)
    assert hidden_TD.grad is not None and weight_VD.grad is not None
    assert_close({"hidden": hidden_TD.grad}, {"hidden": 3.0 * hidden_grad_TD}, rel_norm=1e-13)
    assert_close({"weight": weight_VD.grad}, {"weight": 3.0 * weight_grad_VD}, rel_norm=1e-13)
    assert values_T1.shape == (NUM_POSITIONS, 1)
    assert not values_T1.requires_grad
    assert torch.equal(values_T1[::4], torch.zeros_like(values_T1[::4]))
    assert torch.equal(hidden_TD.grad[::4], torch.zeros_like(hidden_TD.grad[::4]))


def test_gradcheck_through_hidden_states_weight_and_bias() -> None:
    hidden_TD, weight_VD, labels_T = _inputs()
    bias_V = torch.zeros(VOCAB, dtype=torch.float64, requires_grad=True)

    def loss(hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor) -> Tensor:
        return chunked_cross_entropy(hidden_TD, labels_T, lambda h: h @ weight_VD.T + bias_V, chunk_tokens=4)[0]

    assert torch.autograd.gradcheck(loss, (hidden_TD, weight_VD, bias_V))


def test_a_tied_head_adds_its_gradient_to_the_embeddings() -> None:
    _, weight_VD, labels_T = _inputs()
    ids_T = torch.arange(NUM_POSITIONS) % VOCAB
    gradients = []
    for chunk_tokens in (None, 3):
        table_VD = weight_VD.detach().clone().requires_grad_()
        hidden_TD = torch.tanh(table_VD[ids_T])
        if chunk_tokens is None:
            loss = token_cross_entropy(hidden_TD @ table_VD.T, labels_T).sum()
        else:
            head = lambda h, table_VD=table_VD: h @ table_VD.T  # noqa: E731
            loss, _ = chunked_cross_entropy(hidden_TD, labels_T, head, chunk_tokens=chunk_tokens)
        loss.backward()
        gradients.append(table_VD.grad)
    assert gradients[0] is not None and gradients[1] is not None
    assert_close(gradients[1], gradients[0], rel_norm=1e-13)


def test_fp32_stays_within_rounding_of_fp64() -> None:
    hidden_TD, weight_VD, labels_T = _inputs(torch.float32)
    loss, _ = chunked_cross_entropy(hidden_TD, labels_T, lambda h: h @ weight_VD.T, chunk_tokens=4)
    loss.backward()
    expected, hidden_grad_TD, weight_grad_VD = _closed_form(hidden_TD.double(), weight_VD.double(), labels_T)
    # 2^-24 per rounding, a few dozen of them.
    assert abs(float(loss.detach()) - expected) < 3e-6 * abs(expected)
    assert hidden_TD.grad is not None and weight_VD.grad is not None
    assert_close({"h": hidden_TD.grad.double()}, {"h": hidden_grad_TD}, rel_norm=3e-6)
    assert_close({"w": weight_VD.grad.double()}, {"w": weight_grad_VD}, rel_norm=3e-6)


def test_softmax_of_bf16_logits_is_fp32() -> None:
    logits_TV = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels_T = torch.tensor([1, 2, 3])
    values_T = token_cross_entropy(logits_TV, labels_T)
    assert values_T.dtype is torch.float32
    assert_close(values_T.double(), token_cross_entropy(logits_TV.double(), labels_T), max_error=1e-6)


def test_under_bf16_autocast_the_head_gets_the_gradient_of_every_chunk() -> None:
    hidden_TD, weight_VD, labels_T = _inputs(torch.float32)
    head = torch.nn.Linear(WIDTH, VOCAB, bias=False)
    head.weight.data.copy_(weight_VD.detach())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = chunked_cross_entropy(hidden_TD, labels_T, head, chunk_tokens=3)
    loss.backward()
    _, hidden_grad_TD, weight_grad_VD = _closed_form(hidden_TD.double(), weight_VD.double(), labels_T)
    assert head.weight.grad is not None and hidden_TD.grad is not None
    assert head.weight.grad.dtype is torch.float32
    # bf16 has 8 bits: a few times 2^-9 relative. A lost chunk would be off by a quarter.
    assert_close(head.weight.grad.double(), weight_grad_VD, rel_norm=2e-2)
    assert_close(hidden_TD.grad.double(), hidden_grad_TD, rel_norm=2e-2)


def test_a_head_that_leaves_autocast_keeps_fp32_gradients() -> None:
    hidden_TD, weight_VD, labels_T = _inputs(torch.float32)

    def head(hidden_CD: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return hidden_CD @ weight_VD.T

    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = chunked_cross_entropy(hidden_TD, labels_T, head, chunk_tokens=4)
    loss.backward()
    _, hidden_grad_TD, weight_grad_VD = _closed_form(hidden_TD.double(), weight_VD.double(), labels_T)
    assert hidden_TD.grad is not None and weight_VD.grad is not None
    # fp32 rounding; a backward in bf16 would be off by some 1e-3.
    assert_close(hidden_TD.grad.double(), hidden_grad_TD, rel_norm=3e-6)
    assert_close(weight_VD.grad.double(), weight_grad_VD, rel_norm=3e-6)


def test_sums_over_chunks_of_a_bf16_head_are_fp32() -> None:
    hidden_TD = torch.ones(600, 1, requires_grad=True)
    weight_VD = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    labels_T = torch.zeros(600, dtype=torch.int64)
    loss, _ = chunked_cross_entropy(hidden_TD, labels_T, lambda h: h.bfloat16() @ weight_VD.T, chunk_tokens=1)
    loss.backward()
    assert weight_VD.grad is not None
    # 600 steps of one half; a bf16 running sum would stand still at 128.
    assert weight_VD.grad.flatten().tolist() == [-300.0, 300.0]


def test_without_gradients_only_values_are_computed() -> None:
    hidden_TD, weight_VD, labels_T = _inputs()
    with torch.no_grad():
        loss, values_T1 = chunked_cross_entropy(hidden_TD, labels_T, lambda h: h @ weight_VD.T, chunk_tokens=4)
    assert not loss.requires_grad
    assert abs(float(loss) - _closed_form(hidden_TD, weight_VD, labels_T)[0]) < 1e-10
    assert float(values_T1.sum()) == pytest.approx(float(loss), rel=1e-14)


def test_a_frozen_head_and_frozen_hidden_states() -> None:
    hidden_TD, weight_VD, labels_T = _inputs()
    frozen_VD, frozen_TD = weight_VD.detach(), hidden_TD.detach()
    chunked_cross_entropy(hidden_TD, labels_T, lambda h: h @ frozen_VD.T, chunk_tokens=4)[0].backward()
    chunked_cross_entropy(frozen_TD, labels_T, lambda h: h @ weight_VD.T, chunk_tokens=4)[0].backward()
    _, hidden_grad_TD, weight_grad_VD = _closed_form(hidden_TD, weight_VD, labels_T)
    assert hidden_TD.grad is not None and weight_VD.grad is not None
    assert_close(hidden_TD.grad, hidden_grad_TD, rel_norm=1e-13)
    assert_close(weight_VD.grad, weight_grad_VD, rel_norm=1e-13)
    assert not chunked_cross_entropy(frozen_TD, labels_T, lambda h: h @ frozen_VD.T, chunk_tokens=4)[0].requires_grad


def test_no_position_gives_zero_and_zero_gradients() -> None:
    _, weight_VD, _ = _inputs()
    hidden_TD = torch.zeros(0, WIDTH, dtype=torch.float64, requires_grad=True)
    labels_T = torch.zeros(0, dtype=torch.int64)
    loss, values_T1 = chunked_cross_entropy(hidden_TD, labels_T, lambda h: h @ weight_VD.T, chunk_tokens=4)
    loss.backward()
    assert float(loss.detach()) == 0.0 and values_T1.shape == (0, 1)
    assert weight_VD.grad is not None and not weight_VD.grad.any()


def test_unusable_arguments_are_one_line() -> None:
    hidden_TD, weight_VD, labels_T = _inputs()
    with pytest.raises(ValueError, match="chunk_tokens is 0, it must be at least 1"):
        chunked_cross_entropy(hidden_TD, labels_T, lambda h: h @ weight_VD.T, chunk_tokens=0)
    with pytest.raises(ValueError, match=r"shape \(1, 13, 5\)"):
        chunked_cross_entropy(hidden_TD[None], labels_T, lambda h: h @ weight_VD.T, chunk_tokens=4)


class _LogitsMemory(TorchDispatchMode):
    """How many values tensors with a row per vocabulary entry hold, at most, in one tensor and all together."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self._width = width
        self._living: dict[int, int] = {}
        self.largest_rows = 0
        self.peak_rows = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.ndim == 2 and tensor.shape[1] == self._width:
                self._watch(tensor)
        return result

    def _watch(self, tensor: Tensor) -> None:
        storage, rows = tensor.untyped_storage(), tensor.shape[0]
        key = storage.data_ptr()
        if key not in self._living:
            weakref.finalize(storage, self._living.pop, key, None)
        self._living[key] = max(rows, self._living.get(key, 0))
        self.largest_rows = max(self.largest_rows, rows)
        self.peak_rows = max(self.peak_rows, sum(self._living.values()))


@pytest.mark.parametrize("kind", ["cross_entropy", "kl"])
def test_logits_of_one_chunk_at_a_time(kind: str) -> None:
    vocab_size, num_positions, chunk_tokens, width = 257, 96, 8, 4
    hidden_TD = torch.randn(num_positions, width, requires_grad=True)
    teacher_TD = torch.randn(num_positions, width)
    student, teacher = (torch.nn.Linear(width, vocab_size, bias=False) for _ in range(2))
    labels_T = torch.randint(vocab_size, (num_positions,))
    with _LogitsMemory(vocab_size) as memory:
        if kind == "kl":
            loss, _ = chunked_forward_kl(hidden_TD, student, teacher_TD, teacher, labels_T, chunk_tokens=chunk_tokens)
        else:
            loss, _ = chunked_cross_entropy(hidden_TD, labels_T, student, chunk_tokens=chunk_tokens)
        loss.backward()
    assert memory.largest_rows == chunk_tokens
    # Everything of this width that is alive at once (logits, their logarithms, masks, gradients) stays below a dozen
    # chunks and does not grow with the 96 positions: all logits of teacher and student alone would be 24 chunks.
    assert memory.peak_rows <= 12 * chunk_tokens
    with _LogitsMemory(vocab_size) as twice:
        hidden_2TD = torch.cat([hidden_TD, hidden_TD]).detach().requires_grad_()
        labels_2T = torch.cat([labels_T, labels_T])
        if kind == "kl":
            teacher_2TD = torch.cat([teacher_TD, teacher_TD])
            loss, _ = chunked_forward_kl(
                hidden_2TD, student, teacher_2TD, teacher, labels_2T, chunk_tokens=chunk_tokens
            )
        else:
            loss, _ = chunked_cross_entropy(hidden_2TD, labels_2T, student, chunk_tokens=chunk_tokens)
        loss.backward()
    assert twice.peak_rows == memory.peak_rows


def test_the_memory_watcher_sees_a_loss_that_is_not_chunked() -> None:
    hidden_TD, weight_VD, labels_T = _inputs()
    with _LogitsMemory(VOCAB) as memory:
        token_cross_entropy(hidden_TD @ weight_VD.T, labels_T).sum().backward()
    assert memory.largest_rows == NUM_POSITIONS
    assert memory.peak_rows >= 2 * NUM_POSITIONS


def test_chunks_do_not_change_bits_of_the_values() -> None:
    hidden_TD, weight_VD, labels_T = _inputs()
    values = [
        chunked_cross_entropy(hidden_TD, labels_T, lambda h: (h[:, None, :] * weight_VD).sum(-1), chunk_tokens=n)[1]
        for n in (2, 13)
    ]
    assert_equal_bits(values[0], values[1])
