"""The two-stream updates: against the bracketing in plain torch, and fused against separate, bit for bit."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from farskip.triton_kernels.add_rms_norm import rms_norm
from farskip.triton_kernels.dispatch_map import DispatchMap, dispatch_map
from farskip.triton_kernels.release_attention import release_attention
from farskip.triton_kernels.release_both import release_both
from farskip.triton_kernels.release_router import release_router
from farskip.triton_kernels.unpermute import unpermute

BACKENDS = ["reference", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUTED = ["rows_weighted", "rows_summed", "dense"]
EPS = 1e-6
T, K, E, H = 7, 3, 5, 50

Leaves = dict[str, Tensor]


def make(device: str, dtype: torch.dtype, routed: str, hidden: int = H) -> tuple[Leaves, DispatchMap | None]:
    """Everything that gets a gradient, by name, and the map."""
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    leaves = {name: random(T, hidden) for name in ("x", "a", "s")}
    leaves |= {name: 1 + random(hidden) / 4 for name in ("weight_n", "weight_x")}
    if routed == "dense":
        return leaves | {"routed": random(T, hidden)}, None
    experts = torch.rand(T, E, generator=generator).topk(K).indices
    experts[2, 1] = experts[5] = -1
    dispatch = dispatch_map(experts.to(device), E, alignment=4)
    leaves["routed"] = random(len(dispatch.src), hidden)
    if routed == "rows_weighted":
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        leaves["combine_weights"] = torch.rand(T, K, generator=generator).to(device, wide)
    return leaves, dispatch


def separate(leaves: Leaves, dispatch: DispatchMap | None, backend: str) -> list[Tensor]:
    """x', norm(n'), norm(x') by the two updates."""
    y, u = release_attention(leaves["x"], leaves["a"], leaves["s"], leaves["weight_n"], EPS, backend=backend)
    combine = leaves.get("combine_weights")
    full, v = release_router(
        y, leaves["s"], leaves["routed"], leaves["weight_x"], EPS, dispatch=dispatch, combine_weights=combine,
        backend=backend,
    )  # fmt: skip
    return [full, u, v]


def both(leaves: Leaves, dispatch: DispatchMap | None, backend: str) -> list[Tensor]:
    """The same by the fused update."""
    return list(release_both(eps=EPS, dispatch=dispatch, backend=backend, **leaves))


def plain(leaves: Leaves, dispatch: DispatchMap | None, backend: str) -> list[Tensor]:
    """The same by single operations."""
    routed = leaves["routed"]
    if dispatch is not None:
        routed = unpermute(routed, dispatch, leaves.get("combine_weights"), backend=backend)
    y = leaves["x"] + leaves["a"]
    n = y + leaves["s"]
    full = y + (routed + leaves["s"])
    return [
        full,
        rms_norm(n, leaves["weight_n"], EPS, backend=backend),
        rms_norm(full, leaves["weight_x"], EPS, backend=backend),
    ]


def run(form: Callable[..., list[Tensor]], leaves: Leaves, dispatch: DispatchMap | None, backend: str) -> list[Tensor]:
    """Outputs and all gradients."""
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    outputs = form(leaves, dispatch, backend)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]
    torch.autograd.backward(outputs, grads)
    found = [leaf.grad for leaf in leaves.values()]
    assert all(grad is not None for grad in found)
    return [*outputs, *(grad for grad in found if grad is not None)]


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize(
    ("dtype", "backend"), [*itertools.product(DTYPES, BACKENDS), (torch.float64, "reference")], ids=str
)
@pytest.mark.parametrize("routed", ROUTED)
def test_fused_separate_and_plain_have_the_same_bits(
    routed: str, dtype: torch.dtype, backend: str, device: str
) -> None:
    """Values and gradients: so a serial schedule with the fused update equals an overlapped one with two."""
    leaves, dispatch = make(device, dtype, routed)
    expected = run(plain, leaves, dispatch, backend)
    for form in (separate, both):
        for got, want in zip(run(form, leaves, dispatch, backend), expected, strict=True):
            assert got.dtype == want.dtype
            assert torch.equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("routed", ROUTED[:2])
def test_narrower_rows_are_summed_in_their_dtype(routed: str, backend: str, device: str) -> None:
    """Under autocast the stream is fp32 and rows are bf16: as if they were summed, then widened. Gradients too."""
    leaves, dispatch = make(device, torch.float32, routed)
    leaves["routed"] = leaves["routed"].bfloat16()
    assert dispatch is not None

    def widened(leaves: Leaves, dispatch: DispatchMap | None, backend: str) -> list[Tensor]:
        assert dispatch is not None
        summed = unpermute(leaves["routed"], dispatch, leaves.get("combine_weights"), backend=backend)
        return plain(leaves | {"routed": summed.to(leaves["x"].dtype)}, None, backend)

    expected = run(widened, leaves, dispatch, backend)
    for form in (separate, both):
        for got, want in zip(run(form, leaves, dispatch, backend), expected, strict=True):
            assert got.dtype == want.dtype and torch.equal(got, want)
    assert not torch.equal(expected[0], both(leaves | {"routed": leaves["routed"].float()}, dispatch, backend)[0])


