"""`load` and `save`: the wiring travels, a plain load refuses, damage is named, nothing is left half-written."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.distributed_c10d import _set_pg_timeout

import farskip
from farskip.models import pretrained
from farskip.models.convert import convert, plan_conversion
from farskip.models.parallelize import parallelize
from farskip.models.surgery import rewire
from farskip.models.testing_models import tiny_model, token_ids
from farskip.parallel.mesh import build_mesh
from farskip.testing import assert_equal_bits
from farskip.wiring import LayerWiring, Wiring

if TYPE_CHECKING:
    from farskip.testing import RankPool

FAMILIES = ("qwen3_moe", "deepseek_v3")
families = pytest.mark.parametrize("family", FAMILIES)
SC_MOE = Wiring((LayerWiring(routed=("attention",)),) * 4)


def rewired(family: str = "deepseek_v3", wiring: Any = "farskip", layers: Any = "all", **changes: Any) -> Any:
    return farskip.rewire(tiny_model(family, **changes).eval(), wiring, layers)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A saved rewired DeepSeek-V3."""
    farskip.save(rewired(), tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


IN_ANOTHER_PROCESS = """
import sys, torch, farskip
model = farskip.load(sys.argv[1])
ids = torch.load(sys.argv[2])
torch.save({"logits": model(ids).logits.detach(), "wiring": str(farskip.wiring_of(model))}, sys.argv[3])
"""


@families
def test_a_fresh_process_computes_the_same_bits(family: str, tmp_path: Path) -> None:
    model, ids = rewired(family, "ladder", "last:3"), token_ids(2, 9)
    farskip.save(model, tmp_path / "model")
    torch.save(ids, tmp_path / "ids.pt")
    subprocess.run(
        [
            sys.executable,
            "-P",
            "-c",
            IN_ANOTHER_PROCESS,
            *(str(tmp_path / name) for name in ("model", "ids.pt", "out.pt")),
        ],
        check=True,
        cwd=tmp_path,
    )
    seen = torch.load(tmp_path / "out.pt")
    assert seen["wiring"] == "ladder on 3 of 4 layers (1-3)"
    assert_equal_bits(seen["logits"], model(ids).logits)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
@pytest.mark.parametrize("wiring", ["farskip", "ladder", "ordinary", SC_MOE], ids=str)
@families
def test_round_trip(family: str, wiring: Any, changes: dict[str, Any], tmp_path: Path) -> None:
    model, ids = rewired(family, wiring, **changes), token_ids(2, 9)
    farskip.save(model, tmp_path / "model")
    loaded = farskip.load(tmp_path / "model")
    assert farskip.wiring_of(loaded) == farskip.wiring_of(model)
    assert_equal_bits(dict(loaded.state_dict()), dict(model.state_dict()))
    assert_equal_bits(loaded(ids).logits, model(ids).logits)
    assert not loaded.training


@families
def test_the_config_records_the_wiring(family: str, tmp_path: Path) -> None:
    farskip.save(rewired(family, layers="last:2"), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["model_type"] == f"farskip_{family}"
    assert config["farskip"] == {
        "base_model_type": family,
        "architecture": type(tiny_model(family)).__name__,
        "wiring": {"name": "farskip", "layers": [2, 3], "num_layers": 4},
    }
    assert config["architectures"] == ["FarSkipForCausalLM"]
    assert "_attn_implementation" not in config


@families
def test_an_ordinary_model_is_saved_as_a_plain_checkpoint(family: str, tmp_path: Path) -> None:
    import transformers

    model, ids = rewired(family, "ordinary"), token_ids(2, 9)
    farskip.save(model, tmp_path / "model")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert_equal_bits(plain(ids).logits, model(ids).logits)


@families
def test_a_plain_load_of_a_rewired_checkpoint_refuses(family: str, tmp_path: Path) -> None:
    import transformers

    farskip.save(rewired(family), tmp_path / "model")
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel, transformers.AutoConfig):
        with pytest.raises(ValueError, match=r"(?s)contains custom code .*trust_remote_code=True"):
            auto.from_pretrained(tmp_path / "model", trust_remote_code=False)
    (tmp_path / "model" / "modeling_farskip.py").unlink()
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    del config["auto_map"]  # a tool that does not know it goes by these two
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert config["architectures"] == ["FarSkipForCausalLM"]
    with pytest.raises(ValueError, match=f"farskip_{family}"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")


@families
def test_what_is_asked_for_outranks_what_the_checkpoint_says(family: str, tmp_path: Path) -> None:
    model, ids = rewired(family), token_ids(2, 9)
    farskip.save(model, tmp_path / "model")
    for wiring, layers in (("ordinary", None), ("ladder", "last:1"), (SC_MOE, None)):
        loaded = farskip.load(tmp_path / "model", wiring, layers)
        expected = farskip.rewire(model, wiring, layers or "all")
        assert farskip.wiring_of(loaded) == farskip.wiring_of(expected)
        assert_equal_bits(loaded(ids).logits, expected(ids).logits)


def test_a_plain_checkpoint_loads_ordinary(tmp_path: Path) -> None:
    model, ids = tiny_model("qwen3_moe").eval(), token_ids(2, 9)
    model.save_pretrained(tmp_path / "model")
    loaded = farskip.load(tmp_path / "model")
    assert farskip.wiring_of(loaded).name == "ordinary"
    assert_equal_bits(loaded(ids).logits, model(ids).logits)
    assert farskip.wiring_of(farskip.load(tmp_path / "model", "farskip", "last:1")).rewired_layers == (3,)
    with pytest.raises(ValueError, match="layers='last:1' needs wiring="):
        farskip.load(tmp_path / "model", layers="last:1")


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wanted", [None, torch.float32, torch.bfloat16], ids=str)
def test_dtype(stored: torch.dtype, wanted: torch.dtype | None, tmp_path: Path) -> None:
    farskip.save(rewired().to(stored), tmp_path / "model")
    loaded = farskip.load(tmp_path / "model", dtype=wanted)
    assert {parameter.dtype for parameter in loaded.parameters()} == {wanted or stored}


def test_a_model_type_that_is_another_name_of_the_family(tmp_path: Path) -> None:
    """Kimi-K2 is a DeepSeek-V3 whose config calls itself otherwise; rewired or not, it is written as what it is."""
    plain, kimi, converted = (tmp_path / name for name in ("plain", "kimi", "converted"))
    model = tiny_model("deepseek_v3").eval()
    model.save_pretrained(plain)
    shutil.copytree(plain, kimi)
    edit_config(kimi, lambda config: config.update(model_type="kimi_k2"))
    ids = token_ids(2, 7)
    assert torch.equal(farskip.load(kimi)(ids).logits, farskip.load(plain)(ids).logits)
    convert(plan_conversion(kimi, converted, "farskip", None, None))
    config = json.loads((converted / "config.json").read_text())
    assert config["farskip"]["base_model_type"] == "deepseek_v3"
    loaded = farskip.load(converted)
    assert torch.equal(loaded(ids).logits, farskip.rewire(farskip.load(plain), "farskip")(ids).logits)


# -- damage and lies --------------------------------------------------------------------------------------------------


def one_line(error: pytest.ExceptionInfo[ValueError], folder: Path) -> str:
    text = str(error.value)
    assert "\n" not in text and str(folder) in text
    return text


def test_a_missing_tensor_is_named(checkpoint: Path) -> None:
    edit_tensors(checkpoint, lambda tensors: tensors.pop("model.layers.1.mlp.gate.weight"))
    with pytest.raises(ValueError, match=r"missing tensors: model\.layers\.1\.mlp\.gate\.weight") as error:
        farskip.load(checkpoint)
    one_line(error, checkpoint)


def test_a_missing_expert_is_named(checkpoint: Path) -> None:
    edit_tensors(checkpoint, lambda tensors: tensors.pop("model.layers.1.mlp.experts.3.up_proj.weight"))
    with pytest.raises(
        ValueError, match=r"missing tensors: model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight"
    ) as error:
        farskip.load(checkpoint)
    one_line(error, checkpoint)


def test_an_extra_tensor_is_named(checkpoint: Path) -> None:
    edit_tensors(checkpoint, lambda tensors: tensors.update(stray=torch.zeros(2)))
    with pytest.raises(ValueError, match="unexpected tensors: stray") as error:
        farskip.load(checkpoint)
    one_line(error, checkpoint)


def test_a_tensor_of_another_shape_is_named(checkpoint: Path) -> None:
    edit_tensors(checkpoint, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(7)}))
    with pytest.raises(ValueError, match=r"mismatched tensors: .*model\.norm\.weight") as error:
        farskip.load(checkpoint)
    one_line(error, checkpoint)


