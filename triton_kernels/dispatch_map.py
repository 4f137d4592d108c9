"""Dispatch map: where each routed slot stands among the expert rows, and back.

Decides: the checks and the registration with torch. Refuses nothing that a router can produce: a slot whose expert is
outside the range, by custom -1, goes nowhere. The layout is specified in `dispatch_map_reference.py`.

Legend: T tokens, K experts per token, E experts, R rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from farskip.triton_kernels.backend import choose_backend
from farskip.triton_kernels.dispatch_map_reference import dispatch_map_reference, num_rows_bound


@dataclass(frozen=True, kw_only=True, slots=True)
class DispatchMap:
    """Maps between the slots (token, k) of a routing and rows that stand by expert. All tensors int32.

    Attributes:
        counts: [E], rows that each expert got, padding not counted.
        offsets: [E], inclusive cumulative sum of `counts`.
        padded_offsets: [E], end of each expert's segment, padding included: what a grouped matmul wants.
        dst: [T, K], row of each slot; -1 where it has none.
        src: [R], slot (t * K + k) in each row; -1 where the row is padding. R bounds the rows whatever the router did.
    """

    counts: Tensor
    offsets: Tensor
    padded_offsets: Tensor
    dst: Tensor
    src: Tensor


def dispatch_map(
    experts: Tensor,
    num_experts: int,
    *,
    alignment: int = 1,
    capacity: int | None = None,
    backend: str | None = None,
) -> DispatchMap:
    """Place the slots of a routing in rows by expert, in slot order inside each expert.

    Args:
        experts: Expert of each slot, [T, K], int32 or int64; -1 for none.
        num_experts: E.
        alignment: Segments start and end at multiples of this.
        capacity: Most rows per expert; later slots (by position) are dropped. None: no limit.
        backend: "reference", "triton", or None to choose by device.

    Returns:
        The `DispatchMap`.

    Raises:
        ValueError: The input is no integer matrix, or a setting is below 1.

    Note:
        No host synchronization. Deterministic.
    """
    if experts.ndim != 2 or experts.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"experts must be an int32 or int64 [tokens, top_k] matrix, got {experts.dtype} {list(experts.shape)}"
        )
    for name, value in (("num_experts", num_experts), ("alignment", alignment), ("capacity", capacity)):
        if value is not None and value < 1:
            raise ValueError(f"{name} {value} must be at least 1")
    backend = choose_backend(backend, experts)
    counts, offsets, padded_offsets, dst, src = _dispatch_map(
        experts.contiguous(), num_experts, alignment, capacity, backend
    )
    return DispatchMap(counts=counts, offsets=offsets, padded_offsets=padded_offsets, dst=dst, src=src)


@torch.library.custom_op("farskip::dispatch_map", mutates_args=())
def _dispatch_map(
    experts: Tensor, num_experts: int, alignment: int, capacity: int | None, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if backend == "triton":
        from farskip.triton_kernels.dispatch_map_triton import dispatch_map_triton

        return dispatch_map_triton(experts, num_experts, alignment, capacity)
    return dispatch_map_reference(experts, num_experts, alignment, capacity)


@_dispatch_map.register_fake
def _(
    experts: Tensor, num_experts: int, alignment: int, capacity: int | None, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_rows = num_rows_bound(experts.numel(), num_experts, alignment, capacity)
    new = [experts.new_empty(num_experts, dtype=torch.int32) for _ in range(3)]
    dst = experts.new_empty(experts.shape, dtype=torch.int32)
    return new[0], new[1], new[2], dst, experts.new_empty(num_rows, dtype=torch.int32)
