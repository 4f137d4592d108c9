"""SwiGLU: closed forms against autograd in fp64, kernel against twin, and rows that count as absent."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from farskip.triton_kernels.swiglu import swiglu

BACKENDS = ["reference", "triton"]
RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "interleaved": {"interleaved": True},
    "gpt_oss": {"interleaved": True, "limit": 1.0, "alpha": 1.702, "up_offset": 1.0},
    "limit_in_halves": {"limit": 0.7},
}


def make(rows: int, size: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """h, weights of the rows, and a gradient for the output."""
    generator = torch.Generator().manual_seed(rows)
    h = torch.randn(rows, 2 * size, generator=generator, dtype=torch.float64)
    weights = torch.rand(rows, generator=generator, dtype=torch.float64)
    grad = torch.randn(rows, size, generator=generator, dtype=torch.float64)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return h.to(device, dtype), weights.to(device, wide), grad.to(device, dtype)


def definition(h: Tensor, weights: Tensor, rule: dict[str, Any]) -> Tensor:
    gate, up = (h[:, ::2], h[:, 1::2]) if rule.get("interleaved") else h.chunk(2, 1)
    if "limit" in rule:
        gate, up = gate.clamp(max=rule["limit"]), up.clamp(-rule["limit"], rule["limit"])
    gated = gate / (1 + (-rule.get("alpha", 1.0) * gate).exp()) * (up + rule.get("up_offset", 0.0))
    return gated * weights[:, None]


@pytest.mark.parametrize("name", list(RULES))
def test_twin_is_the_definition(name: str) -> None:
    h, weights, grad = make(9, 7, "cpu", torch.float64)
    results = []
    for own in (True, False):
        leaf, scalars = h.clone().requires_grad_(), weights.clone().requires_grad_()
        rule = RULES[name]
        out = swiglu(leaf, weights=scalars, **rule) if own else definition(leaf, scalars, rule)
        out.backward(grad)
        results.append([out, leaf.grad, scalars.grad])
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-14)  # fp64, a few operations
    assert "limit" not in RULES[name] or (results[0][1] == 0).any()  # something was cut


def run(h: Tensor, weights: Tensor | None, grad: Tensor, backend: str, **settings: Any) -> list[Tensor]:
    """Output and gradients."""
    leaf = h.clone().requires_grad_()
    scalars = None if weights is None else weights.clone().requires_grad_()
    out = swiglu(leaf, weights=scalars, backend=backend, **settings)
    out.backward(grad)
    assert leaf.grad is not None
    if scalars is None:
        return [out, leaf.grad]
    assert scalars.grad is not None
    return [out, leaf.grad, scalars.grad]


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 67, 1408])
@pytest.mark.parametrize("name", ["plain", "gpt_oss"])
def test_kernel_equals_twin(
    name: str,
    size: int,
    dtype: torch.dtype,
    weighted: bool,
    device: str,
    relative_error: Callable[[Tensor, Tensor], float],
) -> None:
    h, weights, grad = make(13, size, device, dtype)
    num_rows = torch.tensor(11, device=device)
    settings = {"num_rows": num_rows, **RULES[name]}
    expected, got = (run(h, weights if weighted else None, grad, backend, **settings) for backend in BACKENDS)
    # fp32: exp off by some units in the last place; 16 bits: single roundings that go the other way
    bound = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    for value, reference in zip(got, expected, strict=True):
        assert relative_error(value, reference) < bound
        assert not value[11:].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [0, 5, 13])
def test_absent_rows_may_hold_anything(count: int, backend: str, device: str) -> None:
    h, weights, grad = make(13, 24, device, torch.float32)
    num_rows = torch.tensor([count], dtype=torch.int32, device=device)
    expected = [value[:count] for value in run(h, weights, grad, backend)]
    h[count:], weights[count:], grad[count:] = torch.nan, torch.inf, torch.nan
    for value, want in zip(run(h, weights, grad, backend, num_rows=num_rows), expected, strict=True):
        assert torch.equal(value[:count], want)
        assert not value[count:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_and_no_rows(backend: str, device: str) -> None:
    h, weights, _ = make(13, 24, device, torch.float32)
    ones = torch.ones(13, 24, device=device)
    plain = run(h, weights, ones, backend)
    strided = torch.empty(48, 26, device=device).T[1::2]
    strided.copy_(h)
    for got, want in zip(run(strided, weights, ones[:1, :1].expand(13, 24), backend), plain, strict=True):
        assert torch.equal(got, want)
    shifted = torch.empty(h.numel() + 1, device=device)[1:].view_as(h)
    shifted.copy_(h)
    assert torch.equal(swiglu(shifted, weights=weights, backend=backend), plain[0])
    assert [tuple(v.shape) for v in run(h[:0], weights[:0], ones[:0], backend)] == [(0, 24), (0, 48), (0,)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str, device: str, check_op: Callable[..., None]) -> None:
    h, weights, grad = make(5, 6, device, torch.float32)
    count = torch.tensor([4], device=device)
    leaves = (h.clone().requires_grad_(), weights.clone().requires_grad_())
    ops = torch.ops.farskip
    check_op(ops.swiglu.default, *leaves, count, True, 1.0, 1.7, 1.0, backend)
    check_op(ops.swiglu.default, leaves[0], None, None, False, None, 1.0, 0.0, backend)
    check_op(ops.swiglu_backward.default, grad, h, weights, count, True, 1.0, 1.7, 1.0, backend)
    check_op(ops.swiglu_backward.default, grad, h, None, None, False, None, 1.0, 0.0, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_as_one_graph(backend: str, device: str) -> None:
    h, weights, grad = make(5, 6, device, torch.float32)

    def step(h: Tensor, weights: Tensor) -> Tensor:
        return swiglu(h, weights=weights, backend=backend).sin()

    grads = []
    for run_step in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in (h, weights)]
        run_step(*leaves).backward(grad)
        grads.append([leaf.grad for leaf in leaves])
    for eager, compiled in zip(*grads, strict=True):
        assert eager is not None and compiled is not None
        assert torch.equal(eager, compiled)


def test_bad_input() -> None:
    h = torch.zeros(4, 6)
    for arguments, message in (
        ({"h": h[:, 1:]}, r"h must be .* got torch\.float32 \[4, 5\]"),
        ({"h": h[0]}, "h must be"),
        ({"weights": torch.zeros(3)}, r"weights must be \[4\].* got \[3\]"),
        ({"limit": 0.0}, r"limit 0\.0 must be above 0"),
        ({"num_rows": torch.zeros(2, dtype=torch.int32)}, "num_rows must be one integer"),
        ({"num_rows": torch.zeros(())}, "num_rows must be one integer"),
    ):
        with pytest.raises(ValueError, match=message):
            swiglu(**({"h": h} | arguments))  # type: ignore[arg-type]
