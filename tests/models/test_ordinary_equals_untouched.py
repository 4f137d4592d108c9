"""Ordinary wiring under the executor equals the untouched transformers model, bit for bit."""

import copy
from typing import Any

import pytest
import torch

from farskip.models.attach import attachment_of
from farskip.models.surgery import rewire, wiring_of
from farskip.models.testing_models import next_token_loss, run_backward, tiny_model, token_ids
from farskip.testing import assert_equal_bits

VARIANTS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"family": "qwen3_moe"},
    "qwen3_moe-all-dense": {"family": "qwen3_moe", "mlp_only_layers": [0, 1, 2, 3]},
    "qwen3_moe-every-second-dense": {"family": "qwen3_moe", "mlp_only_layers": [], "decoder_sparse_step": 2},
    "qwen3_moe-raw-weights": {"family": "qwen3_moe", "norm_topk_prob": False},
    "qwen3_moe-tied": {"family": "qwen3_moe", "tie_word_embeddings": True},
    "qwen3_moe-one-layer": {"family": "qwen3_moe", "num_hidden_layers": 1, "mlp_only_layers": []},
    "deepseek_v3": {"family": "deepseek_v3"},
    "deepseek_v3-no-q-lora": {"family": "deepseek_v3", "q_lora_rank": None},
    "deepseek_v3-no-groups": {"family": "deepseek_v3", "n_group": 1, "topk_group": 1},
    "deepseek_v3-raw-weights": {"family": "deepseek_v3", "norm_topk_prob": False, "routed_scaling_factor": 1.0},
    "deepseek_v3-two-shared": {"family": "deepseek_v3", "n_shared_experts": 2, "first_k_dense_replace": 2},
    "deepseek_v3-tied": {"family": "deepseek_v3", "tie_word_embeddings": True},
}
variants = pytest.mark.parametrize("variant", VARIANTS)
attentions = pytest.mark.parametrize("attention", ["sdpa", "eager"])


def pair(variant: str, attention: str = "sdpa", **changes: Any) -> tuple[Any, Any]:
    """The untouched model, and its copy under the executor."""
    untouched = tiny_model(**VARIANTS[variant], attention=attention, **changes)
    return untouched, rewire(copy.deepcopy(untouched), "ordinary")


@attentions
@variants
def test_logits_and_gradients(variant: str, attention: str) -> None:
    untouched, ours = pair(variant, attention)
    ids = token_ids(2, 11)
    expected_logits, expected = run_backward(untouched, ids)
    logits, gradients = run_backward(ours, ids)
    assert_equal_bits(logits, expected_logits)
    assert_equal_bits(gradients, expected)
    assert gradients.keys() == {name for name, _ in untouched.named_parameters()}


@attentions
@variants
def test_every_hidden_state(variant: str, attention: str) -> None:
    untouched, ours = pair(variant, attention)
    expected, seen = (model(token_ids(2, 7), output_hidden_states=True) for model in (untouched, ours))
    assert len(seen.hidden_states) == len(expected.hidden_states) == untouched.config.num_hidden_layers + 1
    for ours_BSD, theirs_BSD in zip(seen.hidden_states, expected.hidden_states, strict=True):
        assert_equal_bits(ours_BSD, theirs_BSD)
    assert_equal_bits(seen.logits, expected.logits)


@variants
def test_hidden_states_asked_for_by_the_config(variant: str) -> None:
    untouched, ours = pair(variant)
    for model in (untouched, ours):
        model.config.output_hidden_states = True
    for ours_BSD, theirs_BSD in zip(
        ours(token_ids(1, 5)).hidden_states, untouched(token_ids(1, 5)).hidden_states, strict=True
    ):
        assert_equal_bits(ours_BSD, theirs_BSD)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_attention_weights(family: str) -> None:
    untouched, ours = pair(family, "eager")
    expected, seen = (model(token_ids(2, 7), output_attentions=True) for model in (untouched, ours))
    assert len(seen.attentions) == 4
    for mine, theirs in zip(seen.attentions, expected.attentions, strict=True):
        assert_equal_bits(mine, theirs)


