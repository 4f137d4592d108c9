"""A packed batch gives each document the logits that it gets alone: what the data pipeline relies on in transformers.

transformers cuts attention where position ids restart, if the model is called with position ids, without an attention
mask and without a cache. The controls show that the comparison can fail: each drops one of these conditions.
"""

from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

# Rows of a batch, each cut into documents of these lengths: other cuts in each row, one row uncut, one-token documents.
LENGTHS = [[5, 1, 10], [1, 1, 7, 7], [16], [15, 1]]
VOCAB_SIZE = 97
# fp32 on CPU: max |dlogit| <= 5e-5 * max(1, max |ref|); other shapes of matrix products sum in another order.
RELATIVE_TOLERANCE = 5e-5

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def tiny_model(family: str, attention: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if family == "qwen3_moe":
        config: Any = Qwen3MoeConfig(
            **SMALL, num_key_value_heads=2, head_dim=8, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2
        )
    else:
        config = DeepseekV3Config(
            **SMALL,
            num_key_value_heads=4,
            moe_intermediate_size=16,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            n_shared_experts=1,
            first_k_dense_replace=1,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_nope_head_dim=8,
            qk_rope_head_dim=8,
            v_head_dim=8,
        )
    config._attn_implementation = attention
    model = (Qwen3MoeForCausalLM if family == "qwen3_moe" else DeepseekV3ForCausalLM)(config)
    return model.float().eval()


def packed_batch(lengths: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    input_ids_BS = torch.randint(VOCAB_SIZE, (len(lengths), sum(lengths[0])), generator=generator)
    position_ids_BS = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    return input_ids_BS, position_ids_BS


def logits_of_documents_alone(model: PreTrainedModel, input_ids_BS: torch.Tensor) -> torch.Tensor:
    rows = []
    for row_S, lengths in zip(input_ids_BS, LENGTHS, strict=True):
        documents = [model(input_ids=ids[None], use_cache=False).logits[0] for ids in row_S.split(lengths)]
        rows.append(torch.cat(documents))
    return torch.stack(rows)


def error_and_bound(actual: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    bound = RELATIVE_TOLERANCE * max(1.0, float(reference.abs().max()))
    return float((actual - reference).abs().max()), bound


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
@torch.no_grad()
def test_packed_logits_equal_those_of_the_documents_alone(family: str, attention: str) -> None:
    model = tiny_model(family, attention)
    input_ids_BS, position_ids_BS = packed_batch(LENGTHS)
    reference = logits_of_documents_alone(model, input_ids_BS)
    packed = model(input_ids=input_ids_BS, position_ids=position_ids_BS, use_cache=False).logits
    error, bound = error_and_bound(packed, reference)
    assert error <= bound


@pytest.mark.parametrize(
    "dropped", ["position_ids", "no_attention_mask", "no_cache"], ids=["no position ids", "attention mask", "cache"]
)
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
@torch.no_grad()
def test_each_condition_is_needed(family: str, dropped: str) -> None:
    # If one of these turns red, transformers has lifted the condition and callers may be relaxed.
    model = tiny_model(family, "sdpa")
    input_ids_BS, position_ids_BS = packed_batch(LENGTHS)
    reference = logits_of_documents_alone(model, input_ids_BS)
    arguments: dict[str, Any] = {"position_ids": position_ids_BS, "use_cache": False}
    if dropped == "position_ids":
        del arguments["position_ids"]
    elif dropped == "no_attention_mask":
        arguments["attention_mask"] = torch.ones_like(input_ids_BS)
    else:
        del arguments["use_cache"]  # the default of the configuration is a cache
    crossed = model(input_ids=input_ids_BS, **arguments).logits
    error, bound = error_and_bound(crossed, reference)
    assert error > 10 * bound


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_no_gradient_crosses_a_document_boundary(family: str) -> None:
    model = tiny_model(family, "sdpa").train()
    input_ids_BS, position_ids_BS = packed_batch(LENGTHS)
    embeddings = model.get_input_embeddings()(input_ids_BS).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, position_ids=position_ids_BS, use_cache=False).logits
    logits[0, 6:].pow(2).sum().backward()  # the third document of the first row
    assert embeddings.grad is not None
    assert embeddings.grad[0, :6].abs().max() == 0 and embeddings.grad[1:].abs().max() == 0
    assert (embeddings.grad[0, 6:].abs().amax(dim=-1) > 0).all()
