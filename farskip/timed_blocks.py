"""Sub-blocks that sleep instead of computing, so that only the communication of a step is real.

Decides what "timed compute" is: attention, shared and routed experts take a fixed time in forward and twice that in
backward, the routed experts in proportion to the rows that lie here. Half of attention's time stands before its seam.
What they compute is next to nothing (a product with a learned scale), but enough for a row in the wrong place to change
a result. Sleeping uses no core, so several ranks share few cores without disturbing each other.

Legend: B batch, S sequence, D hidden, T = B*S tokens, K experts per token, E experts, R rows.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from farskip.stage import Routing, Seam
from farskip.wiring import MOE_SHARED, LayerBlocks

_BACKWARD = 2.0
"""Backward computes two products where forward computes one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SleepTimes:
    """Milliseconds per layer in forward.

    Attributes:
        attention: projections, core and output projection together.
        shared: the shared expert.
        experts: the routed experts on `rows` rows.
        rows: how many rows an even share is.
    """

    attention: float
    shared: float
    experts: float
    rows: int


class SleepingSubBlocks(nn.Module):
    """One decoder layer of sleeps; implements `farskip.stage.SubBlocks`.

    Args:
        hidden: D.
        num_experts: E, of all ranks together.
        top_k: K.
        times: how long it sleeps.
        rank: which slice of the experts lies here.
        size: into how many slices they are cut; 1 leaves all of them here.
        seed: of the scales, equal on all ranks.
    """

    blocks: LayerBlocks = MOE_SHARED

    def __init__(
        self, hidden: int, num_experts: int, top_k: int, times: SleepTimes, *, rank: int, size: int, seed: int
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def drawn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        local = num_experts // size
        self.attention_D = nn.Parameter(0.5 * drawn(hidden))
        self.shared_D = nn.Parameter(0.5 * drawn(hidden))
        self.gate_ED = nn.Parameter(drawn(num_experts, hidden) / hidden**0.5)
        self.expert_E = nn.Parameter(drawn(num_experts)[rank * local : (rank + 1) * local].clone())
        self._top_k = top_k
        self._times = times

    def attention_norm(self, stream_BSD: torch.Tensor) -> torch.Tensor:
        """See `SubBlocks.attention_norm`."""
        return torch.nn.functional.rms_norm(stream_BSD, stream_BSD.shape[-1:])

    def attention(self, normed_BSD: torch.Tensor, seam: Seam, arguments: Mapping[str, Any]) -> torch.Tensor:
        """See `SubBlocks.attention`; one half of its time before the seam, one behind it."""
        half = 0.5 * self._times.attention
        query = slept(normed_BSD * self.attention_D, half)
        query, _, _ = seam(query, query, query)
        return slept(query, half)

    def mlp_norm(self, stream_BSD: torch.Tensor) -> torch.Tensor:
        """See `SubBlocks.mlp_norm`."""
        return torch.nn.functional.rms_norm(stream_BSD, stream_BSD.shape[-1:])

    def mlp(self, normed_BSD: torch.Tensor) -> torch.Tensor:
        """There is no dense layer."""
        raise NotImplementedError("timed sub-blocks have no dense MLP")

    def shared(self, normed_BSD: torch.Tensor) -> torch.Tensor:
        """See `SubBlocks.shared`."""
        return slept(normed_BSD * self.shared_D, self._times.shared)

    def route(self, normed_BSD: torch.Tensor) -> Routing:
        """See `SubBlocks.route`."""
        logits_TE = normed_BSD.reshape(-1, normed_BSD.shape[-1]) @ self.gate_ED.T
        weights_TK, experts_TK = logits_TE.softmax(dim=-1).topk(self._top_k, dim=-1)
        return Routing(logits_TE=logits_TE, weights_TK=weights_TK, experts_TK=experts_TK)

    def routed(self, normed_BSD: torch.Tensor, routing: Routing) -> torch.Tensor:
        """See `SubBlocks.routed`; all experts lie here."""
        factor_T = (routing.weights_TK * self.expert_E[routing.experts_TK]).sum(dim=1)
        return slept(normed_BSD * factor_T.view(*normed_BSD.shape[:-1], 1), self._experts_ms(factor_T.numel()))

    def expert_rows(self, rows_RD: torch.Tensor, expert_R: torch.Tensor) -> torch.Tensor:
        """See `SubBlocks.expert_rows`."""
        return slept(rows_RD * self.expert_E[expert_R].unsqueeze(1), self._experts_ms(rows_RD.shape[0]))

    def _experts_ms(self, rows: int) -> float:
        return self._times.experts * rows / self._times.rows


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, ms: float) -> torch.Tensor:
        ctx.ms = ms
        time.sleep(1e-3 * ms)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        time.sleep(1e-3 * _BACKWARD * ctx.ms)
        return gradient, None


def slept(tensor: torch.Tensor, ms: float) -> torch.Tensor:
    """The same tensor, `ms` milliseconds later; its gradient twice as much later."""
    return _Sleep.apply(tensor, ms)