@pytest.mark.parametrize("routed", ROUTED)
def test_gradients_are_autograds(routed: str) -> None:
    """fp64, against a graph of elementary operations only."""
    leaves, dispatch = make("cpu", torch.float64, routed)

    def elementary(leaves: Leaves, dispatch: DispatchMap | None, backend: str) -> list[Tensor]:
        routed = leaves["routed"]
        if dispatch is not None:
            rows = routed[dispatch.dst.clamp(min=0).long()] * (dispatch.dst >= 0)[..., None]
            routed = (rows * leaves.get("combine_weights", torch.ones(T, K))[..., None]).sum(1)
        n = leaves["x"] + leaves["a"] + leaves["s"]
        full = n + routed

        def norm(z: Tensor, weight: Tensor) -> Tensor:
            return z / (z.pow(2).mean(1, keepdim=True) + EPS).sqrt() * weight

        return [full, norm(n, leaves["weight_n"]), norm(full, leaves["weight_x"])]

    expected = run(elementary, leaves, dispatch, "reference")
    for form in (separate, both):
        torch.testing.assert_close(run(form, leaves, dispatch, "reference"), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("hidden", [H, 2050])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("routed", ROUTED)
def test_kernels_equal_twins(
    routed: str, dtype: torch.dtype, hidden: int, device: str, relative_error: Callable[[Tensor, Tensor], float]
) -> None:
    leaves, dispatch = make(device, dtype, routed, hidden)
    expected, got = (run(both, leaves, dispatch, backend) for backend in BACKENDS)
    if routed != "rows_weighted":
        assert torch.equal(got[0], expected[0])  # additions only: every rounding point in its place
    # otherwise one multiply-add with one rounding instead of two, and row sums in another order
    bound = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    for value, reference in zip(got, expected, strict=True):
        assert relative_error(value, reference) < bound


def test_the_bracketing_is_the_one_written_down() -> None:
    """Values that tell the bracketings apart: 256 + 1 is not a bf16 number."""
    one, big = torch.ones(1, 16, dtype=torch.bfloat16), torch.full((1, 16), 256, dtype=torch.bfloat16)
    weight = torch.ones(16, dtype=torch.bfloat16)
    for backend in BACKENDS:
        if backend == "triton" and torch.cuda.is_available():
            big, one, weight = big.cuda(), one.cuda(), weight.cuda()
        y, _ = release_attention(big, one, one, weight, EPS, backend=backend)
        assert y.unique().tolist() == [256.0]  # 256 + 1 rounds to even
        full, _ = release_router(y, one, one, weight, EPS, backend=backend)
        assert full.unique().tolist() == [258.0]  # y + (1 + 1); (y + 1) + 1 would be 256
        fused, _, _ = release_both(big, one, one, one, weight, weight, EPS, backend=backend)
        assert fused.unique().tolist() == [258.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_shared_experts(backend: str, device: str) -> None:
    leaves, dispatch = make(device, torch.bfloat16, "rows_weighted")
    y, u = release_attention(leaves["x"], leaves["a"], None, leaves["weight_n"], EPS, backend=backend)
    assert torch.equal(y, leaves["x"] + leaves["a"])
    assert torch.equal(u, rms_norm(y, leaves["weight_n"], EPS, backend=backend))
    combine = leaves["combine_weights"]
    full, v = release_router(
        y, None, leaves["routed"], leaves["weight_x"], EPS, dispatch=dispatch, combine_weights=combine, backend=backend
    )
    assert dispatch is not None
    assert torch.equal(full, y + unpermute(leaves["routed"], dispatch, combine, backend=backend))
    assert torch.equal(v, rms_norm(full, leaves["weight_x"], EPS, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_unused_outputs(backend: str, device: str) -> None:
    """Losses that use one output only: what the other would add is zero, and nothing else changes."""
    leaves, dispatch = make(device, torch.float32, "dense")
    for index in range(3):
        grads = []
        for form in (separate, both, plain):
            copies = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
            form(copies, dispatch, backend)[index].sin().sum().backward()
            grads.append(
                [copies[n].grad if copies[n].grad is not None else torch.zeros_like(copies[n]) for n in copies]
            )
        for got in grads[:2]:
            for value, want in zip(got, grads[2], strict=True):
                assert value is not None and want is not None
                assert torch.equal(value, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_gradient_tensor_for_equal_gradients(backend: str, device: str) -> None:
    """x and a (and s, once fused) have the same gradient: it is written once."""
    leaves, _ = make(device, torch.float32, "dense")
    copies = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    full, u, v = both(copies, None, backend)
    names = ("x", "a", "s")
    x, a, s = torch.autograd.grad((full + u + v).sum(), [copies[name] for name in names])
    assert x.data_ptr() == a.data_ptr() == s.data_ptr()
    y, u = release_attention(*(copies[name] for name in names), copies["weight_n"], EPS, backend=backend)
    x, a = torch.autograd.grad((y + u).sum(), [copies["x"], copies["a"]])
    assert x.data_ptr() == a.data_ptr()


def test_n_is_kept_only_for_a_backward() -> None:
    leaves, _ = make("cpu", torch.float32, "dense")
    inputs = (leaves["x"], leaves["a"], leaves["s"])
    op = torch.ops.farskip.release_attention.default
    assert op(*inputs, leaves["weight_n"], EPS, False, False, "reference")[2].numel() == 0
    y, _ = release_attention(inputs[0].requires_grad_(), *inputs[1:], leaves["weight_n"], EPS)
    assert y.grad_fn is not None
    node = y.grad_fn.next_functions[0][0]  # behind the view
    kept = [tuple(t.shape) for t in node.saved_tensors if t is not None]
    assert sorted(kept) == sorted([(T, H), (T,), (H,)])  # n', 1/rms and the weight


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_and_no_tokens(backend: str, device: str) -> None:
    leaves, _ = make(device, torch.float32, "dense")
    shaped = {n: (t.T.contiguous().T if t.ndim == 2 else t) for n, t in leaves.items()}
    for got, want in zip(run(both, shaped, None, backend), run(both, leaves, None, backend), strict=True):
        assert torch.equal(got, want)
    folded = {n: (t.view(1, T, H) if t.ndim == 2 else t) for n, t in leaves.items()}
    assert torch.equal(both(folded, None, backend)[2].view(T, H), both(leaves, None, backend)[2])
    none = {n: (t[:0] if t.ndim == 2 else t) for n, t in leaves.items()}
    for form in (separate, both):
        results = run(form, none, None, backend)
        assert results[0].shape == (0, H)
        assert not results[-1].any()
    many, dispatch = make(device, torch.float32, "rows_weighted")
    copies = {n: t.clone().requires_grad_() for n, t in many.items()}
    both(copies, dispatch, backend)[0].sum().backward()  # a gradient with strides of zero
    assert copies["x"].grad is not None and torch.equal(copies["x"].grad, torch.ones(T, H, device=device))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("routed", ["rows_weighted", "dense"])
def test_opcheck(routed: str, backend: str, device: str, check_op: Callable[..., None]) -> None:
    leaves, dispatch = make(device, torch.float32, routed, hidden=16)
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    maps = (None, None) if dispatch is None else (dispatch.dst, dispatch.src)
    x, a, s, weight, other = (leaves[name] for name in ("x", "a", "s", "weight_n", "weight_x"))
    late, combine = leaves["routed"], leaves.get("combine_weights")
    ops = torch.ops.farskip
    check_op(ops.release_attention.default, x, a, s, weight, EPS, False, True, backend)
    check_op(ops.release_router.default, x, s, late, *maps, combine, other, EPS, False, backend)
    check_op(ops.release_both.default, x, a, s, late, *maps, combine, weight, other, EPS, False, True, backend)
    grads = [leaves[name].detach() for name in ("x", "a", "s")]
    rstd = torch.ones(T, device=device)
    saved = (x.detach(), a.detach(), rstd, rstd, weight.detach(), other.detach())
    check_op(ops.release_both_backward.default, *grads, *saved, False, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_as_one_graph(backend: str, device: str) -> None:
    leaves, dispatch = make(device, torch.float32, "rows_weighted")

    def step(leaves: Leaves, dispatch: DispatchMap, backend: str) -> list[Tensor]:
        return [
            left + right
            for left, right in zip(separate(leaves, dispatch, backend), both(leaves, dispatch, backend), strict=True)
        ]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, want in zip(run(compiled, leaves, dispatch, backend), run(step, leaves, dispatch, backend), strict=True):
        assert torch.equal(got, want)


def test_bad_input() -> None:
    leaves, dispatch = make("cpu", torch.float32, "rows_weighted")
    x, s, weight = leaves["x"], leaves["s"], leaves["weight_n"]
    with pytest.raises(ValueError, match=r"s is torch\.float32"):
        release_attention(x, x, s[1:], weight, EPS)
    with pytest.raises(ValueError, match="combine_weights need the dispatch map"):
        release_router(x, s, x, weight, EPS, combine_weights=leaves["combine_weights"])
    with pytest.raises(ValueError, match=r"routed must be \[\d+, hidden\]"):
        release_router(x, s, x, weight, EPS, dispatch=dispatch)
    with pytest.raises(ValueError, match=r"routed rows .* of 7 tokens do not fit the stream"):
        release_router(x[1:], s[1:], leaves["routed"], weight, EPS, dispatch=dispatch)
    with pytest.raises(ValueError, match=r"routed is torch\.bfloat16"):
        release_both(x, x, s, x.bfloat16(), weight, weight, EPS)
    with pytest.raises(ValueError, match=r"weight must be \[50\]"):
        release_both(x, x, s, x, weight, weight[1:], EPS)
