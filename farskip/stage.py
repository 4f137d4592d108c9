"""What the executor needs from others: the sub-blocks of a layer (models), and dispatch between ranks (parallel).

Only protocols and the values they exchange; `farskip.models` and `farskip.parallel` implement them, so that the core
imports neither.

Legend: B batch, S sequence, D hidden, T = B*S tokens, K experts per token, E experts, R rows on one rank.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple, Protocol

import torch

from farskip.async_autograd import Collective
from farskip.pending import Pending
from farskip.rows_gradient import RowsGradient
from farskip.wiring import LayerBlocks

Seam = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""Called by an attention with (query, key, value) between its projections and its core; uses what comes back."""


class WeightOn(StrEnum):
    """What the router's weight of a chosen expert multiplies."""

    OUTPUT = "output"
    INPUT = "input"


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """Where the router of one layer sends every token.

    Attributes:
        logits_TE: router logits, before any score function; None from a router that balances its experts itself.
        weights_TK: what each chosen expert's output, or input, is multiplied with.
        experts_TK: int64 numbers of the chosen experts.
        weight_on: which of the two. A weighted input is weighted before it is sent, so that no weight has to travel.
    """

    logits_TE: torch.Tensor | None
    weights_TK: torch.Tensor
    experts_TK: torch.Tensor
    weight_on: WeightOn = WeightOn.OUTPUT


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutedRows:
    """A routed output that is not summed per token yet: what `Dispatcher.merge` would make it of.

    Attributes:
        rows_RD: the rows as they came back.
        dispatch: the dispatcher's map from tokens to rows; only dispatcher and kernels look into it.
        weights_TK: what each row is multiplied with; None for a plain sum.
    """

    rows_RD: torch.Tensor
    dispatch: object
    weights_TK: torch.Tensor | None


class Norm(NamedTuple):
    """One norm of a layer: that of attention, or the one in front of MLP, router, shared and routed experts.

    Attributes:
        layer: the layer that it belongs to.
        name: ``attention`` or ``mlp_norm``.
    """

    layer: int
    name: str


