"""Permute and unpermute: gradients against autograd in fp64, kernels against twins, and input that hurts."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from farskip.triton_kernels.dispatch_map import DispatchMap, dispatch_map
from farskip.triton_kernels.permute import permute, permute_weights
from farskip.triton_kernels.unpermute import unpermute

BACKENDS = ["reference", "triton"]
# tokens, K, experts, hidden: one token; sizes that fit no block; a row longer than one block of columns
SHAPES = [(1, 1, 2, 1), (63, 6, 67, 50), (20, 8, 16, 2050), (3, 2, 4, 9000)]


def make_map(num_tokens: int, top_k: int, num_experts: int, device: str, alignment: int = 4) -> DispatchMap:
    """A map with padding, dropped slots and slots without an expert."""
    generator = torch.Generator().manual_seed(num_tokens)
    experts = torch.rand(num_tokens, num_experts, generator=generator).topk(top_k).indices
    experts.view(-1)[::5][1:] = -1
    return dispatch_map(experts.to(device), num_experts, alignment=alignment, capacity=max(2, num_tokens // 3))


def make(shape: tuple[int, int, int, int], device: str, dtype: torch.dtype) -> tuple[DispatchMap, Tensor, Tensor]:
    """Map, tokens and weights; the weights stay wide."""
    num_tokens, top_k, num_experts, hidden = shape
    generator = torch.Generator().manual_seed(hidden)
    tokens = torch.randn(num_tokens, hidden, generator=generator, dtype=torch.float64)
    weights = torch.rand(num_tokens, top_k, generator=generator, dtype=torch.float64)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return make_map(num_tokens, top_k, num_experts, device), tokens.to(device, dtype), weights.to(device, wide)


def by_hand(tokens: Tensor, dispatch: DispatchMap) -> tuple[Tensor, Tensor]:
    """Selection matrices: rows from tokens [R, T], and rows from slots [R, S]."""
    num_tokens, top_k = dispatch.dst.shape
    from_slots = torch.zeros(len(dispatch.src), num_tokens * top_k, dtype=torch.float64)
    for slot, row in enumerate(dispatch.dst.flatten().tolist()):
        if row >= 0:
            from_slots[row, slot] = 1
    return from_slots.view(-1, num_tokens, top_k).sum(2), from_slots


@pytest.mark.parametrize("weighted", [False, True])
def test_twins_are_matrix_products(weighted: bool) -> None:
    """Both ops are linear: against dense matrices, values and gradients, in fp64."""
    dispatch, x, weights = make((21, 3, 5, 7), "cpu", torch.float64)
    from_tokens, from_slots = by_hand(x, dispatch)
    rows = torch.randn(len(dispatch.src), 7, dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (x, rows, weights)]
    twins = [t.clone().requires_grad_() for t in (x, rows, weights)]

    def by_matrices(x: Tensor, rows: Tensor, weights: Tensor) -> list[Tensor]:
        factors = weights if weighted else torch.ones_like(weights)
        gathered = (from_slots.T @ rows).view(21, 3, 7)
        return [from_tokens @ x, (gathered * factors[..., None]).sum(1), from_slots @ weights.flatten()]

    def by_ops(x: Tensor, rows: Tensor, weights: Tensor) -> list[Tensor]:
        combined = unpermute(rows, dispatch, weights if weighted else None)
        return [permute(x, dispatch), combined, permute_weights(weights, dispatch)]

    expected, got = by_matrices(*leaves), by_ops(*twins)
    torch.testing.assert_close(got, expected)
    factors = [torch.randn_like(value) for value in expected]
    torch.autograd.backward(expected, factors)
    torch.autograd.backward(got, factors)
    torch.testing.assert_close([t.grad for t in twins], [t.grad for t in leaves])


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_permute_kernel_equals_twin(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> None:
    """A copy forward; backward a sum of the same terms in the same order, without products: equal in bits."""
    dispatch, x, weights = make(shape, device, dtype)
    results = []
    for backend in BACKENDS:
        leaf, scalars = x.clone().requires_grad_(), weights.clone().requires_grad_()
        rows, row_weights = (
            permute(leaf, dispatch, backend=backend),
            permute_weights(scalars, dispatch, backend=backend),
        )
        generator = torch.Generator().manual_seed(0)
        rows.backward(torch.randn(rows.shape, generator=generator).to(device, dtype))
        row_weights.backward(torch.randn(row_weights.shape, generator=generator).to(device))
        results.append((rows, row_weights, leaf.grad, scalars.grad))
    for expected, got in zip(*results, strict=True):
        assert expected is not None and got is not None
        assert torch.equal(got, expected)
    padding = dispatch.src < 0
    assert padding.any() or shape[0] == 1
    assert not results[1][0][padding].any() and not results[1][1][padding].any()


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpermute_kernel_equals_twin(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: str,
    relative_error: Callable[[Tensor, Tensor], float],
) -> None:
    dispatch, x, weights = make(shape, device, dtype)
    rows = permute(x, dispatch)
    rows = (rows * (1 + 0.1 * torch.arange(len(rows), device=device)[:, None])).to(dtype)
    results = []
    for backend in BACKENDS:
        leaf, scalars = rows.clone().requires_grad_(), weights.clone().requires_grad_()
        out = unpermute(leaf, dispatch, scalars, backend=backend)
        out.backward(x)
        plain = unpermute(rows, dispatch, backend=backend)
        results.append((out, leaf.grad, scalars.grad, plain))
    # One rounding to the storage dtype; before it fp32 sums of at most 8 terms, or of H products for the weights.
    bound = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    for expected, got in zip(results[0][:2], results[1][:2], strict=True):
        assert expected is not None and got is not None
        assert relative_error(got, expected) < bound
    assert results[0][2] is not None and results[1][2] is not None
    assert relative_error(results[1][2], results[0][2]) < 1e-5
    assert torch.equal(results[0][3], results[1][3])  # no products: equal in bits
    assert results[1][1] is not None and not results[1][1][dispatch.src < 0].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_inverse(backend: str, device: str) -> None:
    """Weights that sum to one bring back what was copied."""
    experts = torch.rand(40, 16).topk(4).indices.to(device)
    dispatch = dispatch_map(experts, 16, alignment=8)
    x = torch.randn(40, 24, device=device)
    weights = torch.full((40, 4), 0.25, device=device)
    assert torch.equal(unpermute(permute(x, dispatch, backend=backend), dispatch, weights, backend=backend), x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_does_not_depend_on_its_neighbours(backend: str, device: str) -> None:
    """Batch invariance: the sum of a token has the same bits in a batch of one and in a batch of many."""
    dispatch, _, weights = make((63, 6, 67, 50), device, torch.float32)
    rows = torch.randn(len(dispatch.src), 50, device=device)
    together = unpermute(rows, dispatch, weights, backend=backend)
    for token in (0, 31, 62):
        alone = DispatchMap(
            counts=dispatch.counts,
            offsets=dispatch.offsets,
            padded_offsets=dispatch.padded_offsets,
            dst=dispatch.dst[token : token + 1].contiguous(),
            src=dispatch.src,
        )
        assert torch.equal(unpermute(rows, alone, weights[token : token + 1], backend=backend)[0], together[token])


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_a_slot_are_never_read(backend: str, device: str) -> None:
    dispatch, _, weights = make((21, 3, 5, 7), device, torch.float32)
    rows = torch.randn(len(dispatch.src), 7, device=device)
    rows[dispatch.src < 0] = torch.nan
    rows.requires_grad_()
    out = unpermute(rows, dispatch, weights, backend=backend)
    out.sum().backward()
    assert rows.grad is not None
    assert not out.isnan().any() and not rows.grad.isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_odd_layouts(backend: str, device: str) -> None:
    """Transposed, offset by one element, and gradients with strides of zero."""
    dispatch, x, weights = make((21, 3, 5, 7), device, torch.float32)
    odd = torch.empty(7, 22, device=device).T[1:]
    odd.copy_(x)
    assert torch.equal(permute(odd, dispatch, backend=backend), permute(x, dispatch, backend=backend))
    rows = torch.randn(len(dispatch.src), 7, device=device)
    shifted = torch.empty(rows.numel() + 1, device=device)[1:].view_as(rows)
    shifted.copy_(rows)
    columns = weights.T.contiguous().T
    expected = unpermute(rows, dispatch, weights, backend=backend)
    assert torch.equal(unpermute(shifted, dispatch, columns, backend=backend), expected)
    leaf, twin = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    unpermute(leaf, dispatch, weights, backend=backend).sum().backward()
    unpermute(twin, dispatch, weights, backend=backend).backward(torch.ones_like(expected))
    assert leaf.grad is not None and twin.grad is not None
    assert torch.equal(leaf.grad, twin.grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend: str, device: str) -> None:
    dispatch = dispatch_map(torch.empty(0, 2, dtype=torch.int64, device=device), 3)
    x = torch.empty(0, 5, device=device, requires_grad=True)
    weights = torch.empty(0, 2, device=device, requires_grad=True)
    rows = permute(x, dispatch, backend=backend)
    out = unpermute(rows, dispatch, weights, backend=backend)
    assert rows.shape == out.shape == (0, 5)
    out.sum().backward()
    assert x.grad is not None and x.grad.shape == (0, 5)
    assert weights.grad is not None and weights.grad.shape == (0, 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_slots_dropped(backend: str, device: str) -> None:
    dispatch = dispatch_map(torch.full((4, 2), -1, device=device), 3)
    x = torch.randn(4, 5, device=device, requires_grad=True)
    out = unpermute(permute(x, dispatch, backend=backend), dispatch, torch.ones(4, 2, device=device), backend=backend)
    out.sum().backward()
    assert not out.any()
    assert x.grad is not None and not x.grad.any()


def kept(out: Tensor) -> list[tuple[int, ...]]:
    """Shapes that the node behind `out` keeps for the backward."""
    return [tuple(t.shape) for t in out.grad_fn.saved_tensors if t is not None]  # type: ignore[union-attr]


def test_rows_are_kept_only_for_the_weights_gradient() -> None:
    dispatch, _, weights = make((21, 3, 5, 7), "cpu", torch.float32)
    rows = torch.randn(len(dispatch.src), 7, requires_grad=True)
    assert tuple(rows.shape) not in kept(unpermute(rows, dispatch, weights))
    assert tuple(rows.shape) not in kept(unpermute(rows, dispatch))
    assert tuple(rows.shape) in kept(unpermute(rows, dispatch, weights.requires_grad_()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str, device: str, check_op: Callable[..., None]) -> None:
    dispatch, x, weights = make((9, 3, 5, 7), device, torch.float32)
    rows = torch.randn(len(dispatch.src), 7, device=device)
    maps = (dispatch.dst, dispatch.src)
    ops = torch.ops.farskip
    check_op(ops.permute.default, x.clone().requires_grad_(), *maps, None, backend)
    check_op(ops.permute.default, x, *maps, weights, backend)
    check_op(ops.unpermute.default, rows.clone().requires_grad_(), *maps, weights.clone().requires_grad_(), backend)
    check_op(ops.unpermute_backward.default, x, rows, *maps, weights, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_as_one_graph(backend: str, device: str) -> None:
    dispatch, x, weights = make((9, 3, 5, 7), device, torch.float32)

    def step(x: Tensor, weights: Tensor, dispatch: DispatchMap) -> Tensor:
        rows = permute(x, dispatch, backend=backend) * permute_weights(weights, dispatch, backend=backend)[:, None]
        return unpermute(rows, dispatch, weights, backend=backend).sin().sum()

    grads = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in (x, weights)]
        run(*leaves, dispatch).backward()
        grads.append([leaf.grad for leaf in leaves])
    for eager, compiled in zip(*grads, strict=True):
        assert eager is not None and compiled is not None
        assert torch.equal(eager, compiled)


def test_bad_shapes() -> None:
    dispatch, x, weights = make((9, 3, 5, 7), "cpu", torch.float32)
    num_rows = len(dispatch.src)
    with pytest.raises(ValueError, match=r"x must be \[9, hidden\].* got \[8, 7\]"):
        permute(x[1:], dispatch)
    with pytest.raises(ValueError, match=rf"rows must be \[{num_rows}, hidden\].* got \[9, 7\]"):
        unpermute(x, dispatch)
    with pytest.raises(ValueError, match=r"weights must be \[9, 3\].* got \[9, 2\]"):
        unpermute(torch.zeros(num_rows, 7), dispatch, weights[:, :2])
    with pytest.raises(ValueError, match=r"weights must be \[9, 3\].* got \[3, 9\]"):
        permute_weights(weights.T, dispatch)
