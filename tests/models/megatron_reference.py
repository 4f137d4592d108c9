"""The equations of `two_stream_reference`, written out over the modules of a stock megatron-core GPTModel.

It imports nothing of this project. Megatron's exchanges between ranks block; everything happens in program order.

Legend: x full stream at a layer's entry, a attention, s shared, r routed experts, m dense MLP; [S, B, D] throughout.
"""

from types import ModuleType
from typing import Any

import torch


def logits(
    equations: ModuleType, model: Any, ids_BS: torch.Tensor, mask: torch.Tensor, topologies: list[str]
) -> torch.Tensor:
    """Logits [B, S, V].

    Args:
        equations: `two_stream_reference`.
        model: a GPTModel from a stock spec.
        ids_BS: int64 tokens.
        mask: True where attention is not allowed.
        topologies: one per layer.
    """
    positions_BS = torch.arange(ids_BS.shape[1]).expand(ids_BS.shape)
    x = model.embedding(input_ids=ids_BS, position_ids=positions_BS)
    rotary = None if model.config.multi_latent_attention else model.rotary_pos_emb(ids_BS.shape[1])
    before = None
    for layer, topology in zip(model.decoder.layers, topologies, strict=True):
        normed = layer.input_layernorm(equations._attention_input(topology, x, before))
        a, bias = layer.self_attention(normed, attention_mask=mask, rotary_pos_emb=rotary)
        a = a if bias is None else a + bias
        v = {
            block: layer.pre_mlp_layernorm(equations._mlp_input(topology, block, x, x + a))
            for block in ("mlp", "shared", "routed")
        }
        if hasattr(layer.mlp, "experts"):
            r, s = routed(layer.mlp, v["routed"]), layer.mlp.shared_experts_compute(v["shared"])
            before = equations.Outputs(x=x, a=a, s=s, r=r, m=None)
        else:
            m, bias = layer.mlp(v["mlp"])
            before = equations.Outputs(x=x, a=a, s=None, r=None, m=m if bias is None else m + bias)
        x = before.full()
    x = model.decoder.final_layernorm(x)
    return model.output_layer(x)[0].transpose(0, 1)


def routed(moe: Any, v: torch.Tensor) -> torch.Tensor:
    """The routed experts, without the shared one."""
    rows, weights = moe.preprocess(v, *moe.route(v))
    output, _ = moe.routed_experts_compute(*moe.dispatch(rows, weights))
    return moe.postprocess(moe.combine(output), None)