class StreamKernels(Protocol):
    """Ops that form sums of the residual stream together with the norms that read them, in one pass over memory.

    Each takes the norms first, then the terms, all [B, S, D] of one dtype, and returns the sum and its normed forms. It
    rounds every sum to that dtype, in the bracketing of `farskip.residual`; `release_both` equals `release_attention`
    and `release_router` in every bit. Names: x, y, n of a layer are streams, a, s, r outputs of its sub-blocks, x', n'
    streams of the next layer. r may come as rows, of that dtype or a narrower one: they are summed on the way, in the
    bits of `Dispatcher.merge`.
    """

    def run_on(self, stream_BSD: torch.Tensor) -> bool:
        """Whether the ops run on a stream of this dtype and device. Then every output joins it in its dtype."""
        ...

    def fusible(self, start: int, stop: int, stream_BSD: torch.Tensor) -> frozenset[Norm]:
        """The norms of layers start..stop-1 that the ops compute, for a stream that they run on."""
        ...

    def add_norm(
        self, norms: tuple[Norm], x_BSD: torch.Tensor, a_BSD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x + a and its norm."""
        ...

    def release_attention(
        self, norms: tuple[Norm], x_BSD: torch.Tensor, a_BSD: torch.Tensor, s_BSD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """y = x + a and the norm of n' = y + s."""
        ...

    def release_router(
        self, norms: tuple[Norm], y_BSD: torch.Tensor, r: torch.Tensor | RoutedRows, s_BSD: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x' = y + (r + s), or y + r, and its norm."""
        ...

    def release_router_by_use(
        self,
        norms: tuple[Norm],
        num_uses: int,
        gradient: RowsGradient,
        y_BSD: torch.Tensor,
        r: torch.Tensor | RoutedRows,
        s_BSD: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """The same, and the norm as one alias per use: for the router, for the rows, and for what else there is.

        The gradients of the aliases are added in this order; that of the second comes from `gradient` if it is there.
        """
        ...

    def release_both(
        self,
        norms: tuple[Norm, Norm],
        x_BSD: torch.Tensor,
        a_BSD: torch.Tensor,
        r: torch.Tensor | RoutedRows,
        s_BSD: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x' = (x + a) + (r + s), the norm of n' = (x + a) + s, and that of x'."""
        ...


class SubBlocks(Protocol):
    """One decoder layer, taken apart into the sub-modules of its own model family."""

    blocks: LayerBlocks

    def attention_norm(self, stream_BSD: torch.Tensor) -> torch.Tensor:
        """The norm in front of attention."""
        ...

    def attention(self, normed_BSD: torch.Tensor, seam: Seam, arguments: Mapping[str, Any]) -> torch.Tensor:
        """Attention without its residual add; has to call `seam` exactly once."""
        ...

    def mlp_norm(self, stream_BSD: torch.Tensor) -> torch.Tensor:
        """The norm in front of the MLP, router, shared and routed experts."""
        ...

    def mlp(self, normed_BSD: torch.Tensor) -> torch.Tensor:
        """The dense MLP."""
        ...

    def shared(self, normed_BSD: torch.Tensor) -> torch.Tensor:
        """The shared expert."""
        ...

    def route(self, normed_BSD: torch.Tensor) -> Routing:
        """The router."""
        ...

    def routed(self, normed_BSD: torch.Tensor, routing: Routing) -> torch.Tensor:
        """All routed experts on this rank, weighted and summed per token."""
        ...

    def expert_rows(self, rows_RD: torch.Tensor, expert_R: torch.Tensor) -> torch.Tensor:
        """The experts of this rank on rows that already lie here; no weights. `expert_R` counts from 0 on each rank."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class DispatchPlan:
    """Everything that dispatch, experts and combine of one chunk of one layer have to agree on.

    Attributes:
        collective: carries rows to the ranks of their experts; its reverse carries them back.
        expert_R: int64 local expert number of every row that arrives here.

    A dispatcher adds what `Dispatcher.merge` needs of its own.
    """

    collective: Collective
    expert_R: torch.Tensor


class Dispatcher(Protocol):
    """Sends tokens to the ranks that hold their experts. Neither method launches the exchange of the rows itself.

    Attributes:
        chunks: into how many parts the tokens are cut.
    """

    chunks: int

    def prepare(
        self, normed_BSD: torch.Tensor, routing: Routing, gradient: RowsGradient | None = None
    ) -> Sequence[tuple[torch.Tensor, DispatchPlan]]:
        """Per chunk: rows in the order of their experts [R, D], and the plan. May exchange split sizes.

        Whoever made `normed_BSD` takes the gradient of the rows copied from it unsummed, if it is laid aside in
        `gradient`: possible where there is one copy, of the tokens as they are.
        """
        ...

    def merge(self, rows: Sequence[torch.Tensor], routing: Routing, plans: Sequence[DispatchPlan]) -> torch.Tensor:
        """Sum of the returned rows per token [T, D], weighted here unless the inputs already were."""
        ...

    def unmerged(self, rows_RD: torch.Tensor, routing: Routing, plan: DispatchPlan) -> RoutedRows:
        """What `merge` sums, not summed: of the only chunk."""
        ...


class TensorParallel(Protocol):
    """The ranks over which sub-blocks are cut, so that each rank's output is one term of a sum.

    Attributes:
        rank: which of them this is; routed experts take this share of the tokens.
        size: how many they are.
        sequence_parallel: whether each of them holds the stream of its share of the tokens only.
        chunks: with that, into how many parts the tokens of a layer are cut for MLP and shared expert.
        gather: brings rows [N, D] of all ranks together, one rank after the other [size * N, D]; all of them give the
            same N. Its reverse sums such rows over the ranks and leaves each its own.
    """

    rank: int
    size: int
    sequence_parallel: bool
    chunks: int
    gather: Collective

    def all_reduce(self, tensor: torch.Tensor) -> Pending:
        """Start summing a contiguous tensor over the ranks, in place; all of them have to do it in the same order."""
        ...
