"""`load(mesh=...)` reads this rank's experts only: in bits as loaded whole and cut; the bytes are counted."""

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

import farskip
from farskip.models import stored_slice
from farskip.models.attach import attachment_of
from farskip.models.checkpoint_files import StoredCheckpoint, read_checkpoint
from farskip.models.parallelize import Spread
from farskip.models.rank_slices import Share, why_whole
from farskip.models.stored_slice import ReadWhenUsed, StoredSlice
from farskip.models.testing_families import CASES, FAMILIES, build, is_dense
from farskip.models.testing_models import token_ids
from farskip.parallel.mesh import build_mesh
from farskip.testing import assert_equal_bits, run_ranks

if TYPE_CHECKING:
    from farskip.testing import RankPool


MOE = [name for name in FAMILIES if not is_dense(CASES[name])]
BIG = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 512}


def saved(case: str, folder: Path, *, fused: bool = False, **changes: Any) -> Path:
    """A rewired checkpoint of a case in several files; with its experts stacked, as transformers holds them, or as the
    family stores them."""
    model = farskip.rewire(build(CASES[case], **changes).eval(), "farskip", "last:3")
    model.generation_config.max_new_tokens = 7
    farskip.save(model, folder)
    if fused:
        state = dict(model.state_dict())
        if model.config.tie_word_embeddings:
            del state["lm_head.weight"]
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    split(folder)
    return folder