def test_a_truncated_file_is_named(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors: .* incomplete or damaged, copy it again") as error:
        farskip.load(checkpoint)
    one_line(error, checkpoint)


def test_no_tensors_at_all(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="incomplete or damaged") as error:
        farskip.load(checkpoint)
    one_line(error, checkpoint)


@pytest.mark.parametrize("content", [b'{"architectures": ["Deep', b"", b"\xff\xfe{", b"[]", b"3"], ids=repr)
def test_a_damaged_config_is_named(checkpoint: Path, content: bytes) -> None:
    (checkpoint / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match="damaged") as error:
        farskip.load(checkpoint)
    one_line(error, checkpoint)


@pytest.mark.parametrize(
    "record",
    [
        3,
        {},
        {"wiring": {"name": "farskip"}},
        {"base_model_type": "deepseek_v3", "wiring": {"name": "ladder"}},
        {"base_model_type": "deepseek_v3", "architecture": ["DeepseekV3ForCausalLM"], "wiring": {"name": "ladder"}},
        {"base_model_type": "deepseek_v3", "architecture": "DeepseekV3ForCausalLM", "wiring": {"name": "ladder"}},
        {"architecture": "DeepseekV3ForCausalLM", "wiring": {"name": "ladder"}},
    ],
)
def test_a_damaged_record_of_the_wiring_is_named(checkpoint: Path, record: Any) -> None:
    edit_config(checkpoint, lambda config: config.update(farskip=record))
    with pytest.raises(ValueError, match="wiring") as error:
        farskip.load(checkpoint)
    assert "\n" not in str(error.value)


def test_a_wiring_of_another_depth_is_refused(checkpoint: Path) -> None:
    edit_config(checkpoint, lambda config: config["farskip"]["wiring"].update(num_layers=7))
    with pytest.raises(ValueError, match="wiring has 7 layers, the model 4"):
        farskip.load(checkpoint)


@pytest.mark.parametrize("architectures", [["NoSuchForCausalLM"], [], None, "x"], ids=str)
def test_an_unknown_architecture_is_refused_whatever_its_model_type_claims(
    checkpoint: Path, architectures: Any
) -> None:
    edit_config(checkpoint, lambda config: config.update(architectures=architectures, model_type="deepseek_v3"))
    with pytest.raises(ValueError, match=r"is not supported.*known: .*DeepseekV3ForCausalLM") as error:
        farskip.load(checkpoint)
    one_line(error, checkpoint)


def test_the_architecture_decides_and_not_the_model_type(checkpoint: Path) -> None:
    """Instella-MoE claims to be deepseek_v3; as that it would load without its gates and compute something else."""

    def claim(config: dict[str, Any]) -> None:
        config.update(architectures=["InstellaMoEForCausalLM"], model_type="deepseek_v3")
        del config["farskip"]

    edit_config(checkpoint, claim)
    with pytest.raises(ValueError, match=r"missing tensors: model\.layers\.0\.self_attn\.gate_proj\.weight") as error:
        farskip.load(checkpoint)
    one_line(error, checkpoint)


def test_an_unknown_family_names_the_closest(checkpoint: Path) -> None:
    edit_config(checkpoint, lambda config: config.update(architectures=["DeepseekV3XForCausalLM"]))
    with pytest.raises(ValueError, match=r"'DeepseekV3XForCausalLM' is not supported; closest: DeepseekV3ForCausalLM"):
        farskip.load(checkpoint)


def test_a_model_type_that_lies_is_refused(checkpoint: Path) -> None:
    def lie(config: dict[str, Any]) -> None:
        config.update(model_type="qwen3_moe", architectures=["DeepseekV3ForCausalLM"])
        del config["farskip"]

    edit_config(checkpoint, lie)
    with pytest.raises(ValueError, match=r"goes with model_type 'deepseek_v3', but config.json says 'qwen3_moe'"):
        farskip.load(checkpoint)


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match=r"no config\.json there"):
            farskip.load(path)


