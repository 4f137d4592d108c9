"""Dispatch maps: against a stable sort written out by hand, exactly, for both backends."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from farskip.triton_kernels.dispatch_map import DispatchMap, dispatch_map

BACKENDS = ["reference", "triton"]


def by_hand(experts: Tensor, num_experts: int, alignment: int, capacity: int | None) -> dict[str, list[int]]:
    """Fill the experts' lists slot by slot, then lay the lists behind each other."""
    lists: list[list[int]] = [[] for _ in range(num_experts)]
    for slot, expert in enumerate(experts.flatten().tolist()):
        if 0 <= expert < num_experts and (capacity is None or len(lists[expert]) < capacity):
            lists[expert].append(slot)
    src, padded_offsets = [], []
    for members in lists:
        src += members + [-1] * (-len(members) % alignment)
        padded_offsets.append(len(src))
    dst = [src.index(slot) if slot in src else -1 for slot in range(experts.numel())]
    counts = [len(members) for members in lists]
    offsets = [sum(counts[: e + 1]) for e in range(num_experts)]
    return {"counts": counts, "offsets": offsets, "padded_offsets": padded_offsets, "dst": dst, "src": src}


def check(result: DispatchMap, expected: dict[str, list[int]], shape: tuple[int, int]) -> None:
    for name in ("counts", "offsets", "padded_offsets"):
        value = getattr(result, name)
        assert (name, value.dtype, value.tolist()) == (name, torch.int32, expected[name])
    assert result.dst.dtype == result.src.dtype == torch.int32
    assert tuple(result.dst.shape) == shape
    assert result.dst.flatten().tolist() == expected["dst"]
    rows = len(expected["src"])
    assert len(result.src) >= rows
    assert result.src.tolist() == expected["src"] + [-1] * (len(result.src) - rows)


def random_experts(num_tokens: int, top_k: int, num_experts: int) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens + num_experts)
    return torch.rand(num_tokens, num_experts, generator=generator).topk(top_k).indices


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_experts"), [(1, 1, 1), (63, 8, 256), (199, 6, 67), (50, 8, 384), (7, 5, 5)]
)
@pytest.mark.parametrize(("alignment", "capacity"), [(1, None), (8, None), (1, 3), (16, 5)])
@pytest.mark.usefixtures("poison_empty")
def test_maps(
    num_tokens: int, top_k: int, num_experts: int, alignment: int, capacity: int | None, backend: str, device: str
) -> None:
    experts = random_experts(num_tokens, top_k, num_experts)
    result = dispatch_map(experts.to(device), num_experts, alignment=alignment, capacity=capacity, backend=backend)
    check(result, by_hand(experts, num_experts, alignment, capacity), (num_tokens, top_k))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_slots_without_expert_and_empty_experts(dtype: torch.dtype, backend: str, device: str) -> None:
    experts = torch.tensor([[2, -1], [2, 2], [-1, -1], [9, 5], [2, 0]], dtype=dtype)
    result = dispatch_map(experts.to(device), 6, alignment=4, backend=backend)
    check(result, by_hand(experts, 6, 4, None), (5, 2))
    assert result.counts.tolist() == [1, 0, 4, 0, 0, 1]
    assert result.padded_offsets.tolist() == [4, 4, 8, 8, 8, 12]


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_expert_gets_all(backend: str, device: str) -> None:
    experts = torch.full((300, 4), 3)
    result = dispatch_map(experts.to(device), 8, backend=backend)
    assert result.src.tolist() == result.dst.flatten().tolist() == list(range(1200))


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_programs_carry_on_where_the_others_stop(backend: str, device: str) -> None:
    """More slots than one block of a program holds, and more than one program."""
    experts = random_experts(2500, 2, 256)
    result = dispatch_map(experts.to(device), 256, backend=backend)
    order = torch.sort(experts.flatten(), stable=True).indices
    assert torch.equal(result.src.cpu(), order.int())
    assert torch.equal(result.dst.cpu().flatten()[order], torch.arange(5000, dtype=torch.int32))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alignment", [1, 8])
def test_no_tokens(alignment: int, backend: str, device: str) -> None:
    result = dispatch_map(torch.empty(0, 4, dtype=torch.int64, device=device), 5, alignment=alignment, backend=backend)
    assert result.counts.tolist() == result.offsets.tolist() == result.padded_offsets.tolist() == [0] * 5
    assert result.dst.shape == (0, 4)
    assert len(result.src) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_odd_layout_opcheck_and_compile(backend: str, device: str, check_op: Callable[..., None]) -> None:
    experts = random_experts(9, 3, 7).to(device)
    strided = torch.empty(3, 9, dtype=torch.int64, device=device).T
    strided.copy_(experts)
    plain = dispatch_map(experts, 7, alignment=4, backend=backend)
    assert torch.equal(dispatch_map(strided, 7, alignment=4, backend=backend).src, plain.src)
    check_op(torch.ops.farskip.dispatch_map.default, experts, 7, 4, None, backend)
    check_op(torch.ops.farskip.dispatch_map.default, experts, 7, 1, 2, backend)
    compiled = torch.compile(dispatch_map, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(experts, 7, alignment=4, backend=backend).src, plain.src)


def test_bad_settings() -> None:
    experts = torch.zeros(3, 2, dtype=torch.int64)
    for changes, message in (
        ({"num_experts": 0}, "num_experts 0 must be at least 1"),
        ({"alignment": 0}, "alignment 0 must be at least 1"),
        ({"capacity": 0}, "capacity 0 must be at least 1"),
        ({"experts": experts.float()}, "experts must be an int32 or int64"),
        ({"experts": experts[0]}, "experts must be an int32 or int64"),
    ):
        with pytest.raises(ValueError, match=message):
            dispatch_map(**({"experts": experts, "num_experts": 4} | changes))


def test_two_launches_and_nothing_else(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Besides memory that is asked for and not touched."""
    from farskip.triton_kernels import dispatch_map_triton as module

    experts, called = random_experts(50, 8, 64).to(device), []

    class Torch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(func.name())
            return func(*args, **(kwargs or {}))

    class Launch:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **keywords: called.append(self.name)

    kernels = [name for name in vars(module) if name.endswith("_kernel")]
    for name in kernels:
        monkeypatch.setattr(module, name, Launch(name))
    with Torch():
        module.dispatch_map_triton(experts, 64, 16, None)
    assert [name for name in called if not name.startswith("aten::empty")] == kernels
