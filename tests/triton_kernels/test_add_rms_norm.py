"""RMSNorm alone and behind an add: against autograd in fp64, against transformers' norms, kernel against twin."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from farskip.triton_kernels.add_rms_norm import add_rms_norm, rms_norm

BACKENDS = ["reference", "triton"]
SHAPES = [(1, 64), (7, 2050), (19, 50)]
BF16_STEP = 2**-7
"""Largest distance of two neighbouring bf16 numbers, relative."""


def make(shape: tuple[int, int], device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, a and a weight that is not all ones."""
    generator = torch.Generator().manual_seed(shape[1])
    x, a = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    weight = 1 + 0.3 * torch.randn(shape[1], generator=generator, dtype=torch.float64)
    return x.to(device, dtype), a.to(device, dtype), weight.to(device, dtype)


def definition(z: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> Tensor:
    return z / (z.pow(2).mean(-1, keepdim=True) + eps).sqrt() * (weight + 1 if unit_offset else weight)


@pytest.mark.parametrize("unit_offset", [False, True])
def test_twin_is_the_definition(unit_offset: bool) -> None:
    x, a, weight = make((9, 14), "cpu", torch.float64)
    results = []
    for own in (True, False):
        leaves = [t.clone().requires_grad_() for t in (x, a, weight)]
        if own:
            y, normed = add_rms_norm(*leaves, 1e-6, unit_offset=unit_offset)
            alone = rms_norm(leaves[0], leaves[2], 1e-3, unit_offset=unit_offset)
        else:
            y = leaves[0] + leaves[1]
            normed = definition(y, leaves[2], 1e-6, unit_offset)
            alone = definition(leaves[0], leaves[2], 1e-3, unit_offset)
        (y.sin().sum() + (normed.cos() * y.detach()).sum() + alone.exp().sum()).backward()
        results.append([y, normed, alone, *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(results[0], results[1], rtol=1e-11, atol=1e-12)  # fp64, two chains of operations


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_twin_has_the_bits_of_transformers(dtype: torch.dtype) -> None:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, _, weight = make((9, 48), "cpu", dtype)
    for module, unit_offset in ((LlamaRMSNorm(48, eps=1e-6), False), (GemmaRMSNorm(48, eps=1e-6), True)):
        module.to(dtype).weight.data.copy_(weight)
        assert torch.equal(rms_norm(x, weight, 1e-6, unit_offset=unit_offset), module(x))


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_equals_twin(
    shape: tuple[int, int],
    dtype: torch.dtype,
    unit_offset: bool,
    device: str,
    relative_error: Callable[[Tensor, Tensor], float],
) -> None:
    tensors = make(shape, device, dtype)
    results = []
    for backend in BACKENDS:
        leaves = [t.clone().requires_grad_() for t in tensors]
        y, normed = add_rms_norm(*leaves, 1e-6, unit_offset=unit_offset, backend=backend)
        alone = rms_norm(leaves[0], leaves[2], 1e-6, unit_offset=unit_offset, backend=backend)
        torch.autograd.backward([y, normed, alone], list(make((3 * shape[0], shape[1]), device, dtype)[0].chunk(3)))
        results.append((y, normed, alone, *(leaf.grad for leaf in leaves)))
    assert torch.equal(results[0][0], results[1][0])  # one addition, one rounding
    # fp32: another order of the row's sum. 16 bits: a few elements that lay on a rounding boundary go the other way;
    # Two roundings in the forward, so an element is off by two steps at most.
    bound = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    for expected, got in zip(results[0][1:], results[1][1:], strict=True):
        assert expected is not None and got is not None
        assert relative_error(got, expected) < bound
    if dtype != torch.float32:
        # A rounding point too many or too few would move a quarter of the elements by a step.
        assert (results[1][1] != results[0][1]).double().mean() < 0.01
    if dtype == torch.bfloat16:
        torch.testing.assert_close(results[1][1], results[0][1], rtol=2 * BF16_STEP, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_that_are_missing_or_expanded(backend: str, device: str) -> None:
    x, a, weight = make((5, 24), device, torch.float32)

    def grads(loss: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor | None]:
        leaves = [t.clone().requires_grad_() for t in (x, a, weight)]
        loss(*add_rms_norm(*leaves, 1e-6, backend=backend)).backward()
        return [leaf.grad for leaf in leaves]

    only_y = grads(lambda y, normed: y.sum())
    assert only_y[2] is None
    assert all(grad is not None and torch.equal(grad, torch.ones_like(x)) for grad in only_y[:2])
    expanded = grads(lambda y, normed: normed.sum() + 0 * y.sum())
    plain = grads(lambda y, normed: (normed * torch.ones_like(normed)).sum())
    for left, right in zip(expanded, plain, strict=True):
        assert left is not None and right is not None
        assert torch.equal(left, right)


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_and_layouts(backend: str, device: str) -> None:
    x, a, weight = make((6, 24), device, torch.float32)
    y, normed = add_rms_norm(x, a, weight, 1e-6, backend=backend)
    odd = torch.empty(24, 12, device=device).T[1::2]
    odd.copy_(x)
    assert torch.equal(add_rms_norm(odd, a, weight, 1e-6, backend=backend)[1], normed)
    folded = add_rms_norm(x.view(2, 3, 24), a.view(2, 3, 24), weight, 1e-6, backend=backend)
    assert torch.equal(folded[0], y.view(2, 3, 24)) and torch.equal(folded[1], normed.view(2, 3, 24))
    assert torch.equal(add_rms_norm(x[2:3], a[2:3], weight, 1e-6, backend=backend)[1], normed[2:3])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend: str, device: str) -> None:
    x = torch.empty(0, 24, device=device, requires_grad=True)
    weight = torch.ones(24, device=device, requires_grad=True)
    _, normed = add_rms_norm(x, x, weight, 1e-6, backend=backend)
    normed.sum().backward()
    assert x.grad is not None and x.grad.shape == (0, 24)
    assert weight.grad is not None and not weight.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_rows_than_backward_programs(
    backend: str, device: str, relative_error: Callable[[Tensor, Tensor], float]
) -> None:
    """300 rows over 264 programs: runs of two, the last programs with none."""
    x, _, weight = make((300, 16), device, torch.float32)
    leaf, gain = x.clone().requires_grad_(), weight.clone().requires_grad_()
    rms_norm(leaf, gain, 1e-6, backend=backend).sin().sum().backward()
    wide, wide_gain = x.double().requires_grad_(), weight.double().requires_grad_()
    definition(wide, wide_gain, 1e-6, False).sin().sum().backward()
    for got, expected in ((leaf.grad, wide.grad), (gain.grad, wide_gain.grad)):
        assert got is not None and expected is not None
        assert relative_error(got, expected) < 1e-6 * 300**0.5  # fp32 rounding; sums over 300 rows


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str, device: str, check_op: Callable[..., None]) -> None:
    x, a, weight = (t.requires_grad_() for t in make((5, 24), device, torch.float32))
    check_op(torch.ops.farskip.add_rms_norm.default, x, a, weight, 1e-6, False, backend)
    check_op(torch.ops.farskip.add_rms_norm.default, x, None, weight, 1e-6, True, backend)
    saved = (x.detach(), torch.ones(5, device=device), weight.detach())
    for stream, keep in ((None, True), (a.detach(), False), (a.detach(), True)):
        check_op(torch.ops.farskip.norm_backward.default, a.detach(), stream, *saved, False, keep, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_as_one_graph(backend: str, device: str) -> None:
    tensors = make((5, 24), device, torch.float32)

    def step(x: Tensor, a: Tensor, weight: Tensor) -> Tensor:
        y, normed = add_rms_norm(x, a, weight, 1e-6, backend=backend)
        return (y.sin() * rms_norm(normed, weight, 1e-6, backend=backend)).sum()

    grads = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in tensors]
        run(*leaves).backward()
        grads.append([leaf.grad for leaf in leaves])
    for eager, compiled in zip(*grads, strict=True):
        assert eager is not None and compiled is not None
        assert torch.equal(eager, compiled)


def test_bad_input() -> None:
    x, weight = torch.zeros(3, 8), torch.zeros(8)
    with pytest.raises(ValueError, match=r"a is torch\.float32 \[3, 7\], but x is torch\.float32 \[3, 8\]"):
        add_rms_norm(x, x[:, 1:], weight, 1e-6)
    with pytest.raises(ValueError, match=r"a is torch.bfloat16 \[3, 8\], but x is torch.float32"):
        add_rms_norm(x, x.bfloat16(), weight, 1e-6)
    with pytest.raises(ValueError, match=r"weight must be \[8\], the hidden size of x, got \[7\]"):
        rms_norm(x, weight[1:], 1e-6)
    with pytest.raises(ValueError, match="x must be a floating-point"):
        rms_norm(x.int(), weight, 1e-6)
