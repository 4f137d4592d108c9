"""Tensors of more than 2**31 elements, where a 32-bit offset would wrap: the last rows against a call on them alone.

A row is computed by itself, so the bits have to agree. The same code runs on small tensors everywhere; the large ones
need a GPU with 96 GB.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from farskip.triton_kernels.add_rms_norm import add_rms_norm
from farskip.triton_kernels.dispatch_map import dispatch_map
from farskip.triton_kernels.permute import permute
from farskip.triton_kernels.release_attention import release_attention
from farskip.triton_kernels.release_both import release_both
from farskip.triton_kernels.release_router import release_router, release_router_backward
from farskip.triton_kernels.swiglu import swiglu
from farskip.triton_kernels.unpermute import unpermute

LAST = 5
"""Rows at the end that hold something; all others are zero."""
WRAPS = 2**31
GPU_BYTES = 90 * 2**30

sizes = pytest.mark.parametrize("elements", [512, pytest.param(WRAPS, marks=pytest.mark.gpu)])


@pytest.fixture
def room(device: str, elements: int) -> str:
    """The device, if the tensors fit."""
    if elements == WRAPS and torch.cuda.mem_get_info()[1] < GPU_BYTES:
        pytest.skip("needs a GPU with 96 GB")
    return device


def ends(num_rows: int, cols: int, device: str, seed: int) -> Tensor:
    """Zeros with random rows at the end, bf16."""
    rows = torch.zeros(num_rows, cols, dtype=torch.bfloat16, device=device)
    generator = torch.Generator().manual_seed(seed)
    rows[-LAST:] = torch.randn(LAST, cols, generator=generator).to(device, torch.bfloat16)
    return rows


def compare(op: Callable[..., Tensor | tuple[Tensor, ...]], inputs: list[Tensor]) -> None:
    """Values and gradients of the last rows, over the whole tensors and over those rows alone."""

    def run(tensors: list[Tensor]) -> list[Tensor]:
        leaves = [tensor.requires_grad_() for tensor in tensors]
        outputs = op(*leaves)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        grads = [ends(len(each), each.shape[1], str(each.device), seed) for seed, each in enumerate(outputs)]
        torch.autograd.backward(outputs, grads)
        found = [*outputs, *(leaf.grad for leaf in leaves)]
        return [each[-LAST:].detach().clone() for each in found if each is not None]

    alone = run([tensor[-LAST:].detach().clone() for tensor in inputs])
    for whole, expected in zip(run(inputs), alone, strict=True):
        assert expected.any() and torch.equal(whole, expected)


OPS = {
    "add_rms_norm": (2, lambda w, x, a: add_rms_norm(x, a, w, 1e-6, backend="triton")),
    "release_attention": (3, lambda w, x, a, s: release_attention(x, a, s, w, 1e-6, backend="triton")),
    "release_router": (3, lambda w, y, s, r: release_router(y, s, r, w, 1e-6, backend="triton")),
    "release_both": (4, lambda w, x, a, s, r: release_both(x, a, s, r, w, w, 1e-6, backend="triton")),
}


@sizes
@pytest.mark.parametrize("name", OPS)
def test_streams(name: str, elements: int, room: str) -> None:
    cols = 64 if elements < WRAPS else 8192
    num_inputs, op = OPS[name]
    weight = torch.linspace(0.5, 2, cols, dtype=torch.bfloat16, device=room)
    inputs = [ends(elements // cols + 3, cols, room, seed) for seed in range(10, 10 + num_inputs)]
    compare(lambda *tensors: op(weight, *tensors), inputs)


@sizes
def test_the_backward_of_the_router_update(elements: int, room: str) -> None:
    """One row per token, in order, so that tokens and rows are many."""
    cols = 64 if elements < WRAPS else 8192
    num_tokens = elements // cols + 3
    weight = torch.linspace(0.5, 2, cols, dtype=torch.bfloat16, device=room)
    tensors = [ends(num_tokens, cols, room, seed) for seed in range(5)]

    def run(tensors: list[Tensor]) -> Tensor:
        grad, before, rows, after, x = tensors
        dispatch = dispatch_map(torch.zeros(len(x), 1, dtype=torch.int64, device=room), 1, backend="triton")
        rstd = torch.full((len(x),), 0.5, device=room)
        arguments = (grad, before, rows, after, x, rstd, weight)
        return release_router_backward(*arguments, dispatch=dispatch, backend="triton")[0][-LAST:]

    alone = run([each[-LAST:].clone() for each in tensors])
    assert alone.any() and torch.equal(run(tensors), alone)


@sizes
@pytest.mark.parametrize("interleaved", [False, True])
def test_swiglu(interleaved: bool, elements: int, room: str) -> None:
    cols = 64 if elements < WRAPS else 8192
    h = ends(elements // cols + 3, cols, room, 0)
    compare(lambda h: swiglu(h, interleaved=interleaved, backend="triton"), [h])


@sizes
def test_copies_of_many_tokens(elements: int, room: str) -> None:
    """One expert per token, so that tokens and rows are many; all in order, so that the last rows are the last ones."""
    cols = 64 if elements < WRAPS else 8192
    num_tokens = elements // cols + 3
    x = ends(num_tokens, cols, room, 0)

    def there_and_back(x: Tensor) -> tuple[Tensor, Tensor]:
        dispatch = dispatch_map(torch.zeros(len(x), 1, dtype=torch.int64, device=room), 1, backend="triton")
        rows = permute(x, dispatch, backend="triton")
        weights = torch.full((len(x), 1), 0.5, device=room, requires_grad=True)
        return rows, unpermute(rows, dispatch, weights, backend="triton")

    compare(there_and_back, [x])


@sizes
def test_copies_to_many_rows(elements: int, room: str) -> None:
    """Few tokens, eight rows for each, and the expert of the last rows behind the offset that would wrap."""
    cols, top_k = (64 if elements < WRAPS else 8192), 8
    num_tokens = elements // cols // top_k + 1
    x = torch.arange(num_tokens, device=room).remainder(251).to(torch.bfloat16)[:, None].expand(-1, cols).contiguous()
    experts = torch.arange(top_k, device=room).expand(num_tokens, top_k).contiguous()
    dispatch = dispatch_map(experts, top_k, backend="triton")
    rows = permute(x, dispatch, backend="triton")
    assert rows.numel() > elements
    assert torch.equal(rows[-num_tokens:], x) and torch.equal(rows[:num_tokens], x)
    summed = unpermute(rows, dispatch, torch.full(experts.shape, 0.125, device=room), backend="triton")
    assert torch.equal(summed, x)
