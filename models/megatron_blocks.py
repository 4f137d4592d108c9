"""A layer of megatron-core, taken apart into sub-blocks; and the seam in its attention.

Implements `farskip.stage.SubBlocks` by calling the layer's own modules. Tensors are laid out as [S, B, D] there, where
our names say BSD: neither the executor nor a dispatcher looks inside a token's place, so nothing is transposed.

Routed experts that all lie on this rank run through Megatron's own dispatcher, and give its bits. Rows that came from
other ranks through ours are weighted where they come back, not inside the experts, because weights do not travel: the
same function in another order of products.

Legend: B batch, S sequence, D hidden, T = S*B tokens, K experts per token, E experts, R rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.moe.moe_layer import MoELayer

from farskip.models.attention_seam import seam_of, seam_set
from farskip.stage import Routing, Seam, WeightOn
from farskip.triton_kernels.dispatch_map import dispatch_map
from farskip.triton_kernels.permute import permute
from farskip.triton_kernels.unpermute import unpermute
from farskip.wiring import DENSE, MOE, MOE_SHARED, LayerBlocks

_RECOMPUTE = "_farskip_recompute_core"


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """A layer of another pipeline stage: only what it is made of is known here.

    Attributes:
        blocks: see `SubBlocks.blocks`.
    """

    blocks: LayerBlocks


def blocks_of(config: Any, is_moe: bool) -> LayerBlocks:
    """The sub-blocks of a dense or a MoE layer under a TransformerConfig."""
    if not is_moe:
        return DENSE
    return MOE if config.moe_shared_expert_intermediate_size is None else MOE_SHARED


class MegatronSubBlocks:
    """The sub-blocks of one TransformerLayer whose core attention is a `seamed` one.

    Args:
        layer: the layer.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.blocks = blocks_of(layer.config, isinstance(layer.mlp, MoELayer))
        attention = layer.self_attention
        if attention.checkpoint_core_attention:
            # The attention would run core and seam under its checkpoint. The core does it instead, behind the seam.
            attention.checkpoint_core_attention = False
            attention.core_attention.__dict__[_RECOMPUTE] = True

    def attention_norm(self, stream_BSD: torch.Tensor) -> torch.Tensor:
        """See `SubBlocks.attention_norm`. The identity where the projections do the norm themselves."""
        return self.layer.input_layernorm(stream_BSD)

    def attention(self, normed_BSD: torch.Tensor, seam: Seam, arguments: Mapping[str, Any]) -> torch.Tensor:
        """See `SubBlocks.attention`."""
        attention = self.layer.self_attention
        with seam_set(attention.core_attention, seam):
            return _biased(*attention(normed_BSD, **arguments))

    def mlp_norm(self, stream_BSD: torch.Tensor) -> torch.Tensor:
        """See `SubBlocks.mlp_norm`."""
        return self.layer.pre_mlp_layernorm(stream_BSD)

    def mlp(self, normed_BSD: torch.Tensor) -> torch.Tensor:
        """See `SubBlocks.mlp`."""
        if self.layer.recompute_mlp and torch.is_grad_enabled():
            return _biased(*tensor_parallel.checkpoint(self.layer.mlp, False, normed_BSD))
        return _biased(*self.layer.mlp(normed_BSD))

    def shared(self, normed_BSD: torch.Tensor) -> torch.Tensor:
        """See `SubBlocks.shared`."""
        return self.layer.mlp.shared_experts_compute(normed_BSD)

    def route(self, normed_BSD: torch.Tensor) -> Routing:
        """See `SubBlocks.route`. Megatron's auxiliary losses are tied to the weights, so their gradients come along."""
        weights_TE, chosen_TE = self.layer.mlp.route(normed_BSD)
        config = self.layer.config
        # Each row has K ones, and among equals any order would do: experts stand in ascending order.
        experts_TK = chosen_TE.int().topk(config.moe_router_topk, dim=1, sorted=False).indices.sort(dim=1).values
        return Routing(
            logits_TE=None,
            weights_TK=weights_TE.gather(1, experts_TK),
            experts_TK=experts_TK,
            weight_on=WeightOn.INPUT if config.moe_apply_probs_on_input else WeightOn.OUTPUT,
        )

    def routed(self, normed_BSD: torch.Tensor, routing: Routing) -> torch.Tensor:
        """See `SubBlocks.routed`: the stages of Megatron's MoE layer, one by one."""
        moe, experts_TK = self.layer.mlp, routing.experts_TK
        weights_TE = routing.weights_TK.new_zeros(experts_TK.shape[0], self.layer.config.num_moe_experts)
        weights_TE = weights_TE.scatter(1, experts_TK, routing.weights_TK)
        chosen_TE = torch.zeros_like(weights_TE, dtype=torch.bool).scatter(1, experts_TK, True)
        rows_RD, weights_R = moe.dispatch(*moe.preprocess(normed_BSD, weights_TE, chosen_TE))
        output_RD, _ = moe.routed_experts_compute(rows_RD, weights_R)
        return moe.postprocess(moe.combine(output_RD), None)

    def expert_rows(self, rows_RD: torch.Tensor, expert_R: torch.Tensor) -> torch.Tensor:
        """See `SubBlocks.expert_rows`. Synchronizes the host: Megatron's experts want their numbers of rows there."""
        moe = self.layer.mlp
        by_expert = dispatch_map(expert_R.unsqueeze(1), moe.num_local_experts)
        ones_R = rows_RD.new_ones(rows_RD.shape[0])
        output_RD, bias = moe.experts(permute(rows_RD, by_expert), by_expert.counts.long().cpu(), ones_R)
        assert bias is None, f"{type(moe.experts).__name__} hands a bias on, which no dispatcher takes"
        return unpermute(output_RD, by_expert, None)


@cache
def seamed(core_class: type) -> type:
    """A subclass of a core attention that calls the seam first. The same parameters under the same names."""

    class Seamed(core_class):
        def forward(
            self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *arguments: Any, **keywords: Any
        ) -> torch.Tensor:
            seam = seam_of(self)
            if seam is not None:
                query, key, value = seam(query, key, value)
            core: Callable[..., torch.Tensor] = super().forward
            if _RECOMPUTE in self.__dict__ and self.training and torch.is_grad_enabled():
                again = lambda *qkv: core(*qkv, *arguments, **keywords)  # noqa: E731
                return tensor_parallel.checkpoint(again, False, query, key, value)
            return core(query, key, value, *arguments, **keywords)

    Seamed.__name__ = Seamed.__qualname__ = f"FarSkip{core_class.__name__}"
    return Seamed


def _biased(output_BSD: torch.Tensor, bias_D: torch.Tensor | None) -> torch.Tensor:
    """Megatron's linear layers hand their bias on beside the output, for an op that also adds the stream."""
    return output_BSD if bias_D is None else output_BSD + bias_D
