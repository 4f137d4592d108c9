"""`convert`: another wiring around the same bytes, Instella-MoE's format and back, and nothing half-written."""

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import farskip
from farskip.models import convert as convert_module
from farskip.models import folder_copy
from farskip.models.convert import Conversion, convert, plan_conversion
from farskip.models.instella_format import LIES
from farskip.models.testing_families import CASES, FAMILIES, build
from farskip.models.testing_models import token_ids
from farskip.testing import assert_equal_bits

LIKE_INSTELLA = {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "norm_topk_prob": True}
TOKENIZER = {
    "tokenizer.json": "{}",
    "tokenizer_config.json": "{}",
    "special_tokens_map.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "vocab.txt": "a",
    "LICENSE": "free",
    "README.md": "of the original",
}


def source(tmp_path: Path, case: str = "qwen3_moe", shard: str = "60KB", **changes: Any) -> Path:
    """A plain checkpoint of several files, with what else lies beside one."""
    model = build(CASES[case], **changes).eval()
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path / "in", max_shard_size=shard)
    for name, text in TOKENIZER.items():
        (tmp_path / "in" / name).write_text(text)
    return tmp_path / "in"


def run(folder: Path, *arguments: Any, **named: Any) -> Conversion:
    conversion = plan_conversion(folder, folder.parent / "out", *arguments, **named)
    convert(conversion)
    return conversion


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def edit_config(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps({**config_of(folder), **changes}))


def only_there(folder: Path) -> list[str]:
    """What stands beside a checkpoint."""
    return sorted(path.name for path in folder.parent.iterdir() if path != folder)


# -- the same bytes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FAMILIES)
def test_a_converted_checkpoint_is_the_rewired_model(case: str, tmp_path: Path) -> None:
    folder, ids = source(tmp_path, case), token_ids(2, 9)
    before = digests(folder)
    conversion = run(folder, "ladder", "last:2")
    loaded = farskip.load(tmp_path / "out")
    assert farskip.wiring_of(loaded) == conversion.wiring
    assert str(conversion.wiring) == "ladder on 2 of 4 layers (2-3)"
    expected = farskip.load(folder, "ladder", "last:2")
    assert_equal_bits(dict(loaded.state_dict()), dict(expected.state_dict()))
    for parameter in (*loaded.parameters(), *expected.parameters()):
        parameter.data = parameter.data.clone()  # the files' mappings are aligned differently
    assert_equal_bits(loaded(ids).logits, expected(ids).logits)
    assert loaded.generation_config.max_new_tokens == 7
    assert digests(folder) == before, "the source is only read"


def test_files_of_tensors_are_the_same_bytes_and_new_files(tmp_path: Path) -> None:
    folder = source(tmp_path)
    conversion = run(folder, "farskip")
    old, new = digests(folder), digests(tmp_path / "out")
    tensors = [name for name in old if name.endswith(".safetensors")]
    assert len(tensors) >= 3
    for name in [*tensors, "generation_config.json", *TOKENIZER]:
        assert new[name] == old[name]
        assert not (tmp_path / "out" / name).samefile(folder / name) and (tmp_path / "out" / name).stat().st_nlink == 1
    index = [json.loads((each / "model.safetensors.index.json").read_text()) for each in (folder, tmp_path / "out")]
    assert index[0] == index[1]
    assert (
        conversion.num_bytes
        == sum((folder / name).stat().st_size for name in (*tensors, *TOKENIZER))
        + (folder / "generation_config.json").stat().st_size
    )
    assert conversion.left_out == () and conversion.remarks == ()


def test_a_plan_writes_nothing(tmp_path: Path) -> None:
    folder = source(tmp_path)
    plan_conversion(folder, tmp_path / "out", "farskip")
    assert only_there(folder) == []


def test_the_progress_adds_up(tmp_path: Path) -> None:
    folder, seen = source(tmp_path), []
    conversion = plan_conversion(folder, tmp_path / "out", "farskip")
    convert(conversion, seen.append)
    assert sum(seen) == conversion.num_bytes and all(count > 0 for count in seen)


def test_without_a_wiring_it_is_what_the_checkpoint_says(tmp_path: Path) -> None:
    folder = source(tmp_path)
    assert run(folder).wiring.name == "ordinary"
    assert config_of(tmp_path / "out")["model_type"] == "qwen3_moe"
    run(folder, "farskip", "first:2")
    again = plan_conversion(tmp_path / "out", tmp_path / "again")
    convert(again)
    assert str(again.wiring) == "farskip on 2 of 4 layers (0-1)"
    assert digests(tmp_path / "again") == digests(tmp_path / "out")


