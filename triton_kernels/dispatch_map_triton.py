# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Dispatch maps in Triton: a counting sort in two launches, without atomics and without asking the device anything.

Decides: each program owns a run of consecutive slots. The first kernel counts them per expert, and marks a run of rows
as without a slot, which any row may turn out to be. In the second, every program adds up the counts of all programs
before its own: cheaper than a third kernel that would do it for everyone.
A slot's rank inside its block is a cumulative sum over a one-hot matrix, hence stable.

Legend: T tokens, K experts per token, E experts, R rows, N programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from farskip.triton_kernels.common_triton import INTERPRETING, on_device
from farskip.triton_kernels.dispatch_map_reference import num_rows_bound

MAX_PROGRAMS = 3 if INTERPRETING else 128
"""Each program reads the counts of all. Few in the interpreter, so that there, too, a program has several blocks."""


@triton.jit
def count_slots_kernel(
    experts_ptr,
    tile_counts_ptr,
    src_ptr,
    num_slots,
    num_rows,
    tile_slots,
    tile_rows,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Count one program's slots per expert, and mark its rows as without a slot."""
    tile = tl.program_id(0)
    for start in range(0, tile_rows, BLOCK_ROWS):
        row = tile * tile_rows + start + tl.arange(0, BLOCK_ROWS)
        tl.store(src_ptr + row, tl.full([BLOCK_ROWS], -1, tl.int32), mask=row < num_rows)
    expert = tl.arange(0, BLOCK_EXPERTS)
    count = tl.zeros([BLOCK_EXPERTS], tl.int32)
    for start in range(0, tile_slots, BLOCK_SLOTS):
        slot = tile * tile_slots + start + tl.arange(0, BLOCK_SLOTS)
        index = tl.load(experts_ptr + slot, mask=slot < num_slots, other=-1)
        count += tl.sum((index[:, None] == expert[None, :]).to(tl.int32), axis=0)
    tl.store(tile_counts_ptr + tile * NUM_EXPERTS + expert, count, mask=expert < NUM_EXPERTS)


@triton.jit
def place_slots_kernel(
    experts_ptr,
    tile_counts_ptr,
    counts_ptr,
    offsets_ptr,
    padded_offsets_ptr,
    dst_ptr,
    src_ptr,
    num_slots,
    tile_slots,
    num_tiles,
    alignment,
    capacity,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    """Find the segments, then the row of each of one program's slots."""
    tile = tl.program_id(0)
    expert = tl.arange(0, BLOCK_EXPERTS)
    valid = expert < NUM_EXPERTS
    total = tl.zeros([BLOCK_EXPERTS], tl.int32)
    before = tl.zeros([BLOCK_EXPERTS], tl.int32)
    for start in range(0, num_tiles, BLOCK_TILES):
        other = start + tl.arange(0, BLOCK_TILES)
        at = other[:, None] * NUM_EXPERTS + expert[None, :]
        count = tl.load(tile_counts_ptr + at, mask=(other < num_tiles)[:, None] & valid[None, :], other=0)
        total += tl.sum(count, axis=0)
        before += tl.sum(tl.where((other < tile)[:, None], count, 0), axis=0)
    kept = tl.minimum(total, capacity)
    padded = (kept + alignment - 1) // alignment * alignment
    ends = tl.cumsum(padded, axis=0)
    first = ends - padded
    if tile == 0:
        tl.store(counts_ptr + expert, kept, mask=valid)
        tl.store(offsets_ptr + expert, tl.cumsum(kept, axis=0), mask=valid)
        tl.store(padded_offsets_ptr + expert, ends, mask=valid)

    for start in range(0, tile_slots, BLOCK_SLOTS):
        slot = tile * tile_slots + start + tl.arange(0, BLOCK_SLOTS)
        live = slot < num_slots
        index = tl.load(experts_ptr + slot, mask=live, other=-1)
        hit = index[:, None] == expert[None, :]
        one = hit.to(tl.int32)
        rank = tl.sum(tl.where(hit, before[None, :] + tl.cumsum(one, axis=0) - 1, 0), axis=1)
        row = tl.sum(tl.where(hit, first[None, :], 0), axis=1) + rank
        placed = (index >= 0) & (index < NUM_EXPERTS) & (rank < capacity)
        tl.store(dst_ptr + slot, tl.where(placed, row, -1), mask=live)
        tl.store(src_ptr + row, slot, mask=live & placed)
        before += tl.sum(one, axis=0)


def dispatch_map_triton(
    experts_TK: Tensor, num_experts: int, alignment: int, capacity: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `dispatch_map_reference`. `experts_TK` contiguous."""
    num_slots = experts_TK.numel()
    device = experts_TK.device
    num_rows = num_rows_bound(num_slots, num_experts, alignment, capacity)
    dst_TK = torch.empty(experts_TK.shape, dtype=torch.int32, device=device)
    if num_slots == 0:
        counts_E = torch.zeros(num_experts, dtype=torch.int32, device=device)
        src_R = torch.full((num_rows,), -1, dtype=torch.int32, device=device)
        return counts_E, counts_E.clone(), counts_E.clone(), dst_TK, src_R
    src_R = torch.empty(num_rows, dtype=torch.int32, device=device)
    counts_E, offsets_E, padded_offsets_E = (
        torch.empty(num_experts, dtype=torch.int32, device=device) for _ in range(3)
    )
    block_experts = triton.next_power_of_2(num_experts)
    block_slots = max(1, min(1024, (2**17 if INTERPRETING else 2**13) // block_experts))
    tile_slots = triton.cdiv(triton.cdiv(num_slots, MAX_PROGRAMS), block_slots) * block_slots
    num_tiles = triton.cdiv(num_slots, tile_slots)
    tile_counts_NE = torch.empty(num_tiles, num_experts, dtype=torch.int32, device=device)
    blocks = {"NUM_EXPERTS": num_experts, "BLOCK_EXPERTS": block_experts, "BLOCK_SLOTS": block_slots}
    with on_device(experts_TK):
        count_slots_kernel[(num_tiles,)](
            experts_TK,
            tile_counts_NE,
            src_R,
            num_slots,
            num_rows,
            tile_slots,
            triton.cdiv(num_rows, num_tiles),
            **blocks,
            BLOCK_ROWS=1024,
            num_warps=4,
        )
        place_slots_kernel[(num_tiles,)](
            experts_TK,
            tile_counts_NE,
            counts_E,
            offsets_E,
            padded_offsets_E,
            dst_TK,
            src_R,
            num_slots,
            tile_slots,
            num_tiles,
            alignment,
            num_slots if capacity is None else capacity,
            **blocks,
            BLOCK_TILES=max(1, min(32, 8192 // block_experts)),
            num_warps=4,
        )
    return counts_E, offsets_E, padded_offsets_E, dst_TK, src_R
