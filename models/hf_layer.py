"""A decoder layer of transformers, taken apart into sub-blocks: what nearly all families have in common.

Decides where the sub-modules are and how they are called. A family that names one of them differently sets a name in a
subclass; one that calls one of them differently overrides that one method.

Legend: B batch, S sequence, D hidden, T = B*S tokens, K experts per token, E experts, R rows.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from farskip.chain import MLP_NORM
from farskip.models.attention_seam import seam_set
from farskip.stage import Routing, Seam
from farskip.wiring import ATTENTION, DENSE, MOE, MOE_SHARED, LayerBlocks


class HFSubBlocks:
    """Sub-blocks of a layer with ``self_attn``, two norms and ``mlp``, the latter with ``experts`` where it is a MoE.

    Args:
        layer: a transformers decoder layer.

    Attributes:
        MLP: name of the feed-forward module in the layer, dense or MoE.
        GATE: name of the router in the MoE.
        SHARED: name of the shared expert in the MoE.
    """

    MLP = "mlp"
    GATE = "gate"
    SHARED = "shared_experts"

    def __init__(self, layer: nn.Module) -> None:
        self.layer: Any = layer
        if self.experts is None:
            self.blocks: LayerBlocks = DENSE
        else:
            self.blocks = MOE if self.shared_expert is None else MOE_SHARED

    @property
    def mlp_module(self) -> Any:
        """The feed-forward module, dense or MoE."""
        return getattr(self.layer, self.MLP)

    @property
    def experts(self) -> nn.Module | None:
        """The module that holds the routed experts' weights; None in a dense layer."""
        return getattr(self.mlp_module, "experts", None)

    @property
    def shared_expert(self) -> nn.Module | None:
        """The shared expert; None if the layer has none."""
        return getattr(self.mlp_module, self.SHARED, None)

    @property
    def gate(self) -> Any:
        """The router."""
        return getattr(self.mlp_module, self.GATE)

    @property
    def selection_bias(self) -> torch.Tensor | None:
        """The bias [E] that the router chooses by and does not weigh with; None if it has none."""
        return getattr(self.gate, "e_score_correction_bias", None)

    @property
    def norms(self) -> dict[str, Any]:
        """The norm modules, by the names of `farskip.stage.Norm`."""
        return {ATTENTION: self.layer.input_layernorm, MLP_NORM: self.layer.post_attention_layernorm}

    @property
    def bare_norms(self) -> frozenset[str]:
        """The names of those norms that are all that `attention_norm` and `mlp_norm` now do, so that a fused op may
        run in their place. A family that overrides one of the two is taken to do more."""
        kind, plain = type(self), HFSubBlocks
        bare = {ATTENTION: kind.attention_norm is plain.attention_norm, MLP_NORM: kind.mlp_norm is plain.mlp_norm}
        return frozenset(name for name, is_bare in bare.items() if is_bare)

    def attention_norm(self, stream_BSD: torch.Tensor) -> torch.Tensor:
        """See `SubBlocks.attention_norm`."""
        return self.norms[ATTENTION](stream_BSD)

    def attention(self, normed_BSD: torch.Tensor, seam: Seam, arguments: Mapping[str, Any]) -> torch.Tensor:
        """See `SubBlocks.attention`."""
        with seam_set(self.layer.self_attn, seam):
            return self.layer.self_attn(hidden_states=normed_BSD, **arguments)[0]

    def mlp_norm(self, stream_BSD: torch.Tensor) -> torch.Tensor:
        """See `SubBlocks.mlp_norm`."""
        return self.norms[MLP_NORM](stream_BSD)

    def mlp(self, normed_BSD: torch.Tensor) -> torch.Tensor:
        """See `SubBlocks.mlp`."""
        return self.mlp_module(normed_BSD)

    def shared(self, normed_BSD: torch.Tensor) -> torch.Tensor:
        """See `SubBlocks.shared`."""
        assert self.shared_expert is not None
        return self.shared_expert(normed_BSD)

    def route(self, normed_BSD: torch.Tensor) -> Routing:
        """See `SubBlocks.route`."""
        logits_TE, weights_TK, experts_TK = self.gate(normed_BSD.reshape(-1, normed_BSD.shape[-1]))
        return Routing(logits_TE=logits_TE, weights_TK=weights_TK, experts_TK=experts_TK)

    def routed(self, normed_BSD: torch.Tensor, routing: Routing) -> torch.Tensor:
        """See `SubBlocks.routed`."""
        assert self.experts is not None
        tokens_TD = normed_BSD.view(-1, normed_BSD.shape[-1])
        return self.experts(tokens_TD, routing.experts_TK, routing.weights_TK).view(normed_BSD.shape)

    def expert_rows(self, rows_RD: torch.Tensor, expert_R: torch.Tensor) -> torch.Tensor:
        """See `SubBlocks.expert_rows`: the family's own experts, one expert per row, with weight 1."""
        experts = self.experts
        assert experts is not None
        if rows_RD.shape[0] == 0:
            # Keep the graph whole: the other ranks' backward needs our part of the exchange, and an expert that got no
            # token has a gradient of zero, not none.
            return rows_RD + 0.0 * sum(parameter.flatten()[:1].sum() for parameter in experts.parameters())
        ones_R1 = torch.ones_like(expert_R, dtype=rows_RD.dtype).unsqueeze(1)
        return experts(rows_RD, expert_R.unsqueeze(1), ones_R1)
