"""Small models, losses and routings for the tests of models and of expert parallelism.

Decides how small "tiny" is, and that nothing in a tiny model hides an error: weights are large enough for every stream
to differ, and no norm weight is 1 and no selection bias is 0.

Legend: B batch, S sequence, T tokens, K experts per token, E experts.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from farskip.stage import Routing

VOCABULARY = 97
NUM_EXPERTS = 8
TOP_K = 2
FAMILIES = ("qwen3_moe", "deepseek_v3")

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_experts_per_tok": TOP_K,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_FAMILY: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": NUM_EXPERTS,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
    },
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "n_routed_experts": NUM_EXPERTS,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 24,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "qk_nope_head_dim": 8,
    },
}


def tiny_config(family: str, **changes: Any) -> Any:
    """A config of a family: four layers of width 32, the first one dense, eight experts, two per token.

    Args:
        family: ``qwen3_moe`` (no shared expert) or ``deepseek_v3`` (one).
        **changes: keys of the config to set otherwise.
    """
    import transformers

    kind = {"qwen3_moe": transformers.Qwen3MoeConfig, "deepseek_v3": transformers.DeepseekV3Config}[family]
    return kind(**{**_COMMON, **_FAMILY[family], **changes})


def tiny_model(family: str, *, seed: int = 0, attention: str = "sdpa", **changes: Any) -> Any:
    """A randomly initialized model in training mode; equal for equal arguments.

    Args:
        family: see `tiny_config`.
        seed: of all weights.
        attention: ``sdpa`` or ``eager``.
        **changes: keys of the config to set otherwise.
    """
    import transformers

    kind = {"qwen3_moe": transformers.Qwen3MoeForCausalLM, "deepseek_v3": transformers.DeepseekV3ForCausalLM}[family]
    torch.manual_seed(seed)
    model = kind._from_config(tiny_config(family, **changes), attn_implementation=attention)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("norm.weight"):
                tensor.add_(0.3 * torch.randn_like(tensor))
            elif name.endswith("e_score_correction_bias"):
                tensor.add_(0.1 * torch.randn_like(tensor))
    return model.train()


def token_ids(batch: int, length: int, *, seed: int = 1) -> torch.Tensor:
    """Random tokens int64 [B, S], none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def next_token_loss(logits_BSV: torch.Tensor, ids_BS: torch.Tensor, num_targets: int | None = None) -> torch.Tensor:
    """Summed cross-entropy of the next tokens over `num_targets`; over the targets here if None."""
    targets = ids_BS[:, 1:].reshape(-1)
    logits = logits_BSV[:, :-1].reshape(targets.numel(), -1)
    return F.cross_entropy(logits, targets, reduction="sum") / (num_targets or targets.numel())


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every gradient by parameter name; what has none is left out."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def run_backward(model: Any, ids_BS: torch.Tensor, **arguments: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits [B, S, V] of one forward pass and the gradients of its loss; earlier gradients are dropped."""
    model.zero_grad()
    logits_BSV = model(ids_BS, **arguments).logits
    next_token_loss(logits_BSV, ids_BS).backward()
    return logits_BSV.detach(), gradients(model)


def forced_routing(kind: str, tokens_per_rank: int) -> Callable[[int, Routing, bool], Routing] | None:
    """A routing hook of the executor that overrides which experts are chosen; their weights stay the router's.

    Args:
        kind: ``free``: the router's choice (None). ``balanced``: every expert equally often. ``one_expert``: all tokens
            to experts 0 and 1, the first of which gets one slot of each. ``idle_expert``: expert 3 gets none.
            ``idle_rank``: the second half of the experts gets none.
        tokens_per_rank: tokens after which the choices repeat, so that a batch of several ranks is routed as on each.
    """
    experts = {
        "free": None,
        "balanced": range(NUM_EXPERTS),
        "one_expert": (0, 1),
        "idle_expert": [expert for expert in range(NUM_EXPERTS) if expert != 3],
        "idle_rank": range(NUM_EXPERTS // 2),
    }[kind]
    if experts is None:
        return None
    allowed = torch.tensor(list(experts))

    def hook(layer: int, routing: Routing, recomputing: bool) -> Routing:
        num_slots, top_k = routing.experts_TK.numel(), routing.experts_TK.shape[1]
        slots = torch.arange(num_slots) % (tokens_per_rank * top_k) + layer
        experts_TK = allowed[slots % allowed.numel()].view_as(routing.experts_TK)
        return replace(routing, experts_TK=experts_TK)

    return hook
