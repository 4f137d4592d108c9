"""Dense sub-blocks that sleep instead of computing, cut over the ranks of a tensor-parallel group.

As in `farskip.timed_blocks`, what they compute is next to nothing, but enough for a missing sum to change a result.
A rank's output is its slice of the hidden width, and zero for the rest.

Legend: B batch, S sequence, D hidden.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from farskip.stage import Routing, Seam
from farskip.timed_blocks import slept
from farskip.wiring import DENSE, LayerBlocks


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseSleepTimes:
    """Milliseconds per layer in forward, on each rank.

    Attributes:
        attention: projections, core and output projection together.
        mlp: the MLP.
        tokens: of a whole batch; an MLP that is given a part of them sleeps that part of its time. 0: all it is given.
    """

    attention: float
    mlp: float
    tokens: int = 0


class SleepingDenseBlocks(nn.Module):
    """One dense decoder layer of sleeps; implements `farskip.stage.SubBlocks`.

    Args:
        hidden: D.
        times: how long it sleeps.
        rank: which slice of D lies here.
        size: into how many slices D is cut; 1 leaves all of it here.
        seed: of the scales, equal on all ranks.
    """

    blocks: LayerBlocks = DENSE
    mine_D: torch.Tensor

    def __init__(self, hidden: int, times: DenseSleepTimes, *, rank: int, size: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.attention_D = nn.Parameter(0.5 * torch.randn(hidden, generator=generator))
        self.mlp_D = nn.Parameter(0.5 * torch.randn(hidden, generator=generator))
        mine_D = torch.zeros(hidden)
        mine_D.chunk(size)[rank].fill_(1.0)
        self.register_buffer("mine_D", mine_D)
        self._times = times

    def attention_norm(self, stream_BSD: torch.Tensor) -> torch.Tensor:
        """See `SubBlocks.attention_norm`."""
        return torch.nn.functional.rms_norm(stream_BSD, stream_BSD.shape[-1:])

    mlp_norm = attention_norm

    def attention(self, normed_BSD: torch.Tensor, seam: Seam, arguments: Mapping[str, Any]) -> torch.Tensor:
        """See `SubBlocks.attention`; one half of its time before the seam, one behind it."""
        half = 0.5 * self._times.attention
        query = slept(normed_BSD * (self.attention_D * self.mine_D), half)
        query, _, _ = seam(query, query, query)
        return slept(query * 1.0, half)

    def mlp(self, normed_BSD: torch.Tensor) -> torch.Tensor:
        """See `SubBlocks.mlp`."""
        tokens = normed_BSD.shape[:-1].numel()
        return slept(normed_BSD * (self.mlp_D * self.mine_D), self._times.mlp * tokens / (self._times.tokens or tokens))

    def shared(self, normed_BSD: torch.Tensor) -> torch.Tensor:
        """There is no expert."""
        raise NotImplementedError("timed dense sub-blocks have no experts")

    def route(self, normed_BSD: torch.Tensor) -> Routing:
        """There is no expert."""
        raise NotImplementedError("timed dense sub-blocks have no experts")

    def routed(self, normed_BSD: torch.Tensor, routing: Routing) -> torch.Tensor:
        """There is no expert."""
        raise NotImplementedError("timed dense sub-blocks have no experts")

    def expert_rows(self, rows_RD: torch.Tensor, expert_R: torch.Tensor) -> torch.Tensor:
        """There is no expert."""
        raise NotImplementedError("timed dense sub-blocks have no experts")