def test_ordinary_takes_the_wiring_and_the_code_away(tmp_path: Path) -> None:
    import transformers

    folder = source(tmp_path)
    run(folder, "farskip")
    assert (tmp_path / "out" / "modeling_farskip.py").exists()
    convert(plan_conversion(tmp_path / "out", tmp_path / "back", "ordinary"))
    assert not list((tmp_path / "back").glob("*.py")) and "auto_map" not in config_of(tmp_path / "back")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    expected = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert_equal_bits(dict(plain.state_dict()), dict(expected.state_dict()))


def test_what_does_not_belong_to_it_is_left_out_and_said(tmp_path: Path) -> None:
    folder = source(tmp_path)
    for name in ("pytorch_model.bin", "consolidated.safetensors", "modeling_own.py", "pytorch_model.bin.index.json"):
        (folder / name).write_text("x")
    (folder / "original").mkdir()
    (folder / ".cache").mkdir()
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    conversion = run(folder, "farskip")
    left = ["consolidated.safetensors", "modeling_own.py", "original", "pytorch_model.bin"]
    assert conversion.left_out == (*left, "pytorch_model.bin.index.json")
    assert not {path.name for path in (tmp_path / "out").iterdir()} & {*conversion.left_out, ".cache"}
    assert "modeling_own" not in json.dumps(config_of(tmp_path / "out"))


def test_a_folder_of_links_as_the_hub_keeps_it(tmp_path: Path) -> None:
    folder = source(tmp_path)
    (tmp_path / "links").mkdir()
    for path in folder.iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    convert(plan_conversion(tmp_path / "links", tmp_path / "out", "farskip"))
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert farskip.wiring_of(farskip.load(tmp_path / "out")).name == "farskip"


def test_tensors_of_types_that_nobody_here_computes_with_are_copied(tmp_path: Path) -> None:
    """A quantized checkpoint is converted like any other: only its config is read."""
    folder = source(tmp_path, shard="5GB")
    tensors = load_file(folder / "model.safetensors")
    quantized = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}
    save_file(quantized, folder / "model.safetensors")
    edit_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    run(folder, "farskip")
    assert digests(tmp_path / "out")["model.safetensors"] == digests(folder)["model.safetensors"]
    assert config_of(tmp_path / "out")["quantization_config"]["quant_method"] == "fp8"


def unable(*arguments: Any) -> int:
    raise OSError(errno.EINVAL, "Invalid argument")


def test_the_tensors_of_a_checkpoint_never_come_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's own allocations while a file of 15 MB is copied, also where the kernel does not copy."""
    import tracemalloc

    folder = source(tmp_path, shard="5GB", vocab_size=60_000)
    assert (folder / "model.safetensors").stat().st_size > 15_000_000
    monkeypatch.setattr(folder_copy, "_PIECE_BYTES", 1 << 20)
    conversion = plan_conversion(folder, tmp_path / "out", "farskip")
    for in_kernel in (True, False):
        if not in_kernel:
            monkeypatch.setattr(os, "sendfile", unable)
        tracemalloc.start()
        convert(conversion)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 3_000_000
        assert digests(tmp_path / "out")["model.safetensors"] == digests(folder)["model.safetensors"]


def test_where_the_kernel_cannot_copy_from_file_to_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = source(tmp_path)
    monkeypatch.setattr(os, "sendfile", unable)
    conversion = run(folder, "farskip")
    for file in conversion.stored.files:
        assert (tmp_path / "out" / file.path.name).read_bytes() == file.path.read_bytes()


# -- Instella-MoE -----------------------------------------------------------------------------------------------------