# -- writing ----------------------------------------------------------------------------------------------------------


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "model")


def test_saving_again_replaces_the_checkpoint(checkpoint: Path) -> None:
    (checkpoint / "old-shard.safetensors").write_bytes(b"of a bigger model")
    farskip.save(rewired(wiring="ladder"), checkpoint)
    assert farskip.wiring_of(farskip.load(checkpoint)).name == "ladder"
    assert not (checkpoint / "old-shard.safetensors").exists() and not leftovers(checkpoint.parent)


@pytest.mark.parametrize("step", ["save_pretrained", "rename"])
def test_a_writer_that_fails_midway_leaves_the_old_checkpoint(
    checkpoint: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = rewired(wiring="ladder")

    def fail(*args: Any, **kwargs: Any) -> None:
        if step == "save_pretrained":
            Path(args[0]).mkdir(exist_ok=True)
            (Path(args[0]) / "config.json").write_text("{")
        raise OSError("no space left on device")

    if step == "save_pretrained":
        monkeypatch.setattr(other, "save_pretrained", fail)
    else:
        monkeypatch.setattr(pretrained.json, "dumps", fail)
    with pytest.raises(OSError, match="no space left"):
        farskip.save(other, checkpoint)
    monkeypatch.undo()
    assert farskip.wiring_of(farskip.load(checkpoint)).name == "farskip"
    assert not leftovers(checkpoint.parent)


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(ValueError, match="holds something that is not a checkpoint; choose another path"):
        farskip.save(rewired(), tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "irreplaceable"


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("irreplaceable")
    with pytest.raises(ValueError, match="not a folder"):
        farskip.save(rewired(), tmp_path / "model")
    assert (tmp_path / "model").read_text() == "irreplaceable"


def test_an_empty_folder_and_missing_parents_are_fine(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    farskip.save(rewired(), tmp_path / "model")
    farskip.save(rewired(), tmp_path / "a" / "b" / "model")
    assert farskip.wiring_of(farskip.load(tmp_path / "a" / "b" / "model")).name == "farskip"


def test_a_relative_path_and_a_trailing_slash_are_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    farskip.save(rewired(), "model/")
    assert farskip.wiring_of(farskip.load("model/")).name == "farskip"


def test_saving_changes_nothing_about_the_model(tmp_path: Path) -> None:
    model, ids = rewired(), token_ids(2, 5)
    expected, implementation = model(ids).logits, model.config._attn_implementation
    farskip.save(model, tmp_path / "model")
    assert model.config._attn_implementation == implementation and model.config.model_type == "deepseek_v3"
    assert_equal_bits(model(ids).logits, expected)


def rank_0_cannot_save(path: str) -> str:
    model = parallelize(rewire(tiny_model("qwen3_moe"), "farskip"), build_mesh(2))
    with pytest.raises((ValueError, RuntimeError)) as caught:
        farskip.save(model, path)
    return str(caught.value)


def written_slowly(seconds: float) -> str | None:
    _set_pg_timeout(timedelta(seconds=0.5), dist.group.WORLD)
    pretrained._on_first_rank(lambda: time.sleep(seconds))
    try:
        pretrained._on_first_rank(lambda: [time.sleep(seconds), sys.exit("interrupted")])
    except (SystemExit, RuntimeError) as error:
        return str(error)
    return None


def test_writing_may_take_longer_than_a_collective_waits(rank_pool: "RankPool") -> None:
    first, second = rank_pool.run(written_slowly, 2, 1.0)
    assert first == "interrupted"
    assert second == "save: rank 1 stops because rank 0 could not write: SystemExit: interrupted"


def test_all_ranks_hear_why_rank_0_cannot_save(tmp_path: Path, rank_pool: "RankPool") -> None:
    """Instead of waiting for it until the timeout."""
    (tmp_path / "file").touch()
    first, second = rank_pool.run(rank_0_cannot_save, 2, str(tmp_path / "file"))
    assert first == f"save {tmp_path / 'file'}: it is a file, not a folder; choose another path"
    assert second == f"save: rank 1 stops because rank 0 could not write: ValueError: {first}"
