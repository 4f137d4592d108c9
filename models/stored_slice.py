"""A tensor in a file, or a part of it, on its way into a model: what transformers takes for a tensor."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from farskip.models.checkpoint_files import StoredTensor

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockScales:
    """What the numbers of a stored matrix are multiplied with, block by block (`farskip.models.fp8`).

    Attributes:
        stored: one scale per block, [blocks of rows, blocks of columns].
        block: rows and columns of a block; those at the lower and right edge may be smaller.
        dtype: what comes out, rounded once.
    """

    stored: StoredTensor
    block: tuple[int, int]
    dtype: torch.dtype

    def undo(self, stored_RC: torch.Tensor, first_row: int = 0, first_column: int = 0) -> torch.Tensor:
        """The plain matrix, or the part of it that begins there.

        Args:
            stored_RC: numbers as stored.
            first_row: of the part.
            first_column: of the part.
        """
        return undo_blocks(stored_RC, StoredSlice(self.stored)[...], self.block, self.dtype, first_row, first_column)


def undo_blocks(
    stored_RC: torch.Tensor,
    scales: torch.Tensor,
    block: tuple[int, int],
    dtype: torch.dtype,
    first_row: int = 0,
    first_column: int = 0,
) -> torch.Tensor:
    """stored[r, c] * scales[r // block[0], c // block[1]], multiplied in fp32 and rounded once; see `BlockScales`."""
    num_rows, num_columns = stored_RC.shape
    columns = torch.arange(first_column, first_column + num_columns) // block[1]
    plain_RC = torch.empty(stored_RC.shape, dtype=dtype)
    row = 0
    while row < num_rows:  # one row of blocks after another, for the memory
        number = (first_row + row) // block[0]
        stop = min(num_rows, (number + 1) * block[0] - first_row)
        plain_RC[row:stop] = stored_RC[row:stop].float() * scales[number].float()[columns]
        row = stop
    return plain_RC


class StoredSlice:
    """A tensor in a file, or a part of it; `tensor[...]` reads that.

    Args:
        stored: where it lies.
        part: of one dimension; all of it if None.
        dim: which dimension.
        scales: of a matrix in blocks; it is undone when read.
    """

    def __init__(
        self, stored: StoredTensor, part: range | None = None, dim: int = 0, *, scales: BlockScales | None = None
    ) -> None:
        if stored.dtype not in _DTYPES:
            raise ValueError(f"{stored.file}: tensor {stored.name} has dtype {stored.dtype}, which cannot be loaded")
        self.dtype = _DTYPES[stored.dtype] if scales is None else scales.dtype
        self._scales = scales
        self._stored = stored
        self._part = part
        self._dim = dim

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what is read."""
        shape = self._stored.shape
        return shape if self._part is None else (*shape[: self._dim], len(self._part), *shape[self._dim + 1 :])

    def is_floating_point(self) -> bool:
        """As of a tensor."""
        return self.dtype.is_floating_point

    def __getitem__(self, index: Any) -> torch.Tensor:
        stored = self._stored
        result = torch.empty(self.shape, dtype=_DTYPES[stored.dtype])
        if not result.numel():
            return result.to(self.dtype)[index]
        if self._part is None:
            _read_into(result, stored.file, stored.start)
        else:
            num_stretches = math.prod(stored.shape[: self._dim])
            stride = stored.num_bytes // num_stretches
            start = stored.start + self._part.start * (stride // stored.shape[self._dim])
            _read_into(result, stored.file, start, num_stretches, stride)
        if self._scales is not None:
            first = [0, 0]
            first[self._dim] = self._part.start if self._part is not None else 0
            result = self._scales.undo(result, *first)
        return result[index]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensors:
    """The tensors of a checkpoint that a model takes.

    Attributes:
        folder: of the checkpoint.
        tensors: by name.
        scales: of those that are stored in blocks, by the same name.
    """

    folder: Path
    tensors: Mapping[str, StoredTensor]
    scales: Mapping[str, BlockScales] = field(default_factory=dict)

    def slice(self, name: str, part: range | None = None, dim: int = 0) -> StoredSlice:
        """One of them, or a part of it; see `StoredSlice`."""
        return StoredSlice(self.tensors[name], part, dim, scales=self.scales.get(name))


class ReadWhenUsed:
    """One expert's matrix in a file, on its way to be stacked: read by the first torch function that gets it.

    transformers asks for the content of all tensors at once, before it stacks the first; were they read then, a rank
    would need memory for its experts twice.
    """

    def __init__(self, stored: StoredSlice, device: Any = None, dtype: torch.dtype | None = None) -> None:
        self._stored = stored
        self._device, self._dtype = device, dtype or stored.dtype

    @property
    def dtype(self) -> torch.dtype:
        """Of what will be read."""
        return self._dtype

    def is_floating_point(self) -> bool:
        """As of a tensor."""
        return self.dtype.is_floating_point

    def __getitem__(self, index: Any) -> Any:
        return self if index is Ellipsis else self.read()[index]

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> "ReadWhenUsed":
        """As of a tensor, but nothing is read yet."""
        return ReadWhenUsed(self._stored, device or self._device, dtype or self._dtype)

    def read(self) -> torch.Tensor:
        """The tensor."""
        return self._stored[...].to(device=self._device, dtype=self._dtype)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*_read(args), **_read(kwargs or {}))


def _read(value: Any) -> Any:
    """Arguments of a torch function, with everything read that had waited for it."""
    if isinstance(value, ReadWhenUsed):
        return value.read()
    if isinstance(value, list | tuple):
        return type(value)(_read(each) for each in value)
    return {key: _read(each) for key, each in value.items()} if isinstance(value, dict) else value


def _read_into(tensor: torch.Tensor, file: Path, start: int, num_stretches: int = 1, stride: int = 0) -> None:
    """Fill a contiguous tensor from equal stretches of a file, `stride` bytes from one start to the next. One that
    became shorter since its header was read is an error."""
    bytes_of_tensor: Any = tensor.flatten().view(torch.uint8).numpy()
    stretch = bytes_of_tensor.nbytes // num_stretches
    with open(file, "rb", buffering=0) as source:
        for number in range(num_stretches):
            content = memoryview(bytes_of_tensor)[number * stretch : (number + 1) * stretch]
            place = start + number * stride
            while content:
                count = os.preadv(source.fileno(), [content], place)
                if count == 0:
                    raise ValueError(f"{file}: it ends where a tensor should be; the file is incomplete, copy it again")
                content, place = content[count:], place + count