def test_router_logits_and_their_loss() -> None:
    """Qwen3-MoE's own balancing loss: its hooks on the router still see every layer."""
    untouched, ours = pair("qwen3_moe")
    ids = token_ids(2, 7)
    for model in (untouched, ours):
        model.zero_grad()
        model(ids, labels=ids, output_router_logits=True).loss.backward()
    expected, seen = (model(ids, output_router_logits=True).router_logits for model in (untouched, ours))
    assert len(seen) == len(expected) == 3
    for mine, theirs in zip(seen, expected, strict=True):
        assert_equal_bits(mine, theirs)
    for (name, parameter), theirs in zip(ours.named_parameters(), untouched.parameters(), strict=True):
        assert_equal_bits(parameter.grad, theirs.grad, name=name)


@attentions
@variants
def test_generated_tokens(variant: str, attention: str) -> None:
    untouched, ours = (model.eval() for model in pair(variant, attention))
    ids = token_ids(3, 6)
    ids[0, :3] = ids[1, :1] = untouched.config.pad_token_id
    mask = (ids != untouched.config.pad_token_id).long()
    expected, seen = (
        model.generate(ids, attention_mask=mask, max_new_tokens=16, do_sample=False, eos_token_id=None)
        for model in (untouched, ours)
    )
    assert seen.shape == (3, 22)
    assert torch.equal(seen, expected)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_bf16(family: str) -> None:
    untouched, ours = (model.to(torch.bfloat16) for model in pair(family))
    ids = token_ids(2, 7)
    expected_logits, expected = run_backward(untouched, ids)
    logits, gradients = run_backward(ours, ids)
    assert_equal_bits(logits, expected_logits)
    assert_equal_bits(gradients, expected)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_autocast(family: str) -> None:
    untouched, ours = pair(family)
    with torch.autocast("cpu", torch.bfloat16):
        expected_logits, expected = run_backward(untouched, token_ids(2, 7))
        logits, gradients = run_backward(ours, token_ids(2, 7))
    assert_equal_bits(logits, expected_logits)
    assert_equal_bits(gradients, expected)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_attention_dropout_draws_the_same_numbers(family: str) -> None:
    untouched, ours = pair(family, "eager", attention_dropout=0.2)
    results = []
    for model in (untouched, ours):
        torch.manual_seed(3)
        results.append(run_backward(model, token_ids(2, 7)))
    assert_equal_bits(results[1][0], results[0][0])
    assert_equal_bits(results[1][1], results[0][1])


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_labels_and_tuple_outputs(family: str) -> None:
    untouched, ours = pair(family)
    ids = token_ids(2, 7)
    assert_equal_bits(ours(ids, labels=ids).loss, untouched(ids, labels=ids).loss)
    assert_equal_bits(ours(ids, return_dict=False)[0], untouched(ids, return_dict=False)[0])


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_names_of_weights_stay(family: str) -> None:
    untouched, ours = pair(family)
    assert list(ours.state_dict()) == list(untouched.state_dict())
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in untouched.named_modules()]


def test_an_untouched_model_is_ordinary_and_unattached() -> None:
    model = tiny_model("qwen3_moe")
    assert wiring_of(model).name == "ordinary" and attachment_of(model) is None


def test_going_back_to_ordinary_gives_the_untouched_model() -> None:
    untouched, ours = pair("deepseek_v3")
    ids = token_ids(2, 7)
    rewire(ours, "farskip")
    assert not torch.equal(ours(ids).logits, untouched(ids).logits)
    rewire(ours, "ordinary")
    assert_equal_bits(ours(ids).logits, untouched(ids).logits)
    assert_equal_bits(next_token_loss(ours(ids).logits, ids), next_token_loss(untouched(ids).logits, ids))
