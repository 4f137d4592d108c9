"""The two-stream reference for every family: the equations of two_stream_reference.py, the family's own sub-modules.

What transformers calls each decoder layer with (masks per kind of layer, rotary embeddings) is noted from a forward
pass of the untouched model. Nothing here is shared with the executor or the adapters.

Legend: B batch, S sequence, T = B*S tokens, E experts, D hidden; v the normed input of the MLP side.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from farskip.testing import load_beside

equations = load_beside(__file__, "two_stream_reference")


def layer_calls(model: Any, ids_BS: torch.Tensor, **arguments: Any) -> list[dict[str, Any]]:
    """The keyword arguments that each decoder layer of an untouched model is called with."""
    calls: list[dict[str, Any]] = []
    hooks = [
        layer.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(ids_BS, use_cache=False, **arguments)
    for hook in hooks:
        hook.remove()
    return calls


def hidden_states(
    model: Any, ids_BS: torch.Tensor, topologies: list[str], *, confused: str | None = None, **arguments: Any
) -> list[torch.Tensor]:
    """The full stream at the entry of every layer, and behind the final norm.

    Args:
        model: an untouched causal language model.
        ids_BS: int64 tokens.
        topologies: one per layer, names of two_stream_reference.py.
        confused: ``attention`` or ``mlp``: a wrong reference, in which that side reads the other stream.
        **arguments: what else the model is called with, such as an attention mask.
    """
    calls = layer_calls(model, ids_BS, **arguments)
    x = model.model.embed_tokens(ids_BS)
    before: Any = None
    states = [x]
    for layer, topology, call in zip(model.model.layers, topologies, calls, strict=True):
        attention_input = equations._attention_input(topology, x, before)
        if confused == "attention" and before is not None:
            attention_input = before.without_routed() if attention_input is x else x
        a = layer.self_attn(hidden_states=layer.input_layernorm(attention_input), **call)[0]
        y = x + a

        def v(block: str, layer: Any = layer, topology: str = topology, x: Any = x, y: Any = y) -> torch.Tensor:
            chosen = equations._mlp_input(topology, block, x, y)
            if confused == "mlp":
                chosen = y if chosen is x else x
            return layer.post_attention_layernorm(chosen)

        before = equations.Outputs(x=x, a=a, **mlp_side(layer, v))
        x = before.full()
        states.append(x)
    states[-1] = model.model.norm(states[-1])
    return states


def logits(model: Any, ids_BS: torch.Tensor, topologies: list[str], **arguments: Any) -> torch.Tensor:
    """Logits [B, S, V]; arguments as of `hidden_states`."""
    return model.lm_head(hidden_states(model, ids_BS, topologies, **arguments)[-1])


def greedy(model: Any, ids_BS: torch.Tensor, topologies: list[str], steps: int, mask_BS: torch.Tensor) -> torch.Tensor:
    """The prompt and `steps` more tokens, recomputed from the start for each one."""
    with torch.no_grad():
        for _ in range(steps):
            following_B1 = logits(model, ids_BS, topologies, attention_mask=mask_BS)[:, -1].argmax(-1, keepdim=True)
            ids_BS = torch.cat((ids_BS, following_B1), 1)
            mask_BS = torch.cat((mask_BS, torch.ones_like(following_B1)), 1)
    return ids_BS


def mlp_side(layer: nn.Module, v: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor | None]:
    """Shared s, routed r and dense m of one layer, each from its own input."""
    mlp: Any = layer.feed_forward if hasattr(layer, "feed_forward") else layer.mlp
    if not hasattr(mlp, "experts"):
        return {"s": None, "r": None, "m": mlp(v("mlp"))}
    shared = getattr(mlp, "shared_experts", None) or getattr(mlp, "shared_expert", None)
    s = None if shared is None else shared(v("shared"))
    if s is not None and hasattr(mlp, "shared_expert_gate"):
        s = s * torch.sigmoid(mlp.shared_expert_gate(v("shared")))
    return {"s": s, "r": routed(mlp, v("routed")), "m": None}


def routed(mlp: Any, v_BSD: torch.Tensor) -> torch.Tensor:
    """Routed experts; Llama-4's weigh their input, all others' their output."""
    tokens_TD = v_BSD.flatten(0, -2)
    if type(mlp).__name__ == "Llama4TextMoe":
        scores_TE, _ = mlp.router(tokens_TD)
        inputs_ETD = torch.stack([tokens_TD * scores_T1 for scores_T1 in scores_TE.split(1, dim=1)])
        return mlp.experts(inputs_ETD.flatten(0, 1)).view_as(inputs_ETD).sum(0).view_as(v_BSD)
    gate = mlp.router if hasattr(mlp, "router") else mlp.gate
    _, weights_TK, experts_TK = gate(tokens_TD)
    return mlp.experts(tokens_TD, experts_TK, weights_TK).view_as(v_BSD)