def split(folder: Path, num_files: int = 3) -> None:
    """One file of tensors into several, tensors of a layer in different ones, with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {}
    for number in range(num_files):
        part = {name: tensors[name] for name in sorted(tensors)[number::num_files]}
        file = f"model-{number + 1:05d}-of-{num_files:05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def bytes_read() -> int:
    """What this process has read so far, as the kernel counts it; mapped files do not count."""
    return int(re.findall(r"rchar: (\d+)", Path("/proc/self/io").read_text())[0])


def is_expert(name: str) -> bool:
    return ".experts." in name


def share(stored: StoredCheckpoint, size: int) -> int:
    """Bytes of the tensors that a rank needs."""
    return sum(tensor.num_bytes // (size if is_expert(name) else 1) for name, tensor in stored.tensors.items())


def sliced_equals_cut(folder: str, ep: int, case: str) -> None:
    mesh, path = build_mesh(ep), Path(folder)
    whole = farskip.parallelize(farskip.load(path), mesh)
    sliced = farskip.load(path, mesh=mesh)
    assert type(sliced).__mro__ == type(whole).__mro__
    assert farskip.wiring_of(sliced) == farskip.wiring_of(whole)
    assert_equal_bits(dict(sliced.state_dict()), dict(whole.state_dict()))
    assert_equal_bits(dict(sliced.named_buffers()), dict(whole.named_buffers()))
    expected, attachment = attachment_of(whole), attachment_of(sliced)
    assert attachment is not None and expected is not None
    assert attachment.sharded_experts == expected.sharded_experts and len(attachment.sharded_experts) >= 2
    ids = token_ids(2, 9, seed=dist.get_rank())
    # transformers maps files into memory, where tensors lie as they happen to, and CPU products of weights that are not
    # aligned to 64 bytes differ in the last bit.
    for parameter in whole.parameters():
        parameter.data = parameter.data.clone()
    assert_equal_bits(sliced(ids).logits, whole(ids).logits)
    assert sliced.generation_config.to_dict() == whole.generation_config.to_dict()
    assert sliced.generation_config.max_new_tokens == 7
    assert sliced.config.to_dict() == whole.config.to_dict()
    assert [parameter.requires_grad for parameter in sliced.parameters()] == [True] * len(list(sliced.parameters()))
    assert not sliced.training


@pytest.mark.parametrize("fused", [False, True], ids=["as_stored", "stacked"])
@pytest.mark.parametrize("case", MOE)
def test_a_slice_equals_the_whole_model_cut(case: str, fused: bool, rank_pool: "RankPool", tmp_path: Path) -> None:
    folder = saved(case, tmp_path / "model", fused=fused)
    rank_pool.run(sliced_equals_cut, 2, str(folder), 2, case)


def test_ranks_beyond_one_group_and_tied_embeddings(rank_pool: "RankPool", tmp_path: Path) -> None:
    folder = saved("qwen2_moe-no-dense-tied", tmp_path / "model")
    rank_pool.run(sliced_equals_cut, 4, str(folder), 2, "qwen2_moe")


def count_bytes(folder: str, sharded: bool) -> tuple[int, int]:
    """Bytes that `load` reads, and bytes of memory that the parameters have."""
    mesh = build_mesh(2)
    farskip.load(Path(folder), mesh=mesh)  # imports and caches
    before = bytes_read()
    model = farskip.load(Path(folder), mesh=mesh if sharded else None)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return bytes_read() - before, sum(storages.values())


@pytest.mark.parametrize("fused", [False, True], ids=["as_stored", "stacked"])
def test_a_rank_reads_and_holds_its_share_only(fused: bool, rank_pool: "RankPool", tmp_path: Path) -> None:
    folder = saved("qwen3_moe", tmp_path / "model", fused=fused, **BIG)
    stored = read_checkpoint(folder)
    mine = share(stored, 2)
    assert mine < 0.6 * stored.num_bytes, "most of the model must be experts, or the test says nothing"
    for read, held in rank_pool.run(count_bytes, 2, str(folder), True):
        assert mine <= read <= 1.05 * mine + 200_000, "headers, config and the process's own files are small"
        assert held == mine


def peak(load: Callable[[], Any]) -> tuple[int, int]:
    """Bytes of memory that this process needed at most while it loaded a model, beyond what it had before; and those of
    the parameters."""

    def now(what: str) -> int:
        return 1024 * int(re.findall(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])

    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = now("VmRSS")
    model = load()
    return now("VmHWM") - before, sum(p.numel() * p.element_size() for p in model.parameters())


def peaks_of_load(folder: str, small: str) -> tuple[int, int, int]:
    """Peaks of a rank that loads in slices, and that loads whole and cuts; and the bytes of its parameters."""
    mesh = build_mesh(2)
    farskip.load(small, mesh=mesh)  # imports
    sliced, share_of_rank = peak(lambda: farskip.load(folder, mesh=mesh))
    whole, _ = peak(lambda: farskip.parallelize(farskip.load(folder), mesh))
    return sliced, whole, share_of_rank


@pytest.mark.slow
def test_the_peak_of_memory_is_about_the_share(tmp_path: Path) -> None:
    """In fresh ranks, whose allocator has nothing in store."""
    folder = saved("qwen3_moe", tmp_path / "model", hidden_size=64, moe_intermediate_size=4096, mlp_only_layers=[])
    small = saved("qwen3_moe", tmp_path / "small")
    for sliced, whole, share_of_rank in run_ranks(peaks_of_load, 2, str(folder), str(small)):
        assert share_of_rank > 50e6
        assert sliced < 1.6 * share_of_rank, sliced / share_of_rank
        assert whole > 2.0 * share_of_rank, "else the measurement says nothing"


def dtypes_and_wiring(folder: str) -> None:
    mesh = build_mesh(2)
    whole = farskip.parallelize(farskip.load(folder, "ladder", "last:1", dtype=torch.bfloat16), mesh)
    sliced = farskip.load(folder, "ladder", "last:1", dtype=torch.bfloat16, mesh=mesh)
    assert farskip.wiring_of(sliced).name == "ladder"
    assert_equal_bits(dict(sliced.state_dict()), dict(whole.state_dict()))


def test_another_dtype_and_wiring(rank_pool: "RankPool", tmp_path: Path) -> None:
    rank_pool.run(dtypes_and_wiring, 2, str(saved("deepseek_v3", tmp_path / "model")))


def settings_of_parallelize(folder: str) -> None:
    """Given to `load`, they do what they do given to `parallelize`; so under sequence parallelism."""
    mesh = build_mesh(1, tp=2)
    spread: Spread = {"schedule": "serial", "sequence_parallel": True, "chunks": 2}
    whole = farskip.parallelize(farskip.load(folder, "ladder"), mesh, **spread)
    sliced = farskip.load(folder, "ladder", mesh=mesh, **spread)
    expected, attachment = attachment_of(whole), attachment_of(sliced)
    assert attachment is not None and expected is not None
    assert attachment.executor.graph.is_sequence_parallel
    assert attachment.executor.schedule() == expected.executor.schedule()
    for parameter in whole.parameters():
        parameter.data = parameter.data.clone()
    ids = token_ids(2, 9, seed=0)
    assert_equal_bits(sliced(ids).logits, whole(ids).logits)
    with pytest.raises(TypeError, match="chunk"):
        farskip.load(folder, mesh=mesh, chunk=2)  # type: ignore[call-arg]
    # Before anything is read, which can take long: there is nothing to read here.
    with pytest.raises(ValueError, match="schedule 'overlaped' is unknown; use overlapped"):
        farskip.load(Path(folder) / "none", mesh=mesh, schedule="overlaped")
    with pytest.raises(ValueError, match="side_stream 'merg' is unknown; use merge"):
        farskip.load(Path(folder) / "none", mesh=mesh, side_stream="merg")
    with pytest.raises(ValueError, match="sequence_parallel=True with tp=1"):
        farskip.load(Path(folder) / "none", mesh=build_mesh(2), sequence_parallel=True)


def test_settings_of_parallelize(rank_pool: "RankPool", tmp_path: Path) -> None:
    folder = str(saved("qwen3_moe", tmp_path / "model"))
    rank_pool.run(settings_of_parallelize, 2, folder)
    with pytest.raises(ValueError, match="chunks= spreads a model over ranks and needs mesh="):
        farskip.load(folder, chunks=2)


def save_again(folder: str, other: str) -> None:
    farskip.save(farskip.load(folder, mesh=build_mesh(2)), other)


@pytest.mark.parametrize("case", ["mixtral", "gpt_oss", "ernie4_5_moe"])
def test_what_was_read_in_slices_is_saved_whole(case: str, rank_pool: "RankPool", tmp_path: Path) -> None:
    folder = saved(case, tmp_path / "model")
    rank_pool.run(save_again, 2, str(folder), str(tmp_path / "again"))
    before, after = read_checkpoint(folder).tensors, read_checkpoint(tmp_path / "again").tensors
    assert {name: tensor.shape for name, tensor in after.items()} == {n: t.shape for n, t in before.items()}
    assert_equal_bits(dict(farskip.load(tmp_path / "again").state_dict()), dict(farskip.load(folder).state_dict()))


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def add_mtp_head(folder: Path) -> dict[str, torch.Tensor]:
    """Give a checkpoint of DeepSeek-V3 with four layers a head like its last layer."""
    head = {
        name.replace("layers.3.", "layers.4."): t + 1 for name, t in read_all(folder).items() if "layers.3." in name
    }
    save_file(head, folder / "head.safetensors", metadata={"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"].update(dict.fromkeys(head, "head.safetensors"))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    return head


def test_mtp_heads_are_not_lost_and_their_experts_not_cut(rank_pool: "RankPool", tmp_path: Path) -> None:
    folder = saved("deepseek_v3", tmp_path / "model")
    head = add_mtp_head(folder)
    rank_pool.run(save_again, 2, str(folder), str(tmp_path / "again"))
    assert sum(is_expert(name) for name in head) == 24
    assert_equal_bits(read_all(tmp_path / "again"), read_all(folder))


# -- damage: every rank sees it, also one whose experts are whole -----------------------------------------------------


def message_of(folder: str, ep: int = 2) -> str:
    try:
        farskip.load(folder, mesh=build_mesh(ep))
    except ValueError as error:
        return str(error)
    raise AssertionError("loaded")


def refused(rank_pool: "RankPool", folder: Path, says: str, ep: int = 2) -> None:
    for message in rank_pool.run(message_of, ep, str(folder), ep):
        assert re.search(says, message) and "\n" not in message, message


def edit(folder: Path, name: str, value: torch.Tensor | None) -> None:
    """Replace a tensor, or take it out of file and index."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = folder / index["weight_map"][name]
    tensors = load_file(file)
    del tensors[name]
    if value is not None:
        tensors[name] = value
    else:
        del index["weight_map"][name]
    save_file(tensors, file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("expert", [1, 7])
def test_a_missing_expert_is_named_on_every_rank(expert: int, rank_pool: "RankPool", tmp_path: Path) -> None:
    folder, name = saved("deepseek_v3", tmp_path / "model"), f"model.layers.2.mlp.experts.{expert}.up_proj.weight"
    edit(folder, name, None)
    refused(rank_pool, folder, f"missing tensors: {re.escape(name)}")


def test_another_number_of_experts_than_the_config_says(rank_pool: "RankPool", tmp_path: Path) -> None:
    folder = saved("qwen3_moe", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (key,) = {"num_experts", "num_local_experts"} & set(config)
    (folder / "config.json").write_text(json.dumps({**config, key: 4}))
    refused(rank_pool, folder, "has 8 experts in a layer, its config 4")


def test_experts_that_the_ranks_do_not_share_out_equally(rank_pool: "RankPool", tmp_path: Path) -> None:
    folder = saved("qwen3_moe", tmp_path / "model")
    refused(rank_pool, folder, "parallelism of 3 does not divide 8 experts: choose a divisor", ep=3)


def test_a_missing_a_stray_and_a_misshapen_tensor(rank_pool: "RankPool", tmp_path: Path) -> None:
    for name, value, says in (
        ("model.layers.1.mlp.gate.weight", None, r"missing tensors: model\.layers\.1\.mlp\.gate\.weight"),
        ("model.norm.weight", torch.zeros(7), r"mismatched tensors: .*model\.norm\.weight"),
    ):
        folder = saved("qwen3_moe", tmp_path / f"model{name}")
        edit(folder, name, value)
        refused(rank_pool, folder, says)
    folder = saved("qwen3_moe", tmp_path / "stray")
    file = folder / "model-00001-of-00003.safetensors"
    save_file({**load_file(file), "stray": torch.zeros(2)}, file)
    refused(rank_pool, folder, r"model-00001-of-00003\.safetensors has a tensor stray, which .* lacks")


def test_a_file_that_was_cut_off(rank_pool: "RankPool", tmp_path: Path) -> None:
    folder = saved("qwen3_moe", tmp_path / "model")
    file = folder / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    refused(rank_pool, folder, r"model-00002-of-00003\.safetensors: .*incomplete or damaged")


# -- where it cannot be done ------------------------------------------------------------------------------------------


def warned(folder: str, ep: int, tp: int) -> list[str]:
    """What `load` warns of; the model has to be right all the same."""
    mesh = build_mesh(ep, tp=tp)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model = farskip.load(folder, mesh=mesh)
    expected = farskip.parallelize(farskip.load(folder), mesh)
    assert_equal_bits(dict(model.state_dict()), dict(expected.state_dict()))
    for warning in seen:
        assert Path(warning.filename) == Path(__file__), "it points at the caller"
    return [str(warning.message) for warning in seen]


@pytest.mark.parametrize(("ep", "tp"), [(2, 1), (1, 2), (2, 2)])
def test_tensors_in_another_format_are_read_whole_and_rank_0_says_why(
    ep: int, tp: int, rank_pool: "RankPool", tmp_path: Path
) -> None:
    model = build(CASES["qwen3_moe"]).eval()
    model.save_pretrained(tmp_path / "model")
    state = load_file(tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save(state, tmp_path / "model" / "pytorch_model.bin")
    first, second = rank_pool.run(warned, 2, str(tmp_path / "model"), ep, tp)
    assert len(first) == 1 and "the whole checkpoint, because its tensors are not in safetensors" in first[0]
    assert second == []


def test_nothing_is_said_where_nothing_is_wasted(rank_pool: "RankPool", tmp_path: Path) -> None:
    folder = saved("qwen3_moe", tmp_path / "model")
    for ep, tp in ((1, 1), (2, 1), (1, 2), (2, 2)):
        assert rank_pool.run(warned, 2, str(folder), ep, tp) == [[], []]


def test_a_quantized_checkpoint_is_read_whole() -> None:
    assert "quantized" in str(why_whole(Path("x"), {"quantization_config": {"quant_method": "mxfp4"}}))


# -- pieces -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64, torch.float8_e4m3fn], ids=str
)
@pytest.mark.parametrize("shape", [(), (0,), (6,), (4, 0), (4, 3, 2)], ids=str)
def test_a_stored_slice_reads_what_safetensors_reads(
    dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path
) -> None:
    tensors = {"before": torch.arange(3), "it": (torch.rand(shape) * 4).to(dtype), "after": torch.arange(5)}
    save_file(tensors, tmp_path / "model.safetensors")
    stored = read_checkpoint(tmp_path).tensors["it"]
    assert_equal_bits(StoredSlice(stored)[...], tensors["it"])
    if shape and shape[0]:
        part = StoredSlice(stored, range(1, 3))
        assert part.shape == (2, *shape[1:]) and part.is_floating_point() == dtype.is_floating_point
        assert_equal_bits(part[...], tensors["it"][1:3])


def test_an_experts_matrix_is_read_when_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = [torch.rand(3, 2), torch.rand(3, 2)]
    save_file({str(number): matrix for number, matrix in enumerate(matrices)}, tmp_path / "model.safetensors")
    stored, reads = read_checkpoint(tmp_path).tensors, []
    read_into = stored_slice._read_into

    def noted(*arguments: Any) -> None:
        reads.append(arguments)
        read_into(*arguments)

    monkeypatch.setattr(stored_slice, "_read_into", noted)
    waiting: list[Any] = [ReadWhenUsed(StoredSlice(stored[name]))[...].to("cpu", torch.bfloat16) for name in ("0", "1")]
    assert waiting[0].dtype == torch.bfloat16 and waiting[0].is_floating_point() and not reads
    assert_equal_bits(torch.stack(waiting, dim=1), torch.stack(matrices, dim=1).bfloat16())
    assert len(reads) == 2
    assert_equal_bits(torch.cat(tensors=waiting), torch.cat(matrices).bfloat16())
    assert_equal_bits(waiting[1][1:], matrices[1][1:].bfloat16())


def test_the_slices_share_out_all_experts() -> None:
    parts = [Share(rank=rank, size=4).of(12) for rank in range(4)]
    assert [number for part in parts for number in part] == list(range(12))
