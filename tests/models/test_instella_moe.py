"""Instella-MoE: its gate, its softmax scale, its config keys, and checkpoints that only say half of it."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import farskip
from farskip.models.hf_instella_moe import FAMILY, InstellaKeys, instella_class
from farskip.models.testing_families import CASES, build
from farskip.models.testing_models import run_backward, token_ids
from farskip.testing import assert_close, assert_equal_bits
from farskip.wiring import Wiring

CASE = CASES["instella_moe"]
KEYS = InstellaKeys()

PUBLISHED: dict[str, Any] = {
    "architectures": ["InstellaMoEForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 128896,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 96,
    "qk_rope_head_dim": 32,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "tie_word_embeddings": False,
    "max_position_embeddings": 32768,
    "rope_theta": 8000000.0,
    "rope_interleave": True,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    },
    "farskip": True,
    "gated_attention": True,
}
"""The 16B model's config, from the facts of its report."""


def published_model() -> Any:
    """The 16B model without memory for its weights."""
    from transformers import AutoConfig

    with torch.device("meta"):
        return instella_class()(AutoConfig.for_model(**PUBLISHED))


def test_the_published_model_has_its_tensors_and_softmax_scale() -> None:
    model = published_model()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    gates = [f"model.layers.{layer}.self_attn.gate_proj.weight" for layer in range(27)]
    assert all(shapes[name] == (16 * 128, 2048) for name in gates)
    assert shapes["model.layers.0.mlp.gate_proj.weight"] == (10944, 2048)
    assert shapes["model.layers.26.mlp.shared_experts.gate_proj.weight"] == (2 * 1408, 2048)
    for layer in model.model.layers:
        # The published figure is rounded to six digits.
        assert layer.self_attn.scaling == pytest.approx(0.165627, abs=5e-7)
        assert layer.self_attn.scaling == pytest.approx(128**-0.5 * (0.1 * math.log(40) + 1) ** 2)
    rotary = model.model.rotary_emb
    assert rotary.attention_scaling == 1.0 and rotary.inv_freq.shape == (16,)
    others = {name for name in shapes if name not in gates}
    from transformers import AutoConfig, DeepseekV3ForCausalLM

    with torch.device("meta"):
        plain = DeepseekV3ForCausalLM(AutoConfig.for_model(**PUBLISHED))
    assert others == {name for name, _ in plain.named_parameters()}


def gated_by_hooks(model: Any) -> Any:
    """The same function another way: transformers' own DeepSeek-V3, the gate in a hook on the output projection."""
    from transformers import DeepseekV3ForCausalLM

    plain = DeepseekV3ForCausalLM._from_config(copy.deepcopy(model.config), attn_implementation="sdpa")
    for layer, theirs in zip(plain.model.layers, model.model.layers, strict=True):
        attention = layer.self_attn
        attention.gate_proj = copy.deepcopy(theirs.self_attn.gate_proj)
        seen: list[torch.Tensor] = []
        attention.register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.append(kwargs["hidden_states"]), with_kwargs=True
        )
        attention.o_proj.register_forward_pre_hook(
            lambda module, args, seen=seen, gate=attention.gate_proj: args[0] * torch.sigmoid(gate(seen.pop()))
        )
    plain.load_state_dict(model.state_dict())
    return plain.train()


def test_the_gate_is_the_equation() -> None:
    model = build(CASE)
    plain, ids = gated_by_hooks(model), token_ids(2, 9)
    expected_logits, expected = run_backward(plain, ids)
    logits, gradients = run_backward(model, ids)
    assert_equal_bits(logits, expected_logits)
    # The gate's part of the input's gradient is added in another order.
    assert_close(gradients, expected, rel_norm=1e-4)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.gate_proj.weight.zero_()
    assert not torch.allclose(model(ids).logits, logits, atol=1e-3)


def test_a_changed_attention_implementation_does_not_lose_the_gate_silently() -> None:
    model = build(CASE)
    model.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match=r"left 0 times through the seam.*give it to from_pretrained instead"):
        model(token_ids(1, 4))


def test_eager_attention_is_the_parents() -> None:
    eager, sdpa = (
        instella_class()._from_config(build(CASE).config, attn_implementation=name) for name in ("eager", "sdpa")
    )
    eager.load_state_dict(sdpa.state_dict())
    assert_close(eager(token_ids(2, 9)).logits, sdpa(token_ids(2, 9)).logits, max_error=5e-5)
    weights = eager(token_ids(2, 9), output_attentions=True).attentions
    assert len(weights) == 4 and weights[0].shape == (2, 4, 9, 9)


# -- the config keys --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "name", "layers"),
    [
        ({"farskip": True}, "farskip", range(27)),
        ({}, "ordinary", ()),
        ({"farskip": False, "farskip_start_idx": 3}, "ordinary", ()),
        ({"farskip": True, "farskip_start_idx": 3, "farskip_end_idx": 5}, "farskip", (3, 4, 5)),
        ({"farskip": True, "farskip_start_idx": 0, "farskip_end_idx": 10000.0}, "farskip", range(27)),
        ({"farskip": True, "farskip_start_idx": 25, "farskip_end_idx": None}, "farskip", (25, 26)),
        ({"farskip": True, "attn_only_farskip": True}, "attn_only", range(27)),
        ({"farskip": True, "mlp_only_farskip": True, "farskip_end_idx": 0}, "mlp_only", (0,)),
        ({"farskip": True, "farskip_start_idx": 5, "farskip_end_idx": 3}, "ordinary", ()),
    ],
)
def test_what_the_keys_mean(keys: dict[str, Any], name: str, layers: Any) -> None:
    wiring = KEYS.read({"num_hidden_layers": 27, **keys})
    assert wiring == Wiring.named(name, 27, list(layers))
    written = KEYS.write(wiring)
    assert written is not None and set(written) <= set(KEYS.names)
    assert KEYS.read({"num_hidden_layers": 27, **written}) == wiring


