"""Token dispatch by all-to-all: every token to the ranks that hold its experts, and back.

The rows of a rank are sorted by expert, and experts lie in order on the ranks, so each destination is one stretch of
rows. Weights never travel: a weight on an expert's output is applied where the rows come back, one on its input before
they leave, as in the unsharded model. Permutations are gathers in both directions, never scatter-adds, so sums have a
fixed order.

Legend: B batch, S sequence, D hidden, T = B*S tokens, K experts per token, E experts, W ranks, R rows on this rank.
"""

from collections.abc import Sequence
from typing import Any

import torch

from farskip.parallel.collectives import AllToAll, Link
from farskip.stage import DispatchPlan, Routing, WeightOn


class AllToAllDispatcher:
    """Dispatch and combine over the ranks of a link.

    Args:
        link: the ranks that share the experts; rank r holds experts r*E/W .. (r+1)*E/W - 1.
        num_experts: E, of all ranks together.
        chunks: into how many parts of neighboring tokens the tokens of a layer are cut.

    Raises:
        ValueError: E is not a multiple of W, or no chunk.
    """

    def __init__(self, link: Link, num_experts: int, chunks: int = 1) -> None:
        if num_experts % link.size:
            raise ValueError(
                f"expert parallelism of {link.size} does not divide {num_experts} experts: choose a divisor"
            )
        if chunks < 1:
            raise ValueError(f"chunks={chunks} is too small; use 1 for no chunks, or more")
        self.link = link
        self.num_local_experts = num_experts // link.size
        self.chunks = chunks

    def prepare(self, normed_BSD: torch.Tensor, routing: Routing) -> list[tuple[torch.Tensor, DispatchPlan]]:
        """Sort the rows of every chunk by expert and agree on the split sizes of all chunks at once.

        Args:
            normed_BSD: the tokens.
            routing: where each of them goes.

        Returns:
            Per chunk: rows [T*K, D] in the order of their experts, and the plan.

        Note: exchanges E counts per chunk and synchronizes the host, because split sizes are host integers.
        """
        world, local = self.link.size, self.num_local_experts
        tokens_TD = normed_BSD.reshape(-1, normed_BSD.shape[-1])
        sizes = _even_sizes(tokens_TD.shape[0], self.chunks)
        expert_of_slot = [experts_TK.reshape(-1) for experts_TK in routing.experts_TK.split(sizes)]
        weight_of_slot = [weights_TK.reshape(-1, 1) for weights_TK in routing.weights_TK.split(sizes)]
        sent_CWE = torch.stack([torch.bincount(expert, minlength=world * local) for expert in expert_of_slot]).view(
            self.chunks, world, local
        )
        received_WCE = self.link.exchange_counts(sent_CWE.transpose(0, 1).reshape(world, -1).contiguous())
        received_CWE = received_WCE.view(world, self.chunks, local).transpose(0, 1)
        input_splits, output_splits = sent_CWE.sum(2).tolist(), received_CWE.sum(2).tolist()
        local_expert_WE = torch.arange(local, device=received_CWE.device).repeat(world)
        prepared = []
        for chunk, chunk_TD in enumerate(tokens_TD.split(sizes)):
            slot_of_row = torch.argsort(expert_of_slot[chunk], stable=True)
            row_of_slot = torch.empty_like(slot_of_row)
            row_of_slot[slot_of_row] = torch.arange(slot_of_row.numel(), device=slot_of_row.device)
            plan = DispatchPlan(
                collective=AllToAll(
                    link=self.link,
                    input_splits=tuple(input_splits[chunk]),
                    output_splits=tuple(output_splits[chunk]),
                ),
                expert_R=torch.repeat_interleave(local_expert_WE, received_CWE[chunk].reshape(-1)),
                slot_of_row=slot_of_row,
                row_of_slot=row_of_slot,
            )
            rows = _Permute.apply(chunk_TD, slot_of_row, row_of_slot)
            if routing.weight_on is WeightOn.INPUT:
                rows = rows * _Reorder.apply(weight_of_slot[chunk], slot_of_row, row_of_slot)
            prepared.append((rows, plan))
        return prepared

    def merge(self, rows: Sequence[torch.Tensor], routing: Routing, plans: Sequence[DispatchPlan]) -> torch.Tensor:
        """Sum of the returned rows, weighted here if the weights are on the outputs.

        Args:
            rows: per chunk [T*K, D] in the order they were sent.
            routing: the weights.
            plans: what `prepare` returned.

        Returns:
            [T, D].
        """
        top_k = routing.experts_TK.shape[1]
        weights = routing.weights_TK.split([plan.row_of_slot.numel() // top_k for plan in plans])
        merged = []
        for chunk_rows, weights_TK, plan in zip(rows, weights, plans, strict=True):
            slots = _Reorder.apply(chunk_rows, plan.row_of_slot, plan.slot_of_row)
            weighted = slots * weights_TK.reshape(-1, 1) if routing.weight_on is WeightOn.OUTPUT else slots
            merged.append(weighted.view(*weights_TK.shape, weighted.shape[-1]).sum(dim=1).to(chunk_rows.dtype))
        return merged[0] if len(merged) == 1 else torch.cat(merged)


def _even_sizes(total: int, parts: int) -> list[int]:
    """Sizes of `parts` neighboring stretches that differ by at most one."""
    return [total // parts + (part < total % parts) for part in range(parts)]


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
