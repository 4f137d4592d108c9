"""Llama-4, text: dense and MoE layers in turn, layers without rotary embedding, and weights on the experts' INPUT.

Its router returns (scores [T, E], logits), zero for experts that were not chosen; its experts take equally many rows
for every expert, and transformers gives every expert every token, those it was not chosen for times zero. On one rank
that is what runs here too, so that ordinary wiring equals the untouched model. Rows that come from other ranks are
filled up to the busiest expert's count instead.

Legend: B batch, S sequence, D hidden, T = B*S tokens, K experts per token, E experts, R rows, C the busiest one's rows.
"""

from typing import Any

import torch

from farskip.models.family import Family
from farskip.models.hf_layer import HFSubBlocks
from farskip.stage import Routing, WeightOn


class Llama4SubBlocks(HFSubBlocks):
    """Other names, another router, and experts that multiply nothing."""

    MLP = "feed_forward"
    GATE = "router"
    SHARED = "shared_expert"

    def route(self, normed_BSD: torch.Tensor) -> Routing:
        """See `SubBlocks.route`."""
        scores_TE, logits_TE = self.gate(normed_BSD.reshape(-1, normed_BSD.shape[-1]))
        experts_TK = logits_TE.topk(self.gate.top_k, dim=1).indices
        return Routing(
            logits_TE=logits_TE,
            weights_TK=scores_TE.gather(1, experts_TK),
            experts_TK=experts_TK,
            weight_on=WeightOn.INPUT,
        )

    def routed(self, normed_BSD: torch.Tensor, routing: Routing) -> torch.Tensor:
        """See `SubBlocks.routed`."""
        experts: Any = self.experts
        tokens_TD = normed_BSD.reshape(-1, normed_BSD.shape[-1])
        assert routing.logits_TE is not None
        scores_TE = torch.zeros_like(routing.logits_TE).scatter(1, routing.experts_TK, routing.weights_TK)
        inputs_RD = tokens_TD.repeat(experts.num_experts, 1) * scores_TE.transpose(0, 1).reshape(-1, 1)
        return experts(inputs_RD).view(experts.num_experts, *normed_BSD.shape).sum(dim=0)

    def expert_rows(self, rows_RD: torch.Tensor, expert_R: torch.Tensor) -> torch.Tensor:
        """See `SubBlocks.expert_rows`. Note: synchronizes the host, to know C."""
        experts: Any = self.experts
        counts_E = torch.bincount(expert_R, minlength=experts.num_experts)
        capacity = int(counts_E.max())
        by_expert_R = torch.argsort(expert_R, stable=True)
        first_E = counts_E.cumsum(0) - counts_E
        sorted_R = expert_R[by_expert_R]
        position_R = torch.arange(expert_R.numel(), device=expert_R.device)
        place_R = torch.empty_like(expert_R)
        place_R[by_expert_R] = sorted_R * capacity + position_R - first_E[sorted_R]
        filled = rows_RD.new_zeros(experts.num_experts * capacity, rows_RD.shape[1]).index_copy(0, place_R, rows_RD)
        return experts(filled).index_select(0, place_R)


FAMILY = Family(
    model_type="llama4_text", architecture="Llama4ForCausalLM", score="sigmoid", sub_blocks=Llama4SubBlocks, swiglu=None
)
