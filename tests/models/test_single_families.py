"""What single families do besides the conformance suite: noise, masks and quantized checkpoints of their own."""

import copy
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import farskip
from farskip.models.surgery import rewire
from farskip.models.testing_families import CASES, build
from farskip.models.testing_models import run_backward, token_ids
from farskip.testing import assert_equal_bits

LENGTH = 9


def test_mixtral_draws_its_noise_like_the_untouched_model() -> None:
    untouched = build(CASES["mixtral"], router_jitter_noise=0.3)
    ours = rewire(copy.deepcopy(untouched), "ordinary")
    ids, results = token_ids(2, LENGTH), []
    for model in (untouched, ours):
        torch.manual_seed(3)
        results.append(run_backward(model, ids))
    assert_equal_bits(results[1][0], results[0][0])
    assert_equal_bits(results[1][1], results[0][1])
    calm = build(CASES["mixtral"])
    assert not torch.allclose(results[0][0], calm(ids).logits, atol=1e-3)
    assert_equal_bits(ours.eval()(ids).logits, calm.eval()(ids).logits)


def test_gpt_oss_needs_masks_of_its_own_for_packed_batches() -> None:
    """The control: called with position ids alone, its documents see each other. Once not, `packed_masks` can go."""
    untouched, ids, others = build(CASES["gpt_oss"]).eval(), token_ids(1, 12), token_ids(1, 12, seed=2)
    others[:, 5:] = ids[:, 5:]
    packed = torch.cat([torch.arange(5), torch.arange(7)]).unsqueeze(0)
    with torch.no_grad():
        first, second = (untouched(part, position_ids=packed, use_cache=False).logits[:, 5:] for part in (ids, others))
    assert not torch.allclose(first, second, atol=1e-3)


def save_quantized(folder: Path, method: str) -> None:
    """A GPT-OSS checkpoint as it is published: experts in blocks of 4-bit numbers with a scale each."""
    build(CASES["gpt_oss"], intermediate_size=64).to(torch.bfloat16).save_pretrained(folder)
    tensors, generator = {}, torch.Generator().manual_seed(0)
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inputs, outputs = tensor.shape
            shape = (experts, outputs, inputs // 32)
            tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
            tensors[f"{name}_scales"] = torch.randint(122, 125, shape, dtype=torch.uint8, generator=generator)
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    plain = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": method, "modules_to_not_convert": plain}
    (folder / "config.json").write_text(json.dumps(config))


def test_a_quantized_checkpoint_is_undone_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_quantized(tmp_path / "model", "awq")
    with pytest.raises(ValueError, match=r"load .*model: the checkpoint is quantized \('awq'\), and only fp8 and"):
        farskip.load(tmp_path / "model")
    save_quantized(tmp_path / "model", "mxfp4")
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(RuntimeError, match=r"load .*model: undoing the quantization \('mxfp4'\) needs accelerate"):
            farskip.load(tmp_path / "model")


def test_a_published_gpt_oss_checkpoint_loads_and_is_saved_plain(tmp_path: Path) -> None:
    save_quantized(tmp_path / "model", "mxfp4")
    model, ids = farskip.load(tmp_path / "model", "farskip"), token_ids(2, LENGTH)
    assert {parameter.dtype for parameter in model.parameters()} <= {torch.bfloat16, torch.float32}
    farskip.save(model, tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "quantization_config" not in config
    assert_equal_bits(farskip.load(tmp_path / "again")(ids).logits, model(ids).logits)
