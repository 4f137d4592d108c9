"""Routing: the twin against definitions in fp64, the kernel against the twin, and both against ill-meant input."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from farskip.triton_kernels.route import Routing, route
from farskip.triton_kernels.route_reference import RouteRule, route_reference

EPS32 = torch.finfo(torch.float32).eps

# Real models' rules (DeepSeek-V3, Kimi-K2, DeepSeek-V2, Mixtral, OLMoE, Llama-4) and shapes that fit nothing.
RULES: dict[str, tuple[int, dict[str, Any]]] = {
    "E256_K8_sigmoid_bias_8groups": (
        256,
        {"top_k": 8, "score": "sigmoid", "bias": True, "num_groups": 8, "top_groups": 4, "scale": 2.5},
    ),
    "E384_K8_sigmoid_bias": (384, {"top_k": 8, "score": "sigmoid", "bias": True, "scale": 2.827, "aux_coeff": 0.1}),
    "E60_K6_softmax_raw_5groups_max": (
        60,
        {"top_k": 6, "renormalize": False, "num_groups": 5, "top_groups": 3, "group_score": "max", "scale": 16.0},
    ),
    "E8_K2_softmax": (8, {"top_k": 2}),
    "E64_K8_softmax_raw_losses": (64, {"top_k": 8, "renormalize": False, "aux_coeff": 0.01, "z_coeff": 0.001}),
    "E16_K1_sigmoid_raw": (16, {"top_k": 1, "score": "sigmoid", "renormalize": False}),
    "E67_K6_softmax_bias_losses": (67, {"top_k": 6, "bias": True, "aux_coeff": 0.5, "z_coeff": 0.1}),
    "E67_K67_sigmoid_losses": (67, {"top_k": 67, "score": "sigmoid", "aux_coeff": 0.5, "z_coeff": 0.1}),
}


def make(num_tokens: int, name: str, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, dict[str, Any]]:
    """Logits and settings of one of the rules."""
    num_experts, settings = RULES[name]
    settings = dict(settings)
    generator = torch.Generator().manual_seed(num_tokens + num_experts)
    logits = torch.randn(num_tokens, num_experts, generator=generator, dtype=torch.float64)
    if settings.get("bias"):
        settings["bias"] = (0.3 * torch.randn(num_experts, generator=generator)).to(device)
    return logits.to(device, dtype), settings


def loss_of(routing: Routing) -> Tensor:
    """A scalar in which every differentiable result has its own weight."""
    factors = torch.arange(1, routing.weights.shape[1] + 1, device=routing.weights.device).sqrt()
    tokens = torch.arange(routing.weights.shape[0], device=routing.weights.device).cos()
    return (routing.weights * factors * tokens[:, None]).sum() + 3 * routing.aux_loss - 2 * routing.z_loss


def run(logits: Tensor, settings: dict[str, Any], backend: str) -> tuple[Routing, Tensor]:
    """Routing and the gradient of the logits."""
    logits = logits.clone().requires_grad_()
    routing = route(logits, backend=backend, **settings)
    loss_of(routing).backward()
    assert logits.grad is not None
    return routing, logits.grad


def by_hand(logits: Tensor, settings: dict[str, Any]) -> tuple[list[list[int]], list[list[float]]]:
    """The definition, one token after the other, on Python numbers."""
    all_experts, all_weights = [], []
    bias = settings.get("bias")
    for row in logits.double():
        probs = (row.softmax(0) if settings.get("score", "softmax") == "softmax" else row.sigmoid()).tolist()
        keys = [p + (float(bias[e]) if bias is not None else 0.0) for e, p in enumerate(probs)]
        groups, size = settings.get("num_groups", 1), len(keys) // settings.get("num_groups", 1)
        terms = 1 if settings.get("group_score") == "max" else 2
        strength = [sum(sorted(keys[g * size : (g + 1) * size])[-terms:]) for g in range(groups)]
        kept = sorted(range(groups), key=lambda g: (-strength[g], g))[: settings.get("top_groups", 1)]
        candidates = [e for e in range(len(keys)) if e // size in kept]
        chosen = sorted(candidates, key=lambda e: (-keys[e], e))[: settings["top_k"]]
        total = sum(probs[e] for e in chosen) if settings.get("renormalize", True) else 1.0
        all_experts.append(chosen)
        all_weights.append([settings.get("scale", 1.0) * probs[e] / total for e in chosen])
    return all_experts, all_weights


@pytest.mark.parametrize("name", list(RULES))
def test_twin_is_the_definition(name: str) -> None:
    logits, settings = make(13, name, "cpu", torch.float64)
    routing = route(logits, **settings)
    experts, weights = by_hand(logits, settings)
    assert routing.experts.tolist() == experts
    # fp64 against fp64, a few dozen operations
    torch.testing.assert_close(routing.weights, torch.tensor(weights, dtype=torch.float64), rtol=1e-13, atol=1e-15)
    flat = [e for row in experts for e in row]
    assert routing.counts.tolist() == [flat.count(e) for e in range(logits.shape[1])]
    probs = logits.softmax(1) if settings.get("score", "softmax") == "softmax" else logits.sigmoid()
    mass = (probs / probs.sum(1, keepdim=True)).sum(0)
    factor = settings.get("aux_coeff", 0.0) * logits.shape[1] / (settings["top_k"] * 13**2)
    aux = factor * (routing.counts * mass).sum()
    z = settings.get("z_coeff", 0.0) * (logits.exp().sum(1).log() ** 2).mean()
    torch.testing.assert_close(torch.stack([routing.aux_loss, routing.z_loss]), torch.stack([aux, z]).double())


@pytest.mark.parametrize("name", list(RULES))
def test_closed_form_gradient_is_autograds(name: str) -> None:
    logits, settings = make(13, name, "cpu", torch.float64)
    closed = run(logits, settings, "reference")[1]
    logits.requires_grad_()
    bias = settings.pop("bias", None)
    results = route_reference(logits, bias, RouteRule(**settings))
    fields = ("weights", "experts", "counts", "aux_loss", "z_loss")
    loss_of(Routing(**dict(zip(fields, results, strict=True)))).backward()
    torch.testing.assert_close(closed, logits.grad, rtol=1e-12, atol=1e-14)  # fp64, sums of up to 384 terms


@pytest.mark.parametrize("num_tokens", [1, 199])
@pytest.mark.parametrize("name", list(RULES))
def test_kernel_equals_twin(name: str, num_tokens: int, device: str) -> None:
    logits, settings = make(num_tokens, name, device)
    num_experts = logits.shape[1]
    expected, expected_grad = run(logits, settings, "reference")
    routing, grad = run(logits, settings, "triton")
    assert torch.equal(routing.experts, expected.experts)
    assert torch.equal(routing.counts, expected.counts)
    assert (routing.experts.dtype, routing.counts.dtype) == (torch.int64, torch.int32)
    # fp32: sums over all experts, each term off by a few units in the last place; 8 for exp and the division
    scale = settings.get("scale", 1.0)
    torch.testing.assert_close(routing.weights, expected.weights, rtol=8 * EPS32, atol=2 * num_experts * EPS32 * scale)
    torch.testing.assert_close(routing.aux_loss, expected.aux_loss, rtol=2 * num_experts * EPS32, atol=0)
    torch.testing.assert_close(routing.z_loss, expected.z_loss, rtol=2 * num_experts * EPS32, atol=0)
    bound = 2 * num_experts * EPS32 * float(expected_grad.abs().max())
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=bound)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_ties_go_to_the_lowest_index(backend: str, device: str) -> None:
    logits = torch.zeros(3, 67, device=device)
    for bias in (None, torch.zeros(67, device=device)):
        for score in ("softmax", "sigmoid"):
            routing = route(logits, 6, score=score, bias=bias, backend=backend)
            assert routing.experts.tolist() == [[0, 1, 2, 3, 4, 5]] * 3
    grouped = route(logits[:, :64], 6, num_groups=16, top_groups=3, backend=backend)
    assert grouped.experts.tolist() == [[0, 1, 2, 3, 4, 5]] * 3


@pytest.mark.parametrize("groups", [{}, {"num_groups": 8, "top_groups": 4}, {"num_groups": 8, "top_groups": 3}])
def test_quantized_logits_select_alike(groups: dict[str, int], device: str) -> None:
    """Few different values, hence ties in nearly every row, among experts and among groups."""
    logits = torch.randn(199, 256, generator=torch.Generator().manual_seed(5)).mul(2).round().div(2).to(device)
    assert (logits.sort(1).values.diff(dim=1) == 0).any(1).all()
    expected = route(logits, 8, backend="reference", **groups)
    routing = route(logits, 8, backend="triton", **groups)
    assert torch.equal(routing.experts, expected.experts)
    if not groups:
        rows = logits.tolist()
        assert routing.experts.tolist() == [sorted(range(256), key=lambda e: (-row[e], e))[:8] for row in rows]


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_bias_selects_and_does_nothing_else(backend: str, device: str) -> None:
    """All biased scores negative, in groups: masking with zero instead of excluding would choose outside the groups."""
    logits = torch.randn(17, 64, generator=torch.Generator().manual_seed(1)).to(device)
    bias = torch.full((64,), -5.0, device=device)
    bias[[3, 9, 14]] = -2.0
    routing = route(
        logits, 3, score="sigmoid", bias=bias, num_groups=8, top_groups=2, renormalize=False, backend=backend
    )
    assert all({3} <= set(row) or {9, 14} <= set(row) for row in routing.experts.tolist())
    assert all(len({e // 8 for e in row}) <= 2 for row in routing.experts.tolist())
    torch.testing.assert_close(routing.weights, logits.sigmoid().gather(1, routing.experts), rtol=4 * EPS32, atol=0)
    huge = route(logits, 3, score="sigmoid", bias=bias * 1e9, backend=backend)
    assert all(set(row) == {3, 9, 14} for row in huge.experts.tolist())


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_bias_gets_no_gradient(backend: str, device: str) -> None:
    logits = torch.randn(4, 8, device=device, requires_grad=True)
    bias = torch.zeros(8, device=device, requires_grad=True)
    loss_of(route(logits, 2, bias=bias, backend=backend)).backward()
    assert bias.grad is None
    assert logits.grad is not None


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("groups", [{}, {"num_groups": 4, "top_groups": 2}])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_nan_and_infinity_never_leave_the_range(
    score: str, bias: bool, groups: dict[str, int], backend: str, device: str
) -> None:
    logits = torch.randn(6, 12, generator=torch.Generator().manual_seed(2)).to(device)
    logits[0, 3], logits[1], logits[2, :10], logits[3, 5], logits[4, 7] = (
        torch.nan,
        torch.nan,
        torch.nan,
        torch.inf,
        -torch.inf,
    )
    settings = {"bias": torch.zeros(12, device=device) if bias else None, "aux_coeff": 1.0, "z_coeff": 1.0, **groups}
    logits.requires_grad_()
    routing = route(logits, 5, score=score, backend=backend, **settings)
    assert all(len(set(row)) == 5 and min(row) >= 0 and max(row) < 12 for row in routing.experts.tolist())
    assert int(routing.counts.sum()) == 30
    assert routing.weights.isnan().all(1).tolist() == [True, True, True, True, False, False]
    assert not routing.weights[4:].isnan().any()
    if not bias and not groups:
        assert 3 not in routing.experts[0]
        assert {10, 11} <= set(routing.experts[2].tolist())
    loss_of(routing).backward()


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_nan_raises_in_debug_mode(backend: str, device: str) -> None:
    logits = torch.randn(5, 8, device=device)
    logits[3, 2] = torch.nan
    with (
        pytest.warns(UserWarning, match="Anomaly Detection"),
        torch.autograd.detect_anomaly(),
        pytest.raises(ValueError, match="NaN in 1 of 5 tokens, first in token 3"),
    ):
        route(logits, 2, backend=backend)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_no_tokens(backend: str, device: str) -> None:
    logits = torch.randn(0, 8, device=device, requires_grad=True)
    routing = route(logits, 2, aux_coeff=1.0, z_coeff=1.0, backend=backend)
    assert routing.weights.shape == routing.experts.shape == (0, 2)
    assert routing.counts.tolist() == [0] * 8
    assert routing.aux_loss.item() == routing.z_loss.item() == 0.0
    loss_of(routing).backward()
    assert logits.grad is not None and logits.grad.shape == (0, 8)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_odd_layouts_of_inputs_and_gradients(backend: str, device: str) -> None:
    logits, settings = make(9, "E67_K6_softmax_bias_losses", device)
    plain = logits.clone().requires_grad_()
    route(plain, backend=backend, **settings).weights.sum().backward()  # a gradient with strides of zero
    strided = torch.empty(67, 18, device=device).T[1::2]
    strided.copy_(logits)
    strided.requires_grad_()
    weights = route(strided, backend=backend, **settings).weights
    weights.backward(torch.ones(6, 9, device=device).T)
    assert plain.grad is not None and strided.grad is not None
    assert torch.equal(plain.grad, strided.grad)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_bf16_logits_and_repeatability(backend: str, device: str) -> None:
    logits, settings = make(33, "E64_K8_softmax_raw_losses", device, torch.bfloat16)
    (first, grad), (second, grad_again) = run(logits, settings, backend), run(logits, settings, backend)
    wide, wide_grad = run(logits.float(), settings, backend)
    assert first.weights.dtype == torch.float32 and grad.dtype == torch.bfloat16
    assert torch.equal(first.weights, second.weights) and torch.equal(grad, grad_again)
    assert torch.equal(first.weights, wide.weights) and torch.equal(first.experts, wide.experts)
    assert torch.equal(grad, wide_grad.bfloat16())


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("name", ["E67_K6_softmax_bias_losses", "E60_K6_softmax_raw_5groups_max"])
def test_every_element_is_written(name: str, device: str) -> None:
    logits, settings = make(5, name, device)
    routing, grad = run(logits, settings, "triton")
    assert not routing.weights.isnan().any() and not grad.isnan().any()
    assert int(routing.counts.sum()) == 5 * settings["top_k"]


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_opcheck(backend: str, device: str, check_op: Callable[..., None]) -> None:
    logits = torch.randn(5, 12, device=device, requires_grad=True)
    bias = torch.zeros(12, device=device)
    rule = (3, "sigmoid", 4, 2, "max", True, 2.0, 0.1, 0.1)
    check_op(torch.ops.farskip.route.default, logits, bias, *rule, backend)
    routing = route(logits.detach(), 3)
    grad, scalar = torch.randn(5, 3, device=device), torch.ones((), device=device)
    saved = (logits.detach(), routing.experts, routing.counts)
    rest = ("sigmoid", True, 2.0, 0.1, 0.1)
    check_op(torch.ops.farskip.route_backward.default, grad, scalar, scalar, *saved, *rest, backend)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_compiles_as_one_graph(backend: str, device: str) -> None:
    logits, settings = make(9, "E67_K6_softmax_bias_losses", device)

    def step(logits: Tensor) -> Tensor:
        return loss_of(route(logits, backend=backend, **settings))

    eager, compiled = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    step(eager).backward()
    torch.compile(step, fullgraph=True, backend="aot_eager")(compiled).backward()
    assert eager.grad is not None and compiled.grad is not None
    assert torch.equal(eager.grad, compiled.grad)


@pytest.mark.slow
@pytest.mark.timeout(600)
# torch's own compiler imports a module of torch that warns of another one.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_inductor(device: str) -> None:
    """Once through the whole compiler, with the layer's ops around the router; needs a C++ compiler."""
    logits, settings = make(9, "E67_K6_softmax_bias_losses", device)

    def step(logits: Tensor) -> Tensor:
        return loss_of(route(logits.sin(), backend="triton", **settings)).exp()

    eager, compiled = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    step(eager).backward()
    torch.compile(step, fullgraph=True)(compiled).backward()
    # fp32: inductor reassociates what stands around the op
    torch.testing.assert_close(compiled.grad, eager.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 0}, "top_k 0 must lie in 1..12"),
        ({"top_k": 13}, "top_k 13 must lie in 1..12"),
        ({"top_k": 5, "num_groups": 3}, "top_k 5 must lie in 1..4"),
        ({"num_groups": 5}, "num_groups 5 .* divide the 12 experts"),
        ({"num_groups": 3, "top_groups": 4}, "top_groups 4 must lie in 1..3"),
        ({"num_groups": 12, "top_groups": 4}, "sum_top2' needs groups of 2"),
        ({"score": "relu"}, "score 'relu' is unknown"),
        ({"group_score": "mean"}, "group_score 'mean' is unknown"),
        ({"backend": "cuda"}, "backend 'cuda' is unknown"),
        ({"bias": torch.zeros(11)}, r"bias must be .* 12 experts, got float32\[11\]"),
        ({"logits": torch.zeros(3, 12, dtype=torch.int64)}, r"logits must be .* got int64\[3, 12\]"),
        ({"logits": torch.zeros(3, 12, dtype=torch.float64), "backend": "triton"}, "use backend='reference'"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
    settings = {"logits": torch.zeros(3, 12), "top_k": 2} | changes
    with pytest.raises(ValueError, match=message) as error:
        route(**settings)
    assert "\n" not in str(error.value)
