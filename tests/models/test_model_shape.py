"""Sizes read off config.json against the weights of every family's own model."""

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from farskip.models.attach import layers_of
from farskip.models.family import families
from farskip.models.model_shape import _RULES, read_shape
from farskip.models.pretrained import save
from farskip.models.surgery import rewire
from farskip.models.testing_families import CASES, SMALL, build, family_of


def matrices(module: nn.Module | None) -> int:
    """Weights of a module's matrices; no norms, no biases."""
    if module is None:
        return 0
    return sum(p.numel() for name, p in module.named_parameters() if p.dim() > 1 and not name.endswith("bias"))


def write(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def config_of(case: str) -> dict[str, Any]:
    """config.json as transformers writes it."""
    chosen = CASES[case]
    family = family_of(chosen)
    config = build(chosen).config.to_diff_dict()
    return json.loads(json.dumps({**config, "architectures": [family.architecture]}, default=str))


@pytest.mark.parametrize("case", CASES)
def test_sizes_are_those_of_the_model(case: str, tmp_path: Path) -> None:
    family, model = family_of(CASES[case]), build(CASES[case])
    architecture, shape = read_shape(write(tmp_path, config_of(case)))
    sub_blocks = [family.sub_blocks(layer) for layer in layers_of(model)]
    assert architecture == family.architecture
    assert list(shape.blocks) == [each.blocks for each in sub_blocks]
    assert shape.hidden == model.config.hidden_size
    attention = sub_blocks[0].layer.self_attn
    assert shape.attention_in + shape.attention_whole + shape.attention_out == matrices(attention)
    assert shape.attention_out == attention.o_proj.weight.numel()
    for each in sub_blocks:
        if each.experts is None:
            assert shape.mlp == matrices(each.mlp_module)
        else:
            assert shape.expert * shape.num_experts == matrices(each.experts)
            shared = each.shared_expert
            assert shape.shared == matrices(shared)
    if all(each.experts is None for each in sub_blocks):
        assert shape.num_experts == shape.top_k == shape.expert == 0
    else:
        assert shape.top_k == CASES[case].config.get("num_experts_per_tok", CASES[case].config.get("moe_k", 2))


def test_every_family_has_a_rule() -> None:
    assert {family.architecture: family.model_type for family in families()} == {
        architecture: rule.model_type for architecture, rule in _RULES.items()
    }


def test_attention_products_of_latent_attention(tmp_path: Path) -> None:
    """4 heads with keys of 8 + 8 and values of 8."""
    assert read_shape(write(tmp_path, config_of("deepseek_v3")))[1].attention_width == 4 * (16 + 8)


@pytest.mark.parametrize("wiring", ["farskip", "ordinary"])
def test_a_rewired_checkpoint_has_the_sizes_of_its_original(wiring: str, tmp_path: Path) -> None:
    model = build(CASES["qwen3_moe"])
    save(rewire(model, wiring), tmp_path / "saved")
    (tmp_path / "plain").mkdir()
    plain = read_shape(write(tmp_path / "plain", config_of("qwen3_moe")))
    assert read_shape(tmp_path / "saved") == plain


def changed(**keys: Any) -> dict[str, Any]:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SMALL, **keys}
    return {key: value for key, value in config.items() if value != "absent"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (changed(architectures=["BertModel"]), "model architecture 'BertModel' is not supported; known: Deepseek"),
        (changed(architectures=None), "model architecture None is not supported"),
        (changed(model_type="mixtral"), "goes with model_type 'llama', but config.json says 'mixtral'; correct"),
        (changed(hidden_size="absent"), "config.json: hidden_size=None is no size; it has to be a whole number"),
        (changed(hidden_size=-3), "config.json: hidden_size=-3 is no size"),
        (
            changed(architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", mlp_only_layers=3),
            "config.json: argument of type 'int' is not",
        ),
        (changed(num_hidden_layers=True), "config.json: num_hidden_layers=True is no size"),
        (
            changed(architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3", kv_lora_rank=4)
            | {"qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4, "first_k_dense_replace": 99},
            "config.json: q_lora_rank is not there; add it, null where",
        ),
    ],
)
def test_what_is_no_such_config(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as raised:
        read_shape(write(tmp_path, config))
    assert message in str(raised.value)
    assert str(tmp_path) in str(raised.value)