def test_deepseek_to_instella_and_back(tmp_path: Path) -> None:
    folder, ids = source(tmp_path, "deepseek_v3", **LIKE_INSTELLA), token_ids(2, 9)
    conversion = run(folder, "farskip", "1:3", to="instella")
    assert conversion.remarks == (LIES,) and "model_type deepseek_v3" in LIES
    config = config_of(tmp_path / "out")
    assert config["architectures"] == ["InstellaMoEForCausalLM"] and config["model_type"] == "deepseek_v3"
    assert (config["farskip"], config["farskip_start_idx"], config["farskip_end_idx"]) == (True, 1, 2)
    assert config["gated_attention"] is False
    loaded = farskip.load(tmp_path / "out")
    assert type(loaded).__name__ == "InstellaMoEForCausalLM"
    expected = farskip.load(folder, "farskip", "1:3")
    for parameter in (*loaded.parameters(), *expected.parameters()):
        parameter.data = parameter.data.clone()  # the files' mappings are aligned differently
    assert_equal_bits(loaded(ids).logits, expected(ids).logits)

    convert(plan_conversion(tmp_path / "out", tmp_path / "back", to="hf"))
    back = config_of(tmp_path / "back")
    assert back["model_type"] == "farskip_deepseek_v3" and "gated_attention" not in back
    assert not {"farskip_start_idx", "farskip_end_idx", "attn_only_farskip", "mlp_only_farskip"} & set(back)
    returned = farskip.load(tmp_path / "back")
    assert type(returned).__name__ == "DeepseekV3ForCausalLM"
    assert str(farskip.wiring_of(returned)) == "farskip on 2 of 4 layers (1-2)"
    convert(plan_conversion(tmp_path / "back", tmp_path / "plain", "ordinary"))
    original = config_of(folder)
    assert {**config_of(tmp_path / "plain"), "transformers_version": 0} == {**original, "transformers_version": 0}


def test_a_gated_instella_under_an_honest_model_type(tmp_path: Path) -> None:
    folder = source(tmp_path, "instella_moe")
    edit_config(folder, farskip=True)
    conversion = run(folder, to="hf")
    assert conversion.remarks == () and conversion.wiring.name == "farskip"
    config = config_of(tmp_path / "out")
    assert config["model_type"] == "farskip_deepseek_v3" and config["farskip"]["architecture"].startswith("Instella")
    loaded = farskip.load(tmp_path / "out")
    assert type(loaded).__name__ == "InstellaMoEForCausalLM" and farskip.wiring_of(loaded).name == "farskip"
    expected = farskip.load(folder)
    assert_equal_bits(dict(loaded.state_dict()), dict(expected.state_dict()))
    # Without --to, each keeps the form it has.
    convert(plan_conversion(tmp_path / "out", tmp_path / "kept"))
    assert config_of(tmp_path / "kept") == config
    convert(plan_conversion(tmp_path / "out", tmp_path / "own", to="instella"))
    assert config_of(tmp_path / "own")["model_type"] == "deepseek_v3" and config_of(tmp_path / "own")["farskip"] is True
    assert farskip.wiring_of(farskip.load(tmp_path / "own")).name == "farskip"


def test_stacked_experts_become_single_ones_for_instella(tmp_path: Path) -> None:
    folder = source(tmp_path, "deepseek_v3", shard="5GB", **LIKE_INSTELLA)
    model = farskip.load(folder)
    single = digests(folder)["model.safetensors"]
    state = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    where = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"part{number}.safetensors"
        save_file({name: state[name] for name in part}, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 3}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    seen: list[int] = []
    conversion = plan_conversion(folder, tmp_path / "out", "farskip", to="instella")
    assert any(".experts.gate_up_proj" in name for name in conversion.stored.tensors)
    convert(conversion, seen.append)
    assert sum(seen) == conversion.num_bytes
    written = {}
    for file in sorted((tmp_path / "out").glob("*.safetensors")):
        tensors = load_file(file)
        new_index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert {name for name, place in new_index["weight_map"].items() if place == file.name} == set(tensors)
        written.update(tensors)
    stacked = state["model.layers.2.mlp.experts.gate_up_proj"]
    assert_equal_bits(written["model.layers.2.mlp.experts.5.gate_proj.weight"], stacked[5, :24])
    assert_equal_bits(written["model.layers.2.mlp.experts.5.up_proj.weight"], stacked[5, 24:])
    down = state["model.layers.2.mlp.experts.down_proj"]
    assert_equal_bits(written["model.layers.2.mlp.experts.7.down_proj.weight"], down[7])
    assert not any(".experts.gate_up" in name for name in written) and single
    assert_equal_bits(dict(farskip.load(tmp_path / "out").state_dict()), state)
    # Nobody asked for it elsewhere: a wiring changes no tensor.
    convert(plan_conversion(folder, tmp_path / "other", "farskip"))
    assert (tmp_path / "other" / "part0.safetensors").read_bytes() == (folder / "part0.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("case", "changes", "wiring", "layers", "says"),
    [
        ("qwen3_moe", {}, "farskip", None, "qwen3_moe cannot be said in Instella-MoE's format"),
        (
            "deepseek_v3",
            {},
            "farskip",
            None,
            "q_lora_rank=24 cannot be said in Instella-MoE's format, where it is None",
        ),
        ("deepseek_v3", {**LIKE_INSTELLA, "n_group": 4}, "farskip", None, "n_group=4 cannot be said"),
        ("deepseek_v3", LIKE_INSTELLA, "ladder", None, "cannot say the wiring ladder on 4 of 4 layers"),
        ("deepseek_v3", LIKE_INSTELLA, "farskip", [0, 2], "on one stretch of layers"),
    ],
)
def test_what_instellas_format_cannot_say(
    case: str, changes: dict[str, Any], wiring: str, layers: Any, says: str, tmp_path: Path
) -> None:
    folder = source(tmp_path, case, **changes)
    refused(folder, says, wiring, layers, to="instella")


