"""Grouped matmul and the down projection with combine: against dense products, and where torch's own is thin ice."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from farskip.triton_kernels.dispatch_map import DispatchMap, dispatch_map
from farskip.triton_kernels.down_combine import down_combine
from farskip.triton_kernels.grouped_mm import choose_grouped_backend, grouped_mm
from farskip.triton_kernels.grouped_mm_triton import zero_tail_triton
from farskip.triton_kernels.permute import permute, permute_weights
from farskip.triton_kernels.swiglu import swiglu
from farskip.triton_kernels.unpermute import unpermute

OFFSETS = {"plain": [3, 7, 12, 16], "empty": [0, 9, 9, 16], "tail": [2, 5, 5, 11], "nothing": [0, 0, 0, 0]}


def make(device: str, dtype: torch.dtype, rows: int = 16, depth: int = 24, width: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((rows, depth), (4, depth, width), (rows, width))
    return [torch.randn(*s, generator=generator, dtype=torch.float64).to(device, dtype) for s in shapes]


def dense(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """All rows times all matrices, and then the right one picked."""
    expert = torch.searchsorted(offsets, torch.arange(len(a), device=a.device), right=True)
    everything = torch.einsum("rd,edn->ern", a, b)
    picked = everything[expert.clamp(max=len(b) - 1), torch.arange(len(a))]
    return picked * (expert < len(b))[:, None]


def run(form: Callable[..., Tensor], a: Tensor, b: Tensor, grad: Tensor, *rest: object) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in (a, b)]
    out = form(*leaves, *rest)
    out.backward(grad)
    assert leaves[0].grad is not None and leaves[1].grad is not None
    return [out, leaves[0].grad, leaves[1].grad]


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("offsets", list(OFFSETS))
@pytest.mark.parametrize(
    ("dtype", "backend"),
    [
        (torch.float64, "reference"),
        (torch.float32, "reference"),
        (torch.bfloat16, "reference"),
        (torch.float32, "torch"),
        (torch.bfloat16, "torch"),
    ],
    ids=str,
)
def test_equals_dense(
    dtype: torch.dtype, backend: str, offsets: str, relative_error: Callable[[Tensor, Tensor], float]
) -> None:
    a, b, grad = make("cpu", dtype)
    ends = torch.tensor(OFFSETS[offsets], dtype=torch.int32)
    expected = run(dense, a.double(), b.double(), grad.double(), ends)
    a[ends[-1] :] = torch.nan  # rows behind the last segment are never read
    leaves = [t.clone().requires_grad_() for t in (a, b)]
    out = grouped_mm(*leaves, ends, backend=backend)
    out.backward(grad)
    # sums of at most 24 products; one rounding to the storage dtype
    bound = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
    for got, want in zip((out, leaves[0].grad, leaves[1].grad), expected, strict=True):
        assert got is not None
        assert relative_error(got, want) < bound


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_layouts(backend: str) -> None:
    a, b, _ = make("cpu", torch.float32)
    ends = torch.tensor(OFFSETS["plain"], dtype=torch.int32)
    plain = run(lambda a, b: grouped_mm(a, b, ends, backend=backend), a, b, torch.ones(16, 8))
    transposed = b.transpose(1, 2).contiguous().transpose(1, 2)
    odd = torch.empty(24, 32).T[::2]
    odd.copy_(a)
    got = run(lambda a, b: grouped_mm(a, b, ends, backend=backend), odd, transposed, torch.ones(1).expand(16, 8))
    for value, want in zip(got, plain, strict=True):
        torch.testing.assert_close(value, want, rtol=1e-5, atol=1e-6)  # fp32 sums of 24 in another order
    none = run(lambda a, b: grouped_mm(a, b, ends * 0, backend=backend), a[:0], b, torch.ones(0, 8))
    assert [tuple(v.shape) for v in none] == [(0, 8), (0, 24), (4, 24, 8)]
    assert not none[2].any()


def test_choice() -> None:
    a, b, _ = make("cpu", torch.float32)
    assert choose_grouped_backend(None, a, b) == "reference"
    assert choose_grouped_backend("torch", a, b) == "torch"
    for bad_a, bad_b, message in (
        (a.double(), b.double(), r"cannot take torch\.float64"),
        (a[:, :23], b[:, :23], "rows of 23 x 4 bytes"),
        (a, b[..., :7], "rows of 7 x 4 bytes"),
    ):
        with pytest.raises(ValueError, match=message):
            choose_grouped_backend("torch", bad_a, bad_b)
    with pytest.raises(ValueError, match="backend 'triton' is unknown"):
        choose_grouped_backend("triton", a, b)


@pytest.mark.parametrize(("rows", "last"), [(130, 0), (130, 64), (130, 65), (130, 129), (130, 130), (0, 0)])
def test_zero_tail_kernel(rows: int, last: int, device: str) -> None:
    out = torch.full((rows, 40), torch.nan, device=device)
    zero_tail_triton(out, torch.tensor([0, last], dtype=torch.int32, device=device))
    assert out[:last].isnan().all()
    assert not out[last:].any()


def experts_output(x: Tensor, up: Tensor, down: Tensor, weights: Tensor, dispatch: DispatchMap, form: str) -> Tensor:
    """An MoE layer's routed output with the weights acting in one of three places."""
    h = grouped_mm(permute(x, dispatch), up, dispatch.padded_offsets)
    if form == "at_activation":
        activations = swiglu(h, weights=permute_weights(weights, dispatch))
        return unpermute(grouped_mm(activations, down, dispatch.padded_offsets), dispatch)
    if form == "at_combine":
        return unpermute(grouped_mm(swiglu(h), down, dispatch.padded_offsets), dispatch, weights)
    return down_combine(swiglu(h), down, dispatch, weights, backend="triton" if form == "triton" else None)


