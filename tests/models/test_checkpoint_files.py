"""Headers of safetensors files and the index: what is read, and every kind of damage that a header shows."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from farskip.models.checkpoint_files import file_header, has_safetensors, read_checkpoint, read_file

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.zeros((), dtype=torch.bfloat16),
    "c": torch.zeros(0, 4),
    "d": torch.tensor([True, False, True]),
    "e": torch.zeros(5, dtype=torch.float8_e4m3fn),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Tensors a and b in one file, the rest in another, and an index."""
    first = {name: TENSORS[name] for name in ("a", "b")}
    second = {name: TENSORS[name] for name in ("c", "d", "e")}
    save_file(first, tmp_path / "model-1.safetensors")
    save_file(second, tmp_path / "model-2.safetensors")
    where = dict.fromkeys(first, "model-1.safetensors") | dict.fromkeys(second, "model-2.safetensors")
    write_index(tmp_path, {"metadata": {"total_size": 1}, "weight_map": where})
    return tmp_path


def write_index(folder: Path, index: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    change(index["weight_map"])
    write_index(folder, index)


def test_a_header_says_what_safetensors_says(file: Path) -> None:
    stored = read_file(file)
    assert {tensor.name: tensor.shape for tensor in stored.tensors} == {n: tuple(t.shape) for n, t in TENSORS.items()}
    assert stored.metadata == {"format": "pt"} and stored.num_bytes == file.stat().st_size
    content = file.read_bytes()
    with safe_open(file, framework="pt") as opened:
        for tensor in stored.tensors:
            theirs = opened.get_slice(tensor.name)
            assert tensor.dtype == theirs.get_dtype() and list(tensor.shape) == theirs.get_shape()
            raw = content[tensor.start : tensor.start + tensor.num_bytes]
            expected = TENSORS[tensor.name].flatten().view(torch.uint8).numpy().tobytes()
            assert raw == expected


def test_a_header_that_we_write_is_one_that_safetensors_reads(file: Path) -> None:
    stored = read_file(file)
    header = file_header({f"new.{t.name}": (t.dtype, t.shape, t.num_bytes) for t in stored.tensors}, stored.metadata)
    assert len(header) % 8 == 0
    data = file.read_bytes()[stored.tensors[0].start :]
    file.write_bytes(header + data)
    loaded = load_file(file)
    assert {name: tensor.dtype for name, tensor in loaded.items()} == {f"new.{n}": t.dtype for n, t in TENSORS.items()}
    assert torch.equal(loaded["new.a"], TENSORS["a"])


def test_a_checkpoint_of_one_file_and_of_several(file: Path, tmp_path: Path) -> None:
    one = read_checkpoint(tmp_path)
    assert one.index is None and set(one.tensors) == set(TENSORS) and one.num_bytes == file.stat().st_size


def test_several_files_and_their_index(sharded: Path) -> None:
    several = read_checkpoint(sharded)
    assert [each.path.name for each in several.files] == ["model-1.safetensors", "model-2.safetensors"]
    assert several.tensors["d"].file.name == "model-2.safetensors"
    assert several.index is not None and several.index["metadata"] == {"total_size": 1}
    save_file({"stray": torch.zeros(1)}, sharded / "consolidated.safetensors")
    assert "stray" not in read_checkpoint(sharded).tensors, "only the files that the index names belong to it"


def refused(folder: Path, says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        read_checkpoint(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kept", [0, 4, 8, 20, -1, -20])
def test_a_file_that_was_cut_off(file: Path, kept: int) -> None:
    file.write_bytes(file.read_bytes()[:kept])
    refused(file.parent, "incomplete or damaged, copy it again")


def test_a_file_with_something_behind_it(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")
    refused(file.parent, r"bytes where its header says .* incomplete or damaged")


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"[]",
        b"3",
        b"\xff\xfe",
        b'{"a": 3}',
        b'{"a": {"dtype": "F32", "shape": [1]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
        b'{"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}, '
        b'"b": {"dtype": "U8", "shape": [4], "data_offsets": [2, 6]}}',
    ],
    ids=repr,
)
def test_a_header_that_is_none(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    refused(tmp_path, "incomplete or damaged")


def test_a_header_of_nonsense_size(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"PK\x03\x04 this is something else")
    refused(tmp_path, "has no header")


def test_the_index_and_the_files_must_say_the_same(sharded: Path) -> None:
    edit_index(sharded, lambda where: where.update(z="model-1.safetensors"))
    refused(sharded, r"missing tensor z, which model\.safetensors\.index\.json places in model-1\.safetensors")
    edit_index(sharded, lambda where: (where.pop("z"), where.pop("d")))
    refused(sharded, r"model-2\.safetensors has a tensor d, which model\.safetensors\.index\.json lacks")
    edit_index(sharded, lambda where: where.update(d="model-1.safetensors"))
    refused(sharded, r"places tensor d in model-1\.safetensors, but it is in model-2\.safetensors")
    edit_index(sharded, lambda where: where.update(d="model-3.safetensors"))
    refused(sharded, r"names the file 'model-3\.safetensors', which is not there")
    edit_index(sharded, lambda where: where.update(d="../model-1.safetensors"))
    refused(sharded, "which is not there")


def test_a_tensor_in_two_files(sharded: Path) -> None:
    save_file({name: TENSORS[name] for name in ("a", "c", "d", "e")}, sharded / "model-2.safetensors")
    refused(sharded, r"tensor a is in model-1\.safetensors and in model-2\.safetensors; keep one")


@pytest.mark.parametrize(
    "index", [[], 3, {}, {"weight_map": {}}, {"weight_map": {"a": 3}}, {"weight_map": []}], ids=str
)
def test_an_index_that_is_none(sharded: Path, index: Any) -> None:
    write_index(sharded, index)
    refused(sharded, "has no weight_map")


def test_an_index_that_is_no_json(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text('{"weight_map": {"a"')
    refused(sharded, "not JSON")


def test_no_safetensors_at_all(tmp_path: Path) -> None:
    assert not has_safetensors(tmp_path)
    refused(tmp_path, r"neither model\.safetensors nor model\.safetensors\.index\.json is there")
