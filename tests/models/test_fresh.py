"""A model to train from scratch: the same everywhere, of the size that was asked for, or refused in one line."""

import pytest
import torch

from farskip.models.fresh import build_model, family_of_type
from farskip.models.testing_models import FAMILIES, tiny_config

SETTINGS = ("hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers", "num_attention_heads")


def settings(family: str) -> dict[str, object]:
    config = tiny_config(family)
    more = {
        "qwen3_moe": ("num_key_value_heads", "num_experts", "num_experts_per_tok", "head_dim"),
        "deepseek_v3": (
            *("num_key_value_heads", "n_routed_experts", "num_experts_per_tok", "n_group", "topk_group"),
            *("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"),
        ),
    }[family]
    return {key: getattr(config, key) for key in (*SETTINGS, *more)}


def build(family: str, *, seed: int = 0, **changes: object) -> torch.nn.Module:
    return build_model(family, {**settings(family), **changes}, vocab_size=61, end_of_document_id=7, seed=seed)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_what_was_asked_for(family: str) -> None:
    model = build(family)
    assert type(model).__name__ == family_of_type(family).architecture
    for key, value in settings(family).items():
        assert getattr(model.config, key) == value
    assert model.get_input_embeddings().weight.shape == (61, 32)
    assert model.config.eos_token_id == 7
    assert model.config.bos_token_id is None and model.config.pad_token_id is None


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_depend_on_the_seed_alone(family: str) -> None:
    torch.manual_seed(1)
    one = build(family).state_dict()
    after_one = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after_one)  # the caller's generator is untouched
    torch.manual_seed(2)
    again, other = build(family).state_dict(), build(family, seed=1).state_dict()
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


BAD = {
    "key": ({"hiden_size": 3}, r"model\.config has keys that .* does not know: hiden_size"),
    "type": ({"hidden_size": "big"}, r"model\.config does not make a .*: .*hidden_size"),
    "no layers": ({"num_hidden_layers": 0}, r"model\.config\.num_hidden_layers=0 is too small; use at least 1"),
    "negative": (
        {"moe_intermediate_size": -8},
        r"model\.config\.moe_intermediate_size=-8 is too small; use at least 1",
    ),
    "heads": ({"num_attention_heads": 3, "num_key_value_heads": 2}, "num_attention_heads=3 is no multiple of num_key"),
    "too many experts per token": ({"num_experts_per_tok": 9}, "num_experts_per_tok=9 must be at least 1 and at most"),
    "no experts per token": ({"num_experts_per_tok": 0}, "num_experts_per_tok=0 must be at least 1"),
}


@pytest.mark.parametrize(("changes", "answer"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_cannot_be_built(family: str, changes: dict[str, object], answer: str) -> None:
    with pytest.raises(ValueError, match=answer) as caught:
        build(family, **changes)
    assert "\n" not in str(caught.value)


def test_an_unknown_family() -> None:
    with pytest.raises(
        ValueError, match=r"model\.family='nothing' is not supported; use one of .*deepseek_v3.*qwen3_moe"
    ):
        family_of_type("nothing")
