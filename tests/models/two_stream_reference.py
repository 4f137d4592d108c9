"""An independent reference for rewired models: the papers' equations, written out layer by layer.

It calls the sub-modules of an untouched transformers model and imports nothing of this project. Every layer has a
topology of its own; the table in `_attention_input` and `_mlp_input` is the whole difference between them.

    topology    attention reads                          MLP, router, shared and routed experts read
    ordinary    x                                        y = x + a
    farskip     n: x without the previous routed output  x
    attn_only   n                                        y
    parallel    x                                        x
    ladder      n: x without the previous MLP output     x
    scmoe       x                                        routed: x;  shared: y

Legend: x full stream at a layer's entry, a attention, s shared, r routed experts, m dense MLP; B batch, S sequence.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Outputs:
    """What one layer has made, and the stream it started from."""

    x: torch.Tensor
    a: torch.Tensor
    s: torch.Tensor | None
    r: torch.Tensor | None
    m: torch.Tensor | None

    def full(self) -> torch.Tensor:
        """The stream with everything in it, in the reference's bracketing: y + (r + s)."""
        y = self.x + self.a
        if self.m is not None:
            return y + self.m
        assert self.r is not None
        return y + self.r if self.s is None else y + (self.r + self.s)

    def without_routed(self) -> torch.Tensor:
        """n = y + s; after a dense layer nothing is routed, so n is the full stream."""
        if self.r is None:
            return self.full()
        y = self.x + self.a
        return y if self.s is None else y + self.s

    def without_mlp(self) -> torch.Tensor:
        """n = y."""
        return self.x + self.a


def _attention_input(topology: str, x: torch.Tensor, before: Outputs | None) -> torch.Tensor:
    if before is None or topology in ("ordinary", "parallel", "scmoe"):
        return x
    return before.without_mlp() if topology == "ladder" else before.without_routed()


def _mlp_input(topology: str, block: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if topology in ("ordinary", "attn_only"):
        return y
    if topology == "scmoe":
        return x if block == "routed" else y
    return x


def hidden_states(
    model: Any,
    ids_BS: torch.Tensor,
    topologies: list[str],
    *,
    mask_BS: torch.Tensor | None = None,
    confused: str | None = None,
) -> list[torch.Tensor]:
    """The full stream at the entry of every layer, and behind the final norm.

    Args:
        model: an untouched Qwen3-MoE or DeepSeek-V3 causal language model.
        ids_BS: int64 tokens.
        topologies: one per layer.
        mask_BS: 1 where a token counts, 0 where it is padding.
        confused: ``attention`` or ``mlp``: a wrong reference, in which that side reads the other stream.
    """
    from transformers.masking_utils import create_causal_mask

    backbone = model.model
    x = backbone.embed_tokens(ids_BS)
    positions_BS = torch.arange(ids_BS.shape[1]).unsqueeze(0)
    mask = create_causal_mask(
        config=model.config, inputs_embeds=x, attention_mask=mask_BS, past_key_values=None, position_ids=positions_BS
    )
    rotary = backbone.rotary_emb(x, position_ids=positions_BS)
    before: Outputs | None = None
    states = [x]
    for layer, topology in zip(backbone.layers, topologies, strict=True):
        attention_input = _attention_input(topology, x, before)
        if confused == "attention" and before is not None:
            attention_input = before.without_routed() if attention_input is x else x
        normed = layer.input_layernorm(attention_input)
        a = layer.self_attn(hidden_states=normed, position_embeddings=rotary, attention_mask=mask)[0]
        y = x + a

        def normed_input(block: str, layer: Any = layer, topology: str = topology, x: torch.Tensor = x) -> torch.Tensor:
            chosen = _mlp_input(topology, block, x, y)  # noqa: B023  used before y changes
            if confused == "mlp":
                chosen = y if chosen is x else x  # noqa: B023
            return layer.post_attention_layernorm(chosen)

        before = _mlp_side(layer.mlp, x, a, normed_input)
        x = before.full()
        states.append(x)
    states[-1] = backbone.norm(states[-1])
    return states


def _mlp_side(mlp: nn.Module, x: torch.Tensor, a: torch.Tensor, normed_input: Any) -> Outputs:
    if not hasattr(mlp, "experts"):
        return Outputs(x=x, a=a, s=None, r=None, m=mlp(normed_input("mlp")))
    v = normed_input("routed")
    tokens_TD = v.reshape(-1, v.shape[-1])
    _, weights_TK, experts_TK = mlp.gate(tokens_TD)
    r = mlp.experts(tokens_TD, experts_TK, weights_TK).view_as(v)
    shared = getattr(mlp, "shared_experts", None)
    return Outputs(x=x, a=a, s=None if shared is None else shared(normed_input("shared")), r=r, m=None)


def logits(model: Any, ids_BS: torch.Tensor, topologies: list[str], **arguments: Any) -> torch.Tensor:
    """Logits [B, S, V]; arguments as of `hidden_states`."""
    return model.lm_head(hidden_states(model, ids_BS, topologies, **arguments)[-1])


def greedy(model: Any, ids_BS: torch.Tensor, topologies: list[str], steps: int, mask_BS: torch.Tensor) -> torch.Tensor:
    """The prompt and `steps` more tokens, recomputed from the start for each one."""
    for _ in range(steps):
        following_B1 = logits(model, ids_BS, topologies, mask_BS=mask_BS)[:, -1].argmax(-1, keepdim=True)
        ids_BS = torch.cat((ids_BS, following_B1), 1)
        mask_BS = torch.cat((mask_BS, torch.ones_like(following_B1)), 1)
    return ids_BS