def test_missing_and_needless_gates(tmp_path: Path) -> None:
    folder = source(tmp_path, "instella_moe", shard="5GB")
    edit_config(folder, gated_attention=False)
    refused(folder, r"unexpected tensors: model\.layers\.0\.self_attn\.gate_proj\.weight; .* gated_attention false")
    edit_config(folder, gated_attention=True)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.self_attn.gate_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, r"missing tensors: model\.layers\.2\.self_attn\.gate_proj\.weight; .* gated_attention true")


# -- refused before a byte is written ---------------------------------------------------------------------------------


def refused(folder: Path, says: str, *arguments: Any, target: Path | None = None, **named: Any) -> None:
    before = only_there(folder)
    with pytest.raises(ValueError, match=says) as error:
        plan_conversion(folder, target or folder.parent / "out", *arguments, **named)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    assert only_there(folder) == before


@pytest.mark.parametrize(
    ("wiring", "layers", "says"),
    [
        ("farskp", None, "wiring 'farskp' is unknown; did you mean 'farskip'"),
        ("farskip", "last:5", "the model has only 4 layers"),
        ("farskip", [4], r"layer 4 is outside 0\.\.3"),
        ("farskip", "2;3", "is not understood"),
        (None, "last:2", "needs a wiring"),
        (farskip.Wiring.named("farskip", 3), None, "wiring has 3 layers, the model 4"),
    ],
)
def test_a_wiring_that_the_model_cannot_have(wiring: Any, layers: Any, says: str, tmp_path: Path) -> None:
    refused(source(tmp_path), says, wiring, layers)


def test_a_wiring_is_held_against_the_kinds_of_layers(tmp_path: Path) -> None:
    """Leaving out the routed output but not the newer shared one: fine without a shared expert, refused with one."""
    from farskip.wiring import LayerWiring

    table = farskip.Wiring((LayerWiring(), *[LayerWiring(attention=("previous.shared",))] * 3))
    run(source(tmp_path, "qwen3_moe"), table)
    (tmp_path / "other").mkdir()
    refused(source(tmp_path / "other", "deepseek_v3"), r"leaves out \['shared'\].*reads the newer \['routed'\]", table)


def test_a_target_that_is_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = source(tmp_path)
    refused(folder, "the output is the checkpoint itself", "farskip", target=folder)
    refused(folder, "the output is the checkpoint itself", "farskip", target=tmp_path / "x" / ".." / "in")
    refused(folder, "lie inside each other", "farskip", target=folder / "inside")
    refused(folder, "lie inside each other", "farskip", target=tmp_path)
    (tmp_path / "link").symlink_to(folder)
    refused(folder, "the output is the checkpoint itself", "farskip", target=tmp_path / "link")
    (tmp_path / "file").write_text("irreplaceable")
    refused(folder, "is a file, not a folder", "farskip", target=tmp_path / "file")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("irreplaceable")
    refused(folder, "holds something that is not a checkpoint", "farskip", target=tmp_path / "thesis")
    assert (tmp_path / "file").read_text() == (tmp_path / "thesis" / "thesis.txt").read_text() == "irreplaceable"


def test_bad_sources(tmp_path: Path) -> None:
    folder = source(tmp_path)
    file = sorted(folder.glob("*.safetensors"))[1]
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    refused(folder, r"model-00002-of-.*incomplete or damaged", "farskip")
    file.unlink()
    refused(folder, r"names the file 'model-00002-of-.*which is not there", "farskip")
    file.write_bytes(whole)
    edit_config(folder, architectures=["Qwen3MoEForCausalLM"])
    refused(folder, "is not supported; closest: Qwen3MoeForCausalLM", "farskip")
    edit_config(folder, architectures=["Qwen3MoeForCausalLM"], model_type="qwen2_moe")
    refused(folder, "goes with model_type 'qwen3_moe', but config.json says 'qwen2_moe'", "farskip")
    (folder / "config.json").write_text('{"archi')
    refused(folder, "not JSON", "farskip")
    (folder / "config.json").write_text("[]")
    refused(folder, "list instead of an object", "farskip")
    (folder / "config.json").unlink()
    refused(folder, r"no config\.json there", "farskip")
    refused(tmp_path / "absent", r"no config\.json there", "farskip")


