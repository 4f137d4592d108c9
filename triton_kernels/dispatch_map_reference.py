"""Where each routed slot goes, in plain torch: the specification of `dispatch_map`.

Decides: rows stand by expert; inside an expert by slot, that is by token and then by k, so the order is the one of a
stable sort; each expert's segment is padded to a multiple of the alignment; beyond its capacity an expert takes no row.

Legend: T tokens, K experts per token, E experts, R rows.
"""

import torch
from torch import Tensor

from farskip.triton_kernels.route_reference import count_reference


def num_rows_bound(num_slots: int, num_experts: int, alignment: int, capacity: int | None) -> int:
    """Rows that suffice whatever the router does: known without asking the device."""
    rows = num_slots if capacity is None else min(num_slots, num_experts * capacity)
    rows += min(num_slots, num_experts) * (alignment - 1)
    return -(-rows // alignment) * alignment


def dispatch_map_reference(
    experts_TK: Tensor, num_experts: int, alignment: int, capacity: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Maps between slots and rows.

    Args:
        experts_TK: Expert of each slot, [T, K], integers; outside 0..E-1 the slot goes nowhere.
        num_experts: E.
        alignment: Each expert's segment starts and ends at a multiple of this.
        capacity: Most rows per expert, or None.

    Returns:
        counts [E], offsets [E], padded_offsets [E], dst [T, K] and src [R], all int32, as `DispatchMap` describes them.
    """
    num_slots = experts_TK.numel()
    device = experts_TK.device
    ids_S = experts_TK.flatten().to(torch.int64)
    ids_S = torch.where((ids_S >= 0) & (ids_S < num_experts), ids_S, num_experts)
    sorted_ids_S, slot_S = torch.sort(ids_S, stable=True)
    routed_E = count_reference(ids_S, num_experts).to(torch.int64)
    counts_E = routed_E if capacity is None else routed_E.clamp(max=capacity)
    padded_E = -(-counts_E // alignment) * alignment
    starts_E = padded_E.cumsum(0) - padded_E
    # one more entry for the slots that go nowhere: they sort behind all experts
    first_E1 = torch.cat([routed_E.new_zeros(1), routed_E.cumsum(0)])
    starts_E1 = torch.cat([starts_E, starts_E.new_zeros(1)])
    counts_E1 = torch.cat([counts_E, counts_E.new_zeros(1)])
    rank_S = torch.arange(num_slots, device=device) - first_E1[sorted_ids_S]
    row_S = torch.where(rank_S < counts_E1[sorted_ids_S], starts_E1[sorted_ids_S] + rank_S, -1)
    dst_S = torch.empty_like(row_S).scatter_(0, slot_S, row_S)
    num_rows = num_rows_bound(num_slots, num_experts, alignment, capacity)
    src_R = torch.full((num_rows + 1,), -1, device=device)  # the last entry takes what goes nowhere
    src_R = src_R.scatter_(0, torch.where(row_S >= 0, row_S, num_rows), slot_S)
    src_R[num_rows] = -1
    results = (counts_E, counts_E.cumsum(0), padded_E.cumsum(0), dst_S.view_as(experts_TK), src_R[:num_rows])
    counts, offsets, padded_offsets, dst, src = (result.to(torch.int32) for result in results)
    return counts, offsets, padded_offsets, dst, src
