"""Tensors of MTP heads: transformers drops them without a word; here they are carried to what is saved, or refused."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import farskip
from farskip.models.mtp_tensors import SHARD, carried_mtp_tensors
from farskip.models.surgery import rewire
from farskip.models.testing_families import CASES, build
from farskip.models.testing_models import token_ids
from farskip.testing import assert_equal_bits

INDEX = "model.safetensors.index.json"

_LAYER = "model.layers.4."
HEADS = {
    "deepseek_v3": [_LAYER + name for name in ("eh_proj.weight", "enorm.weight", "shared_head.head.weight")]
    + [f"{_LAYER}mlp.experts.{expert}.{name}.weight" for expert in range(8) for name in ("up_proj", "down_proj")],
    "glm4_moe": [_LAYER + name for name in ("eh_proj.weight", "hnorm.weight", "mlp.gate.e_score_correction_bias")],
    "ernie4_5_moe": [
        "model.mtp_block.0.mlp.up_proj.weight",
        "model.mtp_emb_norm.0.weight",
        "model.mtp_linear_proj.0.weight",
    ],
}
heads = pytest.mark.parametrize("case", HEADS)


def head_tensors(case: str) -> dict[str, torch.Tensor]:
    """One of them in another dtype than the rest of the model."""
    generator = torch.Generator().manual_seed(3)
    tensors = {name: torch.randn(6, 5, generator=generator) for name in HEADS[case]}
    first = HEADS[case][0]
    return {**tensors, first: tensors[first].to(torch.bfloat16)}


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def add_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    file = folder / "model.safetensors"
    save_file({**load_file(file), **tensors}, file, metadata={"format": "pt"})


def source(folder: Path, case: str, *, shards: bool = False) -> Path:
    """A plain checkpoint with MTP heads, in one file or in several."""
    model = build(CASES[case]).eval()
    model.save_pretrained(folder, max_shard_size="60KB" if shards else "1GB")
    edit_config(folder, num_nextn_predict_layers=1)
    if not shards:
        add_tensors(folder, head_tensors(case))
        return folder
    save_file(head_tensors(case), folder / "model-last.safetensors", metadata={"format": "pt"})
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"].update(dict.fromkeys(head_tensors(case), "model-last.safetensors"))
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor that the checkpoint's index, or its one file, offers."""
    if not (folder / INDEX).exists():
        return load_file(folder / "model.safetensors")
    where = json.loads((folder / INDEX).read_text())["weight_map"]
    files = {name: load_file(folder / name) for name in set(where.values())}
    assert sum(map(len, files.values())) == len(where)
    return {name: files[file][name] for name, file in where.items()}


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
@heads
def test_every_tensor_of_the_source_is_written_back(case: str, shards: bool, tmp_path: Path) -> None:
    folder, ids = source(tmp_path / "source", case, shards=shards), token_ids(2, 7)
    before = stored(folder)
    assert before.keys() >= set(HEADS[case])
    model = farskip.load(folder, "farskip")
    assert not set(HEADS[case]) & model.state_dict().keys()
    farskip.save(model, tmp_path / "saved")
    farskip.save(farskip.load(tmp_path / "saved"), tmp_path / "again")
    for written in (tmp_path / "saved", tmp_path / "again"):
        assert_equal_bits(stored(written), before)
        assert json.loads((written / "config.json").read_text())["num_nextn_predict_layers"] == 1
        index = json.loads((written / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in before.values())
        assert_equal_bits(farskip.load(written)(ids).logits, model(ids).logits)
    with safe_open(tmp_path / "saved" / SHARD, "pt") as file:
        assert file.metadata()["taken_from"] == ("model-last.safetensors" if shards else "model.safetensors")


def test_the_loaded_dtype_leaves_them_alone(tmp_path: Path) -> None:
    model = farskip.load(source(tmp_path / "source", "deepseek_v3"), dtype=torch.bfloat16)
    farskip.save(model, tmp_path / "saved")
    after = stored(tmp_path / "saved")
    assert_equal_bits({name: after[name] for name in HEADS["deepseek_v3"]}, head_tensors("deepseek_v3"))
    assert after["model.embed_tokens.weight"].dtype is torch.bfloat16


def test_transformers_still_reads_what_is_written(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, ids = farskip.load(source(tmp_path / "source", "deepseek_v3")), token_ids(2, 7)
    farskip.save(model, tmp_path / "saved")
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"]
    assert_equal_bits(plain(ids).logits, model(ids).logits)


def test_they_are_mapped_and_outlive_their_files(tmp_path: Path) -> None:
    """No memory for them; and what was loaded can be saved when its source is gone, copies of the model too."""
    folder = source(tmp_path / "source", "deepseek_v3")
    model = copy.deepcopy(rewire(farskip.load(folder), "farskip"))
    carried = carried_mtp_tensors(model)
    assert carried is not None and carried.tensors.keys() == set(HEADS["deepseek_v3"])
    with open("/proc/self/maps") as maps:
        mapped = [line for line in maps if str(folder) in line]
    addresses = [tuple(int(part, 16) for part in line.split()[0].split("-")) for line in mapped]
    for tensor in carried.tensors.values():
        assert any(start <= tensor.data_ptr() < stop for start, stop in addresses)
    shutil.rmtree(folder)
    farskip.save(model, tmp_path / "saved")
    after = stored(tmp_path / "saved")
    assert_equal_bits({name: after[name] for name in HEADS["deepseek_v3"]}, head_tensors("deepseek_v3"))


def test_saving_over_the_source_keeps_them(tmp_path: Path) -> None:
    folder = source(tmp_path / "model", "deepseek_v3")
    before = stored(folder)
    model = farskip.load(folder, "ladder")
    with pytest.raises(ValueError, match=r"the model's MTP tensors are read from this folder.* use farskip\.save"):
        model.save_pretrained(folder)
    assert_equal_bits(stored(folder), before)
    for _ in range(2):
        farskip.save(model, folder)
        assert_equal_bits(stored(folder), before)
    model.save_pretrained(tmp_path / "other")
    assert_equal_bits(stored(tmp_path / "other"), before)


@pytest.mark.parametrize(
    ("case", "stray"),
    [
        ("deepseek_v3", "model.layers.61.eh_proj.weight"),
        ("glm4_moe", "model.layers.46.eh_proj.weight"),
        ("glm4_moe", "model.layers.92.mlp.experts.0.up_proj.weight"),
        ("deepseek_v3", "model.layers.5.eh_proj.weight"),
    ],
)
def test_what_transformers_would_drop_silently_is_refused_by_name(case: str, stray: str, tmp_path: Path) -> None:
    """Layers that the config does not announce; the first three are on transformers' lists of what it ignores."""
    folder = source(tmp_path / "source", case)
    add_tensors(folder, {stray: torch.zeros(3)})
    with pytest.raises(ValueError, match=f"unexpected tensors: {stray.replace('.', '[.]')};"):
        farskip.load(folder)


@pytest.mark.parametrize("announced", [0, None])
def test_a_head_that_the_config_does_not_announce_is_refused(announced: int | None, tmp_path: Path) -> None:
    folder = source(tmp_path / "source", "deepseek_v3")
    edit_config(folder, num_nextn_predict_layers=announced)
    with pytest.raises(ValueError, match=r"unexpected tensors: model\.layers\.4\.eh_proj\.weight, "):
        farskip.load(folder)


def test_a_head_does_not_hide_other_strays(tmp_path: Path) -> None:
    folder = source(tmp_path / "source", "ernie4_5_moe")
    add_tensors(folder, {"model.mtpx": torch.zeros(3)})  # on transformers' list too, which matches anywhere
    with pytest.raises(ValueError, match=r"unexpected tensors: model\.mtpx;"):
        farskip.load(folder)
