"""The safetensors files of a checkpoint: which tensor lies where, and whether all of them are whole. No torch here.

A safetensors file is the length of its header (8 bytes, little-endian), the header (JSON: name -> dtype, shape, place
in the data), and the data. Only headers are read. A file is whole if its tensors cover its data to the last byte; so a
copy that was cut off is found before anything is done with it.

A checkpoint is ``model.safetensors``, or several files with ``model.safetensors.index.json``, which says in which file
every tensor is. The two have to say the same.
"""

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000
"""What the safetensors library accepts; a bigger number is the first bytes of something else."""

BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "C64": 64,
}
"""Bits of one number. The shapes of other types (four and six bits) are not compared with their bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        name: in the checkpoint.
        file: holds it.
        dtype: as the format spells it, ``BF16``.
        shape: row-major.
        start: first byte in the file.
        num_bytes: how many.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredFile:
    """One safetensors file.

    Attributes:
        path: of the file.
        num_bytes: its size.
        tensors: in the order of their bytes, which they cover without a gap.
        metadata: what its header says besides.
    """

    path: Path
    num_bytes: int
    tensors: tuple[StoredTensor, ...]
    metadata: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredCheckpoint:
    """All safetensors files of a checkpoint.

    Attributes:
        folder: of the checkpoint.
        files: sorted by name.
        index: what the index file says; None for a checkpoint of one file without one.
    """

    folder: Path
    files: tuple[StoredFile, ...]
    index: Mapping[str, Any] | None

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor by name."""
        return {tensor.name: tensor for file in self.files for tensor in file.tensors}

    @property
    def num_bytes(self) -> int:
        """Size of all files together, without the index."""
        return sum(file.num_bytes for file in self.files)


def has_safetensors(folder: Path) -> bool:
    """Whether the checkpoint is one that `read_checkpoint` reads."""
    return (folder / INDEX).exists() or (folder / SINGLE).exists()


def read_checkpoint(folder: Path) -> StoredCheckpoint:
    """Read the headers of all files of a checkpoint, and its index.

    Args:
        folder: of the checkpoint.

    Raises:
        ValueError: no safetensors, a file that is missing, cut off or torn, or an index that says something else than
            the files: a tensor that no file has, one that the index lacks, one that lies in another file.
    """
    if (folder / INDEX).exists():
        index = _read_index(folder / INDEX)
        where: dict[str, str] = index["weight_map"]
        for name in sorted(set(where.values())):
            if os.path.basename(name) != name or not (folder / name).is_file():
                raise ValueError(f"{folder}: {INDEX} names the file {name!r}, which is not there; copy it again")
        files = tuple(read_file(folder / name) for name in sorted(set(where.values())))
        _compare_with_index(folder, files, where)
        return StoredCheckpoint(folder=folder, files=files, index=index)
    if (folder / SINGLE).is_file():
        return StoredCheckpoint(folder=folder, files=(read_file(folder / SINGLE),), index=None)
    raise ValueError(f"{folder}: neither {SINGLE} nor {INDEX} is there; give a checkpoint in safetensors")


def read_file(path: Path) -> StoredFile:
    """Read the header of one safetensors file and compare it with the file's size.

    Raises:
        ValueError: it is cut off, or its header is no such header.
    """
    num_bytes = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= header_bytes <= _MAX_HEADER_BYTES:
            raise _damaged(path, f"it has no header ({num_bytes} bytes)")
        if 8 + header_bytes > num_bytes:
            raise _damaged(path, f"its header has {header_bytes} bytes and the file {num_bytes}")
        text = file.read(header_bytes)
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", None) or {}
        tensors = [
            StoredTensor(
                name=name,
                file=path,
                dtype=entry["dtype"],
                shape=tuple(entry["shape"]),
                start=8 + header_bytes + entry["data_offsets"][0],
                num_bytes=entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for name, entry in header.items()
        ]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise _damaged(path, "its header is not one of safetensors") from error
    tensors.sort(key=lambda tensor: (tensor.start, tensor.num_bytes))
    end = 8 + header_bytes
    for tensor in tensors:
        bits = BITS.get(tensor.dtype)
        if tensor.start != end or (bits is not None and math.prod(tensor.shape) * bits != tensor.num_bytes * 8):
            raise _damaged(path, f"the place of tensor {tensor.name} in it makes no sense")
        end += tensor.num_bytes
    if end != num_bytes:
        raise _damaged(path, f"it has {num_bytes} bytes where its header says {end}")
    return StoredFile(path=path, num_bytes=num_bytes, tensors=tuple(tensors), metadata=metadata)


def file_header(tensors: Mapping[str, tuple[str, tuple[int, ...], int]], metadata: Mapping[str, str]) -> bytes:
    """The bytes in front of a file's data, which follows in this order without a gap.

    Args:
        tensors: name -> dtype, shape, number of bytes.
        metadata: what the header says besides.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name, (dtype, shape, num_bytes) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, start + num_bytes]}
        start += num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    return struct.pack("<Q", len(text)) + text


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); the file is damaged, copy it again") from error
    where = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        raise ValueError(f"{path}: it has no weight_map; the file is damaged, copy it again")
    return index


def _compare_with_index(folder: Path, files: tuple[StoredFile, ...], where: Mapping[str, str]) -> None:
    found: dict[str, str] = {}
    for file in files:
        for tensor in file.tensors:
            if tensor.name in found:
                raise ValueError(
                    f"{folder}: tensor {tensor.name} is in {found[tensor.name]} and in {file.path.name}; keep one"
                )
            found[tensor.name] = file.path.name
    for name in sorted({*where, *found}):
        if where.get(name) == found.get(name):
            continue
        if name not in found:
            raise ValueError(
                f"{folder}: missing tensor {name}, which {INDEX} places in {where[name]}; copy that file again"
            )
        if name not in where:
            raise ValueError(f"{folder}: {found[name]} has a tensor {name}, which {INDEX} lacks; correct the index")
        raise ValueError(f"{folder}: {INDEX} places tensor {name} in {where[name]}, but it is in {found[name]}")


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"{path}: {what}; the file is incomplete or damaged, copy it again")