@pytest.mark.parametrize("wiring", [Wiring.named("ladder", 4), Wiring.named("farskip", 4, [0, 2])], ids=str)
def test_what_the_keys_cannot_say(wiring: Wiring) -> None:
    assert KEYS.write(wiring) is None


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"attn_only_farskip": True, "mlp_only_farskip": True}, "at most one of them"),
        ({"farskip_start_idx": -1}, "farskip_start_idx=-1 is not a whole number"),
        ({"farskip_end_idx": 2.5}, r"farskip_end_idx=2\.5 is not a whole number"),
        ({"farskip_end_idx": "last"}, "farskip_end_idx='last' is not a whole number"),
    ],
)
def test_keys_that_make_no_sense_are_refused(keys: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        KEYS.read({"num_hidden_layers": 4, "farskip": True, **keys})


# -- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """As its authors publish it: architecture and keys are Instella's, the model type is DeepSeek-V3's, remote code."""
    build(CASE).save_pretrained(tmp_path / "model")
    edit_config(tmp_path / "model", lambda config: config.update(auto_map={"AutoModelForCausalLM": "remote.Instella"}))
    return tmp_path / "model"


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = config_of(folder)
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_a_published_checkpoint_loads_rewired(checkpoint: Path) -> None:
    model, ids = farskip.load(checkpoint), token_ids(2, 9)
    assert type(model).__name__ == "InstellaMoEForCausalLM"
    assert farskip.wiring_of(model) == Wiring.named("farskip", 4)
    assert_equal_bits(model(ids).logits, farskip.rewire(build(CASE).eval(), "farskip")(ids).logits)
    assert farskip.wiring_of(farskip.load(checkpoint, "ordinary")).name == "ordinary"
    edit_config(checkpoint, lambda config: config.update(farskip_start_idx=2, mlp_only_farskip=True))
    assert farskip.wiring_of(farskip.load(checkpoint)) == Wiring.named("mlp_only", 4, [2, 3])


def test_saving_writes_the_same_keys_back(checkpoint: Path, tmp_path: Path) -> None:
    farskip.save(farskip.load(checkpoint), tmp_path / "again")
    before, after = config_of(checkpoint), config_of(tmp_path / "again")
    assert before.pop("auto_map") != after.pop("auto_map")  # the authors' remote code, and ours
    assert after == before
    names, again = (set(load_file(folder / "model.safetensors")) for folder in (checkpoint, tmp_path / "again"))
    assert again == names


@pytest.mark.parametrize(("wiring", "layers"), [("farskip", "2:3"), ("attn_only", "all"), ("ordinary", None)])
def test_a_new_wiring_goes_into_the_keys(checkpoint: Path, tmp_path: Path, wiring: str, layers: str | None) -> None:
    model = farskip.load(checkpoint, wiring, layers)
    farskip.save(model, tmp_path / "again")
    config = config_of(tmp_path / "again")
    assert config["model_type"] == "deepseek_v3" and config["farskip"] is (wiring != "ordinary")
    assert farskip.wiring_of(farskip.load(tmp_path / "again")) == farskip.wiring_of(model)


def test_a_wiring_that_the_keys_cannot_say_is_recorded_as_for_any_family(checkpoint: Path, tmp_path: Path) -> None:
    model = farskip.load(checkpoint, "ladder")
    farskip.save(model, tmp_path / "again")
    config = config_of(tmp_path / "again")
    assert config["model_type"] == "farskip_deepseek_v3" and config["farskip"]["wiring"]["name"] == "ladder"
    assert not {name for name in KEYS.names if name != "farskip"} & config.keys()
    loaded = farskip.load(tmp_path / "again")
    assert farskip.wiring_of(loaded) == farskip.wiring_of(model)
    farskip.save(farskip.rewire(loaded, "farskip"), tmp_path / "back")
    assert config_of(tmp_path / "back")["model_type"] == "deepseek_v3"
    assert farskip.wiring_of(farskip.load(tmp_path / "back")) == Wiring.named("farskip", 4)


def test_missing_gates_are_refused(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["model.layers.2.self_attn.gate_proj.weight"]
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing tensors: model\.layers\.2\.self_attn\.gate_proj\.weight"):
        farskip.load(checkpoint)


@pytest.mark.parametrize("said", [None, True])
def test_a_plain_deepseek_that_claims_to_be_instella_is_refused(tmp_path: Path, said: bool | None) -> None:
    case = CASES["deepseek_v3"]
    build(case).save_pretrained(tmp_path / "model")
    keys = {} if said is None else {"gated_attention": said}
    edit_config(tmp_path / "model", lambda config: config.update(architectures=[FAMILY.architecture], **keys))
    with pytest.raises(ValueError, match=r"missing tensors: model\.layers\.0\.self_attn\.gate_proj\.weight"):
        farskip.load(tmp_path / "model")


def test_gates_that_the_config_denies_are_refused(checkpoint: Path) -> None:
    edit_config(checkpoint, lambda config: config.update(gated_attention=False))
    with pytest.raises(ValueError, match=r"unexpected tensors: model\.layers\.0\.self_attn\.gate_proj\.weight"):
        farskip.load(checkpoint)


def test_contradicting_keys_are_refused_with_the_folder(checkpoint: Path) -> None:
    edit_config(checkpoint, lambda config: config.update(attn_only_farskip=True, mlp_only_farskip=True))
    with pytest.raises(ValueError, match=r"load .*model: config\.json: attn_only_farskip and mlp_only_farskip"):
        farskip.load(checkpoint)
