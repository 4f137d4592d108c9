"""`load(mesh=...)` under tensor parallelism reads this rank's slices only: in bits as loaded whole and cut; the bytes
are counted. What is read of experts alone is in test_rank_slices.py."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh

import farskip
from farskip.models import stored_slice
from farskip.models.attach import attachment_of
from farskip.models.checkpoint_files import read_checkpoint
from farskip.models.rank_slices import Share
from farskip.models.stored_slice import StoredSlice
from farskip.models.testing_families import CASES, is_dense
from farskip.models.testing_models import token_ids
from farskip.parallel.mesh import EP_AXIS, axis_size, build_mesh
from farskip.testing import assert_equal_bits, load_beside, run_ranks

if TYPE_CHECKING:
    from farskip.testing import RankPool


experts_module = load_beside(__file__, "test_rank_slices")
saved, edit, read_all = experts_module.saved, experts_module.edit, experts_module.read_all
DENSE = {"hidden_size": 64, "intermediate_size": 4096}
MIXED = {"hidden_size": 64, "num_attention_heads": 16, "head_dim": 64, "moe_intermediate_size": 96}
"""About as many bytes of experts as of attention."""


def sliced_equals_cut(folder: str, ep: int, tp: int) -> None:
    mesh, path = build_mesh(ep, tp=tp), Path(folder)
    whole = farskip.parallelize(farskip.load(path), mesh)
    sliced = farskip.load(path, mesh=mesh)
    assert [type(module).__mro__ for module in sliced.modules()] == [type(each).__mro__ for each in whole.modules()]
    for name in ("num_heads", "num_experts", "in_features", "out_features"):
        assert [getattr(module, name, None) for module in sliced.modules()] == [
            getattr(module, name, None) for module in whole.modules()
        ], name
    assert farskip.wiring_of(sliced) == farskip.wiring_of(whole)
    assert_equal_bits(dict(sliced.state_dict()), dict(whole.state_dict()))
    assert_equal_bits(dict(sliced.named_buffers()), dict(whole.named_buffers()))
    expected, attachment = attachment_of(whole), attachment_of(sliced)
    assert attachment is not None and expected is not None
    assert attachment.tensor_layout == expected.tensor_layout and len(attachment.tensor_layout.sharded) >= 4
    assert attachment.sharded_experts == expected.sharded_experts
    assert [p.requires_grad for p in sliced.parameters()] == [p.requires_grad for p in whole.parameters()]
    assert sliced.config.to_dict() == whole.config.to_dict() and not sliced.training
    assert sliced.generation_config.to_dict() == whole.generation_config.to_dict()
    # transformers maps files into memory, where tensors lie as they happen to, and CPU products of weights that are not
    # aligned to 64 bytes differ in the last bit.
    for parameter in [*whole.parameters(), *sliced.parameters()]:
        parameter.data = parameter.data.clone()
    ids = token_ids(2, 9, seed=dist.get_rank() // tp)
    assert_equal_bits(sliced(ids).logits, whole(ids).logits)
    assert (sliced.get_output_embeddings().weight is sliced.get_input_embeddings().weight) == (
        sliced.config.tie_word_embeddings
    )


@pytest.mark.parametrize("case", CASES)
def test_slices_equal_the_whole_model_cut(case: str, rank_pool: "RankPool", tmp_path: Path) -> None:
    """With experts whole and, where there are any, spread."""
    folder = saved(case, tmp_path / "model")
    for ep in (1,) if is_dense(CASES[case]) else (1, 2):
        rank_pool.run(sliced_equals_cut, 2, str(folder), ep, 2)


@pytest.mark.parametrize(
    ("case", "ep", "tp", "changes"),
    [
        ("qwen3_moe", 2, 2, {}),
        ("deepseek_v3", 4, 2, {}),
        ("gpt_oss", 4, 4, {"num_key_value_heads": 4}),
        ("llama-biased-tied", 1, 4, {"num_key_value_heads": 4}),
    ],
)
def test_more_ranks_than_two(
    case: str, ep: int, tp: int, changes: dict[str, Any], rank_pool: "RankPool", tmp_path: Path
) -> None:
    """Several groups, several groups that share the experts, and slices in the middle of a tensor."""
    rank_pool.run(sliced_equals_cut, 4, str(saved(case, tmp_path / "model", **changes)), ep, tp)


def test_stacked_experts(rank_pool: "RankPool", tmp_path: Path) -> None:
    folder = saved("qwen3_moe", tmp_path / "model", fused=True)
    for ep in (1, 2):
        rank_pool.run(sliced_equals_cut, 2, str(folder), ep, 2)


def test_a_checkpoint_whose_names_lack_the_backbones_prefix(rank_pool: "RankPool", tmp_path: Path) -> None:
    """As one of the backbone alone has them; transformers adds the prefix."""
    folder = saved("qwen3-window-tied", tmp_path / "model")
    tensors = {name.removeprefix("model."): tensor for name, tensor in read_all(folder).items()}
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "layers.0.self_attn.q_proj.weight" in tensors
    rank_pool.run(sliced_equals_cut, 2, str(folder), 1, 2)


def bytes_of_ranks(folder: str, ep: int, tp: int) -> tuple[int, int, int, int]:
    """Bytes that `load` reads; bytes of memory that the parameters have; those that the layout says this rank keeps;
    and those of the whole model."""
    mesh = build_mesh(ep, tp=tp)
    model = farskip.load(folder, mesh=mesh)  # imports and caches
    attachment = attachment_of(model)
    assert attachment is not None
    parts = dict.fromkeys(attachment.sharded_experts, axis_size(mesh, EP_AXIS))
    parts |= dict.fromkeys(attachment.tensor_layout.sharded, tp)
    sizes = {name: p.numel() * p.element_size() for name, p in farskip.load(folder).named_parameters()}
    before = experts_module.bytes_read()
    model = farskip.load(folder, mesh=mesh)
    read = experts_module.bytes_read() - before
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    mine = sum(size // parts.get(name, 1) for name, size in sizes.items())
    return read, sum(storages.values()), mine, sum(sizes.values())


@pytest.mark.parametrize(
    ("case", "changes", "ep"),
    [("llama", DENSE, 1), ("qwen3_moe", MIXED, 1), ("qwen3_moe", MIXED, 2)],
    ids=["dense", "experts_whole", "experts_spread"],
)
def test_a_rank_reads_and_holds_its_slices_only(
    case: str, changes: dict[str, Any], ep: int, rank_pool: "RankPool", tmp_path: Path
) -> None:
    folder = saved(case, tmp_path / "model", **changes)
    for read, held, mine, whole in rank_pool.run(bytes_of_ranks, 2, str(folder), ep, 2):
        assert mine < (0.6 if ep == 2 or case == "llama" else 0.8) * whole, "or the test says nothing"
        assert mine <= read <= 1.05 * mine + 200_000, "headers, config and the process's own files are small"
        assert held == mine


def peak_of_load(folder: str, small: str, sliced: bool) -> tuple[int, int]:
    """The peak of a rank that loads in slices, or loads whole and cuts; and the bytes of its parameters."""
    mesh = build_mesh(1, tp=2)
    farskip.load(small, mesh=mesh)  # imports
    if sliced:
        return experts_module.peak(lambda: farskip.load(folder, mesh=mesh))
    return experts_module.peak(lambda: farskip.parallelize(farskip.load(folder), mesh))


@pytest.mark.slow
def test_the_peak_of_memory_is_about_the_share(tmp_path: Path) -> None:
    """In fresh ranks, whose allocator has nothing in store."""
    folder = saved("llama", tmp_path / "model", hidden_size=256, intermediate_size=12288)
    small = saved("llama", tmp_path / "small")
    for peak, share_of_rank in run_ranks(peak_of_load, 2, str(folder), str(small), True):
        assert share_of_rank > 50e6
        assert peak < 1.2 * share_of_rank, peak / share_of_rank
    for peak, share_of_rank in run_ranks(peak_of_load, 2, str(folder), str(small), False):
        assert peak > 2.0 * share_of_rank, "else the measurement says nothing"


def other_dtype_and_wiring(folder: str) -> None:
    mesh = build_mesh(2, tp=2)
    whole = farskip.parallelize(farskip.load(folder, "ladder", "last:1", dtype=torch.bfloat16), mesh)
    sliced = farskip.load(folder, "ladder", "last:1", dtype=torch.bfloat16, mesh=mesh)
    assert farskip.wiring_of(sliced).name == "ladder"
    assert_equal_bits(dict(sliced.state_dict()), dict(whole.state_dict()))


def test_another_dtype_and_wiring(rank_pool: "RankPool", tmp_path: Path) -> None:
    rank_pool.run(other_dtype_and_wiring, 2, str(saved("deepseek_v3", tmp_path / "model")))


def save_again(folder: str, other: str, ep: int) -> None:
    farskip.save(farskip.load(folder, mesh=build_mesh(ep, tp=2)), other)


@pytest.mark.parametrize(("case", "ep"), [("llama-biased-tied", 1), ("gpt_oss", 2), ("deepseek_v3", 2), ("olmoe", 1)])
def test_what_was_read_in_slices_is_saved_whole(case: str, ep: int, rank_pool: "RankPool", tmp_path: Path) -> None:
    folder = saved(case, tmp_path / "model")
    rank_pool.run(save_again, 2, str(folder), str(tmp_path / "again"), ep)
    assert_equal_bits(read_all(tmp_path / "again"), read_all(folder))


def test_mtp_heads_are_not_cut(rank_pool: "RankPool", tmp_path: Path) -> None:
    folder = saved("deepseek_v3", tmp_path / "model")
    experts_module.add_mtp_head(folder)
    rank_pool.run(save_again, 2, str(folder), str(tmp_path / "again"), 2)
    assert_equal_bits(read_all(tmp_path / "again"), read_all(folder))


# -- refusals: on every rank, and before a tensor is read --------------------------------------------------------------


def refused_unread(folder: str, tp: int, beside: bool = False) -> str:
    """What `load` says, which may have read headers only."""
    read_into, reads = stored_slice._read_into, []

    def noted(*arguments: Any) -> None:
        reads.append(arguments)
        read_into(*arguments)

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "tp")) if beside else build_mesh(1, tp=tp)
    stored_slice._read_into = noted  # type: ignore[assignment]
    try:
        with pytest.raises(ValueError) as caught:
            farskip.load(folder, mesh=mesh)
    finally:
        stored_slice._read_into = read_into
    assert not reads and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("case", "tp", "changes", "says"),
    [
        ("llama", 4, {}, "tensor parallelism of 4 does not divide num_key_value_heads=2: choose a divisor of it"),
        (
            "llama",
            4,
            {"intermediate_size": 50, "num_key_value_heads": 4},
            r"does not divide model\.layers\.0\.mlp\.gate_proj\.weight of shape \(50, 32\) along dimension 0",
        ),
        ("llama", 2, {"attention_dropout": 0.1}, "attention_dropout=0.1 draws other random numbers on every rank"),
    ],
    ids=["heads", "width", "dropout"],
)
def test_what_cannot_be_cut_is_refused_unread(
    case: str, tp: int, changes: dict[str, Any], says: str, rank_pool: "RankPool", tmp_path: Path
) -> None:
    folder = saved(case, tmp_path / "model", **changes)
    for message in rank_pool.run(refused_unread, tp, str(folder), tp):
        assert re.search(says, message), message


def test_a_mesh_with_experts_beside_tensors_is_refused_unread(rank_pool: "RankPool", tmp_path: Path) -> None:
    folder = saved("qwen3_moe", tmp_path / "model")
    for message in rank_pool.run(refused_unread, 4, str(folder), 2, True):
        assert "experts are spread over whole tensor-parallel groups, not beside them" in message


@pytest.mark.parametrize("shape", [(16, 32), (17, 32), (32,), (64, 32)], ids=str)
def test_a_tensor_of_another_size_is_refused_unread(
    shape: tuple[int, ...], rank_pool: "RankPool", tmp_path: Path
) -> None:
    """Also one that is as large as a slice: nothing may take it for the slice."""
    folder, name = saved("llama", tmp_path / "model"), "model.layers.1.self_attn.q_proj.weight"
    edit(folder, name, torch.zeros(shape))
    says = f"mismatched tensors: {name} has shape {shape} instead of (32, 32); the checkpoint does not fit its config"
    for message in rank_pool.run(refused_unread, 2, str(folder), 2):
        assert says in message, message


def message_of(folder: str) -> str:
    with pytest.raises(ValueError) as caught:
        farskip.load(folder, mesh=build_mesh(1, tp=2))
    return str(caught.value)


def test_a_missing_tensor_is_named(rank_pool: "RankPool", tmp_path: Path) -> None:
    folder, name = saved("llama", tmp_path / "model"), "model.layers.1.mlp.down_proj.weight"
    edit(folder, name, None)
    for message in rank_pool.run(message_of, 2, str(folder)):
        assert f"missing tensors: {name}" in message


# -- pieces -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool], ids=str)
@pytest.mark.parametrize(
    ("shape", "dim"), [((6,), 0), ((6, 5), 0), ((5, 6), 1), ((3, 6, 2), 1), ((3, 2, 6), 2), ((0, 6), 1)], ids=str
)
def test_a_part_of_a_stored_tensor(dtype: torch.dtype, shape: tuple[int, ...], dim: int, tmp_path: Path) -> None:
    tensors = {"before": torch.arange(3), "it": (torch.rand(shape) * 4).to(dtype), "after": torch.arange(5)}
    save_file(tensors, tmp_path / "model.safetensors")
    stored = read_checkpoint(tmp_path).tensors["it"]
    for rank, expected in enumerate(tensors["it"].chunk(3, dim)):
        part = StoredSlice(stored, Share(rank=rank, size=3).of(6), dim)
        assert part.shape == expected.shape
        assert_equal_bits(part[...], expected.contiguous())


def test_a_file_that_became_shorter_is_said(tmp_path: Path) -> None:
    tensor = torch.rand(4, 6)
    save_file({"it": tensor}, tmp_path / "model.safetensors")
    stored = read_checkpoint(tmp_path).tensors["it"]
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-20])
    assert_equal_bits(StoredSlice(stored, range(1), 1)[...], tensor[:, :1].contiguous())
    with pytest.raises(ValueError, match="it ends where a tensor should be; the file is incomplete, copy it again"):
        StoredSlice(stored, range(5, 6), 1)[...]
