"""Token dispatch by all-to-all: every token to the ranks that hold its experts, and back.

The rows of a rank stand by expert (`farskip.triton_kernels.dispatch_map`), and experts lie in order on the ranks, so
each destination is one stretch of rows. Weights never travel: a weight on an expert's output is applied where the rows
come back, one on its input before they leave, as in the unsharded model. Permutations are gathers in both directions,
never scatter-adds, so sums have a fixed order.

How many rows go where is known in one of two ways:

    exact            no row is dropped. Ranks exchange counts, under the copy of the rows, and the host waits for them.
    fixed capacity   every expert takes `capacity` rows of every rank, padded with zeros; what is beyond is dropped,
                     later tokens first. Nothing is exchanged and the host waits for nothing.

Under autocast rows travel in its dtype, to which the experts would round them where they arrive: half the bytes.

Legend: B batch, S sequence, D hidden, T = B*S tokens, K experts per token, E experts, W ranks, R rows on this rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from farskip.parallel.collectives import AllToAll, Link
from farskip.parallel.degrees import check_experts
from farskip.parallel.host_counts import HostCounts, make_host_counts
from farskip.rows import even_sizes, product_dtype
from farskip.rows_gradient import RowsGradient
from farskip.stage import DispatchPlan, RoutedRows, Routing, WeightOn
from farskip.triton_kernels.backend import choose_backend
from farskip.triton_kernels.dispatch_map import DispatchMap, dispatch_map
from farskip.triton_kernels.permute import permute, permute_weights
from farskip.triton_kernels.unpermute import unpermute
from farskip.wait_meter import WaitMeter


@dataclass(frozen=True, kw_only=True, slots=True)
class RowsPlan(DispatchPlan):
    """The plan of one chunk.

    Attributes:
        dispatch: where each slot (token, choice) stands among the rows that this rank sends.
    """

    dispatch: DispatchMap


class AllToAllDispatcher:
    """Dispatch and combine over the ranks of a link.

    Args:
        link: the ranks that share the experts; rank r holds experts r*E/W .. (r+1)*E/W - 1.
        num_experts: E, of all ranks together.
        chunks: into how many parts of neighboring tokens the tokens of a layer are cut.
        capacity: rows of one chunk that an expert takes from one rank; None for all there are.
        backend: ``triton`` or ``reference`` for the copies of rows; None to choose by device.

    Raises:
        ValueError: E is not a multiple of W, no chunk, or no capacity.
    """

    def __init__(
        self,
        link: Link,
        num_experts: int,
        chunks: int = 1,
        *,
        capacity: int | None = None,
        backend: str | None = None,
    ) -> None:
        check_experts(num_experts, link.size, chunks, capacity)
        self.link = link
        self.num_local_experts = num_experts // link.size
        self.chunks = chunks
        self.capacity = capacity
        self.backend = backend
        self.make_host_counts: Callable[[torch.device, WaitMeter], HostCounts] = make_host_counts
        self._host_counts_on: dict[torch.device, HostCounts] = {}
        self._dropped: torch.Tensor | None = None
        self._num_slots = 0

    def backend_on(self, tensor: torch.Tensor) -> str:
        """Which implementation copies rows like this tensor: ``triton`` or ``reference``."""
        return choose_backend(self.backend, tensor)

    def take_dropped(self) -> tuple[int, int]:
        """Slots beyond the capacity, and all slots, of training passes since the last call.

        Note: layers that are recomputed with their exchanges count twice.
        Note: synchronizes the host.
        """
        dropped, num_slots = (0 if self._dropped is None else int(self._dropped)), self._num_slots
        self._dropped, self._num_slots = None, 0
        return dropped, num_slots

    def prepare(
        self, normed_BSD: torch.Tensor, routing: Routing, gradient: RowsGradient | None = None
    ) -> list[tuple[torch.Tensor, RowsPlan]]:
        """Bring the rows of every chunk into the order of their experts, and settle who gets how many.

        Args:
            normed_BSD: the tokens.
            routing: where each of them goes.
            gradient: where the rows' gradient is laid aside, if they are one copy of the tokens.

        Returns:
            Per chunk: rows in the order of their experts, and the plan. [T*K, D], or [E * capacity, D].

        Note: without a capacity, exchanges E counts per chunk and the host waits for them, once, because split sizes
        are host integers. The rows are copied while the counts travel.
        """
        tokens_TD = normed_BSD.reshape(-1, normed_BSD.shape[-1])
        sizes = even_sizes(tokens_TD.shape[0], self.chunks)
        num_experts = self.num_local_experts * self.link.size
        maps = [
            dispatch_map(experts_TK, num_experts, capacity=self.capacity, backend=self.backend)
            for experts_TK in routing.experts_TK.split(sizes)
        ]
        if self.capacity is not None:
            rows = self._permute([self._padded(one) for one in maps], tokens_TD, routing, sizes, gradient)
            return [(chunk_RD, self._fixed_plan(one)) for chunk_RD, one in rows]
        # counts of all chunks at once, [W, C * E / W]: as row r, those of the experts on rank r
        sent_CWE = torch.stack([one.counts for one in maps]).view(self.chunks, self.link.size, -1).long()
        sent_W = sent_CWE.transpose(0, 1).reshape(self.link.size, -1).contiguous()
        exchanged = self.link.exchange_counts(sent_W)
        under_way = self._host_counts(sent_W.device).begin(exchanged, partial(_split_sizes, sent_W, self.chunks))
        rows = self._permute(maps, tokens_TD, routing, sizes, gradient)
        received_W, (input_splits, output_splits) = under_way.read()
        received_CWE = received_W.view(self.link.size, self.chunks, -1).transpose(0, 1)
        return [
            (chunk_RD, self._exact_plan(one, received_CWE[chunk], input_splits[chunk], output_splits[chunk]))
            for chunk, (chunk_RD, one) in enumerate(rows)
        ]

    def merge(self, rows: Sequence[torch.Tensor], routing: Routing, plans: Sequence[DispatchPlan]) -> torch.Tensor:
        """Sum of the returned rows, weighted here if the weights are on the outputs.

        Args:
            rows: per chunk, in the order they were sent.
            routing: the weights.
            plans: what `prepare` returned.

        Returns:
            [T, D].
        """
        merged, first = [], 0
        for chunk_RD, plan in zip(rows, plans, strict=True):
            assert isinstance(plan, RowsPlan)
            stop = first + plan.dispatch.dst.shape[0]
            weights_TK = routing.weights_TK[first:stop] if routing.weight_on is WeightOn.OUTPUT else None
            merged.append(unpermute(chunk_RD, plan.dispatch, weights_TK, backend=self.backend))
            first = stop
        return merged[0] if len(merged) == 1 else torch.cat(merged)

    def unmerged(self, rows_RD: torch.Tensor, routing: Routing, plan: DispatchPlan) -> RoutedRows:
        """What `merge` makes its sum of, where there is one chunk.

        Args:
            rows_RD: in the order they were sent.
            routing: the weights.
            plan: what `prepare` returned.
        """
        assert isinstance(plan, RowsPlan)
        weights_TK = routing.weights_TK if routing.weight_on is WeightOn.OUTPUT else None
        return RoutedRows(rows_RD=rows_RD, dispatch=plan.dispatch, weights_TK=weights_TK)

    def _host_counts(self, device: torch.device) -> HostCounts:
        if device not in self._host_counts_on:
            self._host_counts_on[device] = self.make_host_counts(device, self.link.meter)
        return self._host_counts_on[device]

    def _permute(
        self,
        maps: Sequence[DispatchMap],
        tokens_TD: torch.Tensor,
        routing: Routing,
        sizes: list[int],
        gradient: RowsGradient | None,
    ) -> list[tuple[torch.Tensor, DispatchMap]]:
        """Per chunk the rows to send, and the map that placed them."""
        found = []
        # A weight on the input is multiplied with it before it is rounded.
        dtype = product_dtype(tokens_TD) if routing.weight_on is WeightOn.OUTPUT else tokens_TD.dtype
        # One part is not split: the gradient of a split is another copy.
        parts = [tokens_TD] if len(sizes) == 1 else tokens_TD.split(sizes)
        for dispatch, chunk_TD, weights_TK in zip(maps, parts, routing.weights_TK.split(sizes), strict=True):
            copy = partial(self._copied, dispatch=dispatch, dtype=dtype)
            if gradient is None or len(sizes) > 1:
                rows_RD = copy(chunk_TD)
            else:
                rows_RD = gradient.copied(copy, chunk_TD, dispatch.dst)
            if routing.weight_on is WeightOn.INPUT:
                weights_R = permute_weights(weights_TK, dispatch, backend=self.backend)
                rows_RD = rows_RD * weights_R.to(rows_RD.dtype).unsqueeze(1)
                rows_RD = rows_RD.to(product_dtype(rows_RD))
            found.append((rows_RD, dispatch))
        return found

    def _copied(self, tokens_TD: torch.Tensor, dispatch: DispatchMap, dtype: torch.dtype) -> torch.Tensor:
        return permute(tokens_TD.to(dtype), dispatch, backend=self.backend)

    def _exact_plan(
        self, dispatch: DispatchMap, received_WE: torch.Tensor, input_splits: list[int], output_splits: list[int]
    ) -> RowsPlan:
        local_expert_WE = torch.arange(self.num_local_experts, device=received_WE.device).repeat(self.link.size)
        return RowsPlan(
            collective=AllToAll(link=self.link, input_splits=tuple(input_splits), output_splits=tuple(output_splits)),
            expert_R=torch.repeat_interleave(local_expert_WE, received_WE.reshape(-1), output_size=sum(output_splits)),
            dispatch=dispatch,
        )

    def _fixed_plan(self, dispatch: DispatchMap) -> RowsPlan:
        assert self.capacity is not None
        splits = (self.num_local_experts * self.capacity,) * self.link.size
        local_expert_E = torch.arange(self.num_local_experts, device=dispatch.dst.device)
        return RowsPlan(
            collective=AllToAll(link=self.link, input_splits=splits, output_splits=splits),
            expert_R=local_expert_E.repeat_interleave(self.capacity).repeat(self.link.size),
            dispatch=dispatch,
        )

    def _padded(self, dispatch: DispatchMap) -> DispatchMap:
        """The same map with every expert's segment padded to the capacity: sizes that no rank has to ask for."""
        assert self.capacity is not None
        num_experts, device = dispatch.counts.numel(), dispatch.counts.device
        num_rows = num_experts * self.capacity
        # row e*capacity + i of the padded map is row starts[e] + i of the tight one, for i below counts[e]
        starts_E1 = (dispatch.offsets - dispatch.counts).long().unsqueeze(1)
        place_C = torch.arange(self.capacity, device=device)
        tight_EC = (starts_E1 + place_C).clamp(max=max(dispatch.src.numel() - 1, 0))
        held_EC = place_C < dispatch.counts.unsqueeze(1)
        if dispatch.src.numel():
            src_R = torch.where(held_EC, dispatch.src[tight_EC], -1).view(num_rows)
        else:
            src_R = dispatch.src.new_full((num_rows,), -1)
        num_slots = dispatch.dst.numel()
        dst_S1 = dispatch.dst.new_full((num_slots + 1,), -1)  # the last entry takes the rows without a slot
        rows_R = torch.arange(num_rows, device=device, dtype=dst_S1.dtype)
        dst_S1.scatter_(0, torch.where(src_R >= 0, src_R, num_slots).long(), rows_R)
        dst_TK = dst_S1[:num_slots].view_as(dispatch.dst)
        if torch.is_grad_enabled():
            self._dropped = (dst_TK < 0).sum() + (0 if self._dropped is None else self._dropped)
            self._num_slots += num_slots
        ends_E = torch.arange(1, num_experts + 1, device=device, dtype=dispatch.offsets.dtype) * self.capacity
        return DispatchMap(
            counts=dispatch.counts,
            offsets=dispatch.offsets,
            padded_offsets=ends_E,
            dst=dst_TK,
            src=src_R.to(dispatch.src.dtype),
        )


def _split_sizes(sent_W: torch.Tensor, chunks: int, received_W: torch.Tensor) -> torch.Tensor:
    """How many rows go to each rank and come from it, [2, chunks, W], of counts [W, chunks * E / W]."""
    size = sent_W.shape[0]
    return torch.stack([sent_W, received_W]).view(2, size, chunks, -1).sum(3).transpose(1, 2)
