"""Token dispatch by all-to-all: every token to the ranks that hold its experts, and back.

The rows of a rank are sorted by expert, and experts lie in order on the ranks, so each destination is one stretch of
rows. Weights stay with the tokens and are applied where the rows come back, as in the unsharded model. Permutations are
gathers in both directions, never scatter-adds, so sums have a fixed order.

Legend: B batch, S sequence, D hidden, T = B*S tokens, K experts per token, E experts, W ranks, R rows on this rank.
"""

from typing import Any

import torch

from farskip.parallel.collectives import AllToAll, Link
from farskip.stage import DispatchPlan, Routing


class AllToAllDispatcher:
    """Dispatch and combine over the ranks of a link.

    Args:
        link: the ranks that share the experts; rank r holds experts r*E/W .. (r+1)*E/W - 1.
        num_experts: E, of all ranks together.

    Raises:
        ValueError: E is not a multiple of W.
    """

    def __init__(self, link: Link, num_experts: int) -> None:
        if num_experts % link.size:
            raise ValueError(
                f"expert parallelism of {link.size} does not divide {num_experts} experts: choose a divisor"
            )
        self.link = link
        self.num_local_experts = num_experts // link.size

    def prepare(self, normed_BSD: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, DispatchPlan]:
        """Sort the rows by expert and agree on the split sizes.

        Args:
            normed_BSD: the tokens.
            routing: where each of them goes.

        Returns:
            Rows [T*K, D] in the order of their experts, and the plan.

        Note: exchanges W*E/W counts and synchronizes the host, because split sizes are host integers.
        """
        world, local = self.link.size, self.num_local_experts
        expert_of_slot = routing.experts_TK.reshape(-1)
        slot_of_row = torch.argsort(expert_of_slot, stable=True)
        row_of_slot = torch.empty_like(slot_of_row)
        row_of_slot[slot_of_row] = torch.arange(slot_of_row.numel(), device=slot_of_row.device)
        sent_WE = torch.bincount(expert_of_slot, minlength=world * local).view(world, local)
        received_WE = self.link.exchange_counts(sent_WE)
        local_expert_WE = torch.arange(local, device=received_WE.device).repeat(world)
        plan = DispatchPlan(
            collective=AllToAll(
                link=self.link,
                input_splits=tuple(sent_WE.sum(1).tolist()),
                output_splits=tuple(received_WE.sum(1).tolist()),
            ),
            expert_R=torch.repeat_interleave(local_expert_WE, received_WE.reshape(-1)),
            slot_of_row=slot_of_row,
            row_of_slot=row_of_slot,
            shape_BSD=normed_BSD.shape,
        )
        tokens_TD = normed_BSD.reshape(-1, normed_BSD.shape[-1])
        return _Permute.apply(tokens_TD, slot_of_row, row_of_slot), plan

    def merge(self, rows: torch.Tensor, routing: Routing, plan: DispatchPlan) -> torch.Tensor:
        """Weighted sum of the returned rows.

        Args:
            rows: [T*K, D] in the order they were sent.
            routing: the weights.
            plan: what `prepare` returned.

        Returns:
            [B, S, D].
        """
        num_tokens, top_k = routing.experts_TK.shape
        slots = _Reorder.apply(rows, plan.row_of_slot, plan.slot_of_row)
        weighted = slots * routing.weights_TK.reshape(-1, 1)
        return weighted.view(num_tokens, top_k, -1).sum(dim=1).to(rows.dtype).view(plan.shape_BSD)


class _Permute(torch.autograd.Function):
    """rows[i] = tokens[slot_of_row[i] // K]; backward sums the K rows of a token in the order of its choices."""

    @staticmethod
    def forward(
        ctx: Any, tokens_TD: torch.Tensor, slot_of_row: torch.Tensor, row_of_slot: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(row_of_slot)
        ctx.num_tokens = tokens_TD.shape[0]
        top_k = slot_of_row.numel() // max(tokens_TD.shape[0], 1)
        return tokens_TD.index_select(0, slot_of_row // max(top_k, 1))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (row_of_slot,) = ctx.saved_tensors
        top_k = row_of_slot.numel() // max(ctx.num_tokens, 1)
        slots = gradient.index_select(0, row_of_slot)
        return slots.view(ctx.num_tokens, top_k, gradient.shape[-1]).sum(dim=1), None, None


class _Reorder(torch.autograd.Function):
    """output[i] = rows[order[i]] for a permutation; backward is the inverse gather, free of atomics."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradient.index_select(0, inverse), None, None