def test_a_layer_without_tensors(tmp_path: Path) -> None:
    folder = source(tmp_path)
    edit_config(folder, num_hidden_layers=5)
    refused(folder, "missing tensors: none of layer 4, though config.json says 5 layers", "farskip")


def test_no_safetensors(tmp_path: Path) -> None:
    folder = source(tmp_path, shard="5GB")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "neither model.safetensors nor", "farskip")


def test_an_unknown_format(tmp_path: Path) -> None:
    refused(source(tmp_path), "format 'gguf' is unknown; use one of hf, instella", "farskip", to="gguf")


def test_too_little_room_is_seen_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = source(tmp_path)
    free = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(convert_module, "disk_usage", lambda path: free)
    refused(folder, r"kB are needed and 1\.0 kB are free on the disk of .*out; make room", "farskip")


# -- whole or not at all ----------------------------------------------------------------------------------------------


def failing_at(call: Callable[..., Any], number: int, error: BaseException) -> Callable[..., Any]:
    """As `call`, but its `number`-th call raises."""
    count = 0

    def once(*arguments: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        if count == number:
            raise error
        return call(*arguments, **named)

    return once


@pytest.mark.parametrize("number", [1, 3])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = source(tmp_path)
    conversion = plan_conversion(folder, tmp_path / "new" / "deeper" / "out", "farskip")
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "sendfile", failing_at(os.sendfile, number, full))
    with pytest.raises(OSError, match=r"out: no space left on its disk \(.* are needed\); nothing was left") as error:
        convert(conversion)
    assert "\n" not in str(error.value)
    assert only_there(folder) == []


@pytest.mark.parametrize("where", ["sendfile", "fsync", "rename"])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()], ids=repr)
def test_a_failure_midway_leaves_the_old_checkpoint(
    where: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = source(tmp_path)
    run(folder, "ladder")
    before = digests(tmp_path / "out")
    conversion = plan_conversion(folder, tmp_path / "out", "farskip")
    if where == "rename":
        # The second one: the old checkpoint stands aside already.
        monkeypatch.setattr(Path, "rename", failing_at(Path.rename, 2, error))
    else:
        monkeypatch.setattr(os, where, failing_at(getattr(os, where), 2, error))
    with pytest.raises(type(error)):
        convert(conversion)
    monkeypatch.undo()
    assert digests(tmp_path / "out") == before and only_there(folder) == ["out"]


def test_a_file_that_becomes_shorter_meanwhile(tmp_path: Path) -> None:
    folder = source(tmp_path)
    conversion = plan_conversion(folder, tmp_path / "out", "farskip")
    file = conversion.stored.files[-1].path
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"became shorter while it was copied"):
        convert(conversion)
    assert only_there(folder) == []


def test_a_checkpoint_is_replaced_when_the_new_one_is_complete(tmp_path: Path) -> None:
    folder = source(tmp_path)
    run(folder, "ladder")
    (tmp_path / "out" / "old-shard.safetensors").write_bytes(b"of a bigger model")
    run(folder, "farskip")
    assert farskip.wiring_of(farskip.load(tmp_path / "out")).name == "farskip"
    assert not (tmp_path / "out" / "old-shard.safetensors").exists() and only_there(folder) == ["out"]


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, synced = source(tmp_path), []
    fsync = os.fsync

    def noted(handle: int) -> None:
        assert not (tmp_path / "out").exists()
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    run(folder, "farskip")
    (part,) = {str(Path(path).parent) for path in synced if re.search(r"\.part/", path)}
    assert {Path(path).name for path in synced if path != part} == {p.name for p in (tmp_path / "out").iterdir()}
    assert part in synced


def test_an_empty_folder_a_relative_path_and_missing_parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = source(tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    for target in ("empty", "a/b/out", "trailing/"):
        convert(plan_conversion(Path("in"), Path(target), "farskip"))
        assert farskip.wiring_of(farskip.load(tmp_path / target)).name == "farskip"
    assert only_there(folder) == ["a", "empty", "trailing"]