def layer(dtype: torch.dtype) -> tuple[list[Tensor], DispatchMap]:
    generator = torch.Generator().manual_seed(4)
    experts = torch.rand(13, 4, generator=generator).topk(2).indices
    experts[3, 1] = experts[7] = -1
    shapes = ((13, 8), (4, 8, 24), (4, 12, 8), (13, 2))
    tensors = [torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    return tensors, dispatch_map(experts, 4, alignment=4)


@pytest.mark.parametrize("form", ["at_activation", "at_combine", "down_combine", "triton"])
def test_three_places_for_the_weights(form: str) -> None:
    """One function of x, both matrices and the weights, wherever the weights act; gradients too."""
    dtype = torch.float32 if form == "triton" else torch.float64
    tensors, dispatch = layer(torch.float64)
    results = []
    for own in (True, False):
        leaves = [t.to(dtype if own else torch.float64).requires_grad_() for t in tensors]
        x, up, down, weights = leaves
        if own:
            out = experts_output(x, up, down, weights, dispatch, form)
        else:
            out = torch.zeros_like(x)
            for token, slots in enumerate(dispatch.dst.tolist()):
                for k, row in enumerate(slots):
                    if row >= 0:
                        e = int((dispatch.padded_offsets <= row).sum())
                        gate, value = (x[token] @ up[e]).chunk(2)
                        term = weights[token, k] * ((torch.nn.functional.silu(gate) * value) @ down[e])
                        out = out.index_add(0, torch.tensor([token]), term[None])
        (out * torch.arange(8).cos()).sum().backward()
        results.append([out.double(), *(leaf.grad.double() for leaf in leaves if leaf.grad is not None)])
    # a chain of two products of depth 8 and 12, absolute terms of order 10: fp64 or fp32 rounding
    tolerance = {"rtol": 1e-11, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(results[0], results[1], **tolerance)


def test_no_expert_output_is_kept() -> None:
    tensors, dispatch = layer(torch.float32)
    _, _, down, weights = (t.requires_grad_() for t in tensors)
    activations = torch.randn(len(dispatch.src), 12, requires_grad=True)
    output = down_combine(activations, down, dispatch, weights)
    node = output.grad_fn
    assert node is not None
    assert (len(dispatch.src), 8) not in [tuple(t.shape) for t in node.saved_tensors]  # type: ignore[attr-defined]


def test_opcheck(check_op: Callable[..., None]) -> None:
    a, b, grad = make("cpu", torch.float32)
    ends = torch.tensor(OFFSETS["tail"], dtype=torch.int32)
    leaves = [t.clone().requires_grad_() for t in (a, b)]
    ops = torch.ops.farskip
    for backend in ("reference", "torch"):
        check_op(ops.grouped_mm.default, *leaves, ends, backend)
        check_op(ops.grouped_outer.default, a, grad, ends, backend)
    tensors, dispatch = layer(torch.float32)
    maps = (dispatch.dst, dispatch.src, dispatch.padded_offsets)
    activations = torch.randn(len(dispatch.src), 12, requires_grad=True)
    down, weights = tensors[2].requires_grad_(), tensors[3].requires_grad_()
    check_op(ops.down_combine.default, activations, down, *maps, weights, "reference", "reference")
    plain = (activations.detach(), down.detach(), *maps, weights.detach())
    check_op(ops.down_combine_backward.default, torch.randn(13, 8), *plain, "reference", "reference")


def test_compiles_as_one_graph() -> None:
    tensors, dispatch = layer(torch.float32)
    grads = []
    for run_layer in (experts_output, torch.compile(experts_output, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in tensors]
        run_layer(*leaves, dispatch, "down_combine").sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for eager, compiled in zip(*grads, strict=True):
        assert eager is not None and compiled is not None
        assert torch.equal(eager, compiled)


def test_bad_input() -> None:
    a, b, _ = make("cpu", torch.float32)
    ends = torch.tensor(OFFSETS["plain"], dtype=torch.int32)
    with pytest.raises(ValueError, match="of one dtype"):
        grouped_mm(a, b.bfloat16(), ends)
    with pytest.raises(ValueError, match="of one dtype"):
        grouped_mm(a[:, 1:], b, ends)
    with pytest.raises(ValueError, match=r"offsets must be int32 \[4\]"):
        grouped_mm(a, b, ends.long())
    tensors, dispatch = layer(torch.float32)
    activations = torch.zeros(len(dispatch.src), 11)
    with pytest.raises(ValueError, match=r"down must be \[experts, 11, hidden\]"):
        down_combine(activations, tensors[2], dispatch, tensors[3])
