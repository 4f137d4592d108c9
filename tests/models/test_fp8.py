"""Checkpoints in fp8: what is loaded is what their blocks and scales say, whole or a rank's part of it."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import farskip
from farskip.launch.main import main
from farskip.models.testing_families import CASES, build
from farskip.models.testing_models import token_ids
from farskip.parallel.mesh import build_mesh
from farskip.testing import assert_equal_bits

if TYPE_CHECKING:
    from farskip.testing import RankPool

BLOCK = (24, 10)
"""Divides no matrix of the tiny models, in rows or columns."""
LARGEST = torch.finfo(torch.float8_e4m3fn).max
PLAIN = re.compile(r"norm|embed_tokens|lm_head|mlp\.gate\.|eh_proj")
HEAD = "model.layers.4.mlp.up_proj.weight"
"""A matrix of an MTP head."""


def quantized(weight_RC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A matrix in fp8, its scales, and the matrix that the two stand for, in fp64: block by block."""
    rows, columns = weight_RC.shape
    stored_RC, plain_RC = weight_RC.to(torch.float8_e4m3fn), weight_RC.double()
    scales = torch.empty(-(-rows // BLOCK[0]), -(-columns // BLOCK[1]))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            here = (slice(i * BLOCK[0], (i + 1) * BLOCK[0]), slice(j * BLOCK[1], (j + 1) * BLOCK[1]))
            scales[i, j] = weight_RC[here].abs().max() / LARGEST
            stored_RC[here] = (weight_RC[here] / scales[i, j]).to(torch.float8_e4m3fn)
            plain_RC[here] = stored_RC[here].double() * scales[i, j].double()
    return stored_RC, scales, plain_RC


def source(folder: Path, case: str = "deepseek_v3", *, head: bool = False) -> dict[str, torch.Tensor]:
    """Write a checkpoint in fp8. Returns what its tensors stand for, matrices in fp64."""
    build(CASES[case]).to(torch.bfloat16).save_pretrained(folder)
    stored, plain = {}, {}
    tensors = load_file(folder / "model.safetensors")
    if head:
        tensors[HEAD] = torch.randn(48, 32, generator=torch.Generator().manual_seed(5))
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and not PLAIN.search(name):
            stored[name], stored[name + "_scale_inv"], plain[name] = quantized(tensor.float())
        else:
            stored[name] = plain[name] = tensor
    assert len(stored) > len(plain) + 20
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    quantization = {"quant_method": "fp8", "weight_block_size": list(BLOCK), "activation_scheme": "dynamic"}
    edit_config(folder, quantization_config=quantization, **({"num_nextn_predict_layers": 1} if head else {}))
    return plain


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def rounded(plain: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """In one dtype by way of fp32, in which products are taken; but for the bias that transformers keeps in fp32."""
    return {
        name: tensor.float() if name.endswith("correction_bias") else tensor.float().to(dtype)
        for name, tensor in plain.items()
    }


@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize("case", ["deepseek_v3", "qwen3_moe"])
def test_what_is_loaded_is_what_blocks_and_scales_say(case: str, dtype: torch.dtype | None, tmp_path: Path) -> None:
    plain = source(tmp_path / "fp8", case)
    model = farskip.load(tmp_path / "fp8", "farskip", dtype=dtype)
    farskip.save(model, tmp_path / "plain")
    written = load_file(tmp_path / "plain" / "model.safetensors")
    assert_equal_bits(written, rounded(plain, dtype or torch.bfloat16))
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    again, ids = farskip.load(tmp_path / "plain"), token_ids(2, 9)
    for parameter in (*again.parameters(), *model.parameters()):
        parameter.data = parameter.data.clone()
    assert_equal_bits(again(ids).logits, model(ids).logits)


def test_matrices_of_mtp_heads_are_written_plain(tmp_path: Path) -> None:
    plain = source(tmp_path / "fp8", head=True)
    farskip.save(farskip.load(tmp_path / "fp8"), tmp_path / "plain")
    written = load_file(tmp_path / "plain" / "model-mtp.safetensors")
    assert_equal_bits(written, {HEAD: rounded(plain, torch.bfloat16)[HEAD]})


def loads_its_part(folder: str, ep: int, tp: int) -> None:
    mesh = build_mesh(ep, tp=tp)
    whole = farskip.parallelize(farskip.load(folder), mesh)
    sliced = farskip.load(folder, mesh=mesh)
    assert_equal_bits(dict(sliced.state_dict()), dict(whole.state_dict()))


@pytest.mark.parametrize(("ep", "tp"), [(2, 1), (1, 2)])
def test_a_rank_loads_its_part(ep: int, tp: int, rank_pool: "RankPool", tmp_path: Path) -> None:
    source(tmp_path / "fp8")
    rank_pool.run(loads_its_part, 2, str(tmp_path / "fp8"), ep, tp)


def test_a_converted_checkpoint_stays_in_fp8_and_loads(tmp_path: Path) -> None:
    source(tmp_path / "fp8")
    assert main(["convert", str(tmp_path / "fp8"), str(tmp_path / "rewired"), "--wiring", "ladder"]) == 0
    assert json.loads((tmp_path / "rewired" / "config.json").read_text())["quantization_config"]
    rewired, model = farskip.load(tmp_path / "rewired"), farskip.load(tmp_path / "fp8", "ladder")
    assert farskip.wiring_of(rewired) == farskip.wiring_of(model)
    assert_equal_bits(dict(rewired.state_dict()), dict(model.state_dict()))


ATTENTION = "model.layers.0.self_attn.o_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({ATTENTION + "_scale_inv": None}, f"fp8 tensor {ATTENTION}: {ATTENTION}_scale_inv is not there"),
        ({ATTENTION: None}, f"{ATTENTION}_scale_inv scales no fp8 tensor"),
        ({ATTENTION + "_scale_inv": torch.ones(1, 1)}, "goes with scales of shape .* in F32 or BF16 or F16, but"),
        ({ATTENTION + "_scale_inv": torch.ones(2, 4, dtype=torch.uint8)}, "_scale_inv is U8 .2, 4.; give a checkpoint"),
    ],
    ids=["no scales", "no matrix", "another shape", "another dtype"],
)
def test_scales_that_do_not_fit_are_refused(
    change: dict[str, torch.Tensor | None], message: str, tmp_path: Path
) -> None:
    source(tmp_path / "fp8")
    tensors: dict[str, Any] = {**load_file(tmp_path / "fp8" / "model.safetensors"), **change}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, tmp_path / "fp8" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"load .*fp8: .*{message}"):
        farskip.load(tmp_path / "fp8")


@pytest.mark.parametrize("dtype", ["auto", "float8_e4m3fn", "half"])
def test_no_plain_dtype_is_refused(dtype: str, tmp_path: Path) -> None:
    source(tmp_path / "fp8")
    edit_config(tmp_path / "fp8", dtype=dtype)
    with pytest.raises(ValueError, match=f"becomes one of bfloat16, float16, float32, not '{dtype}'"):
        farskip.load(tmp_path / "fp8")


@pytest.mark.parametrize("block", [None, [128], [0, 128], "128"])
def test_another_form_of_fp8_is_refused(block: Any, tmp_path: Path) -> None:
    source(tmp_path / "fp8")
    edit_config(tmp_path / "fp8", quantization_config={"quant_method": "fp8", "weight_block_size": block})
    with pytest.raises(ValueError, match=r"fp8 with weight_block_size .*, and only blocks of .* are undone"):
        farskip.load(tmp_path / "fp8")
