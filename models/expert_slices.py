"""Load a checkpoint with this rank's experts only: the others' bytes are never read.

transformers builds the model without memory, renames and stacks what the files hold, and fills it. Two things are done
to it from outside, and the rest is its own code, so that the result is the slice of what it would have loaded, in bits:

* the parameters of the experts are cut to the slice's size before they have memory, and
* instead of files it gets the tensors as a dict: those of other ranks' experts are left out, those that hold all
  experts are cut along their first dimension, and each is read from its file when transformers asks for its content.

Legend: E experts.
"""

import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from farskip.models.attach import layers_of
from farskip.models.checkpoint_files import StoredCheckpoint, StoredTensor, has_safetensors, read_checkpoint
from farskip.models.family import Family
from farskip.parallel.mesh import EP_AXIS, TP_AXIS, axis_group, axis_size

_ONE_EXPERT = re.compile(r"(?P<experts>.*\.experts)\.(?P<number>\d+)\.(?P<weight>.+)")
_ALL_EXPERTS = re.compile(r"(?P<experts>.*\.experts)\.(?P<weight>[^.\d][^.]*)")
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
class ExpertSlice:
    """Which experts are this rank's: the `rank`-th of `size` equal stretches."""

    rank: int
    size: int

    def of(self, num_experts: int) -> range:
        """The numbers of this rank's experts.

        Raises:
            ValueError: the slices would not be equal.
        """
        if num_experts % self.size:
            raise ValueError(
                f"expert parallelism of {self.size} does not divide {num_experts} experts: choose a divisor"
            )
        local = num_experts // self.size
        return range(self.rank * local, (self.rank + 1) * local)


class StoredSlice:
    """A tensor in a file, or some of its rows; `tensor[...]` reads them. What transformers takes for a tensor.

    Args:
        stored: where it lies.
        rows: of its first dimension; all if None.
    """

    def __init__(self, stored: StoredTensor, rows: range | None = None) -> None:
        if stored.dtype not in _DTYPES:
            raise ValueError(f"{stored.file}: tensor {stored.name} has dtype {stored.dtype}, which cannot be loaded")
        self.dtype = _DTYPES[stored.dtype]
        self._stored = stored
        self._rows = rows

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what is read."""
        shape = self._stored.shape
        return shape if self._rows is None else (len(self._rows), *shape[1:])

    def is_floating_point(self) -> bool:
        """As of a tensor."""
        return self.dtype.is_floating_point

    def __getitem__(self, index: Any) -> torch.Tensor:
        stored = self._stored
        result = torch.empty(self.shape, dtype=self.dtype)
        start = stored.start
        if self._rows is not None:
            start += self._rows.start * (stored.num_bytes // stored.shape[0])
        if result.numel():
            _read_into(result, stored.file, start)
        return result[index]


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


def experts_here(folder: Path, config: Mapping[str, Any], mesh: DeviceMesh) -> ExpertSlice | None:
    """The experts that this rank reads; None: all of them. Rank 0 warns if that is more than the mesh lets it keep.

    Args:
        folder: of the checkpoint.
        config: its config.json.
        mesh: of all ranks.
    """
    size, reason = axis_size(mesh, EP_AXIS), why_whole(folder, config)
    if size > 1 and reason is not None:
        _warn(mesh, f"load {folder}: every rank reads the whole checkpoint, because {reason}")
    elif axis_size(mesh, TP_AXIS) > 1:
        _warn(
            mesh,
            f"load {folder}: every rank reads all of attention, dense MLPs and shared experts before tensor "
            "parallelism cuts them; only experts are read in slices",
        )
    if size == 1 or reason is not None:
        return None
    return ExpertSlice(rank=dist.get_rank(axis_group(mesh, EP_AXIS)), size=size)


def why_whole(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The reason why the experts of a checkpoint cannot be read in slices; None if there is none."""
    if config.get("quantization_config") is not None:
        return "its tensors are quantized, and transformers undoes that as a whole"
    if not has_safetensors(folder):
        return "its tensors are not in safetensors"
    return None


def load_slice(
    family: Family, folder: Path, config: Any, here: ExpertSlice, **arguments: Any
) -> tuple[Any, dict[str, Any]]:
    """What ``from_pretrained`` gives, with this rank's experts only. ``num_experts`` of their modules still is E.

    Args:
        family: of the model.
        folder: of the checkpoint, in safetensors.
        config: transformers' config.
        here: which experts.
        **arguments: for ``from_pretrained``; with ``output_loading_info``.

    Returns:
        The model, and what is missing, unexpected or of another shape.

    Raises:
        ValueError: a damaged file, missing experts, experts that cannot be shared out equally, or another number of
            them than the config says.

    Note: memory of the process is that of the slice and of what transformers needs to stack one layer's.
    """
    from transformers import GenerationConfig

    tensors, counts = _slice_tensors(read_checkpoint(folder), here)
    model_class = family.model_class()
    model, info = _cut_class(family, model_class, here, counts).from_pretrained(
        None, config=config, state_dict=tensors, **arguments
    )
    model.__class__ = model_class
    model.config.name_or_path = model.name_or_path = str(folder)
    # As transformers does where it is given a folder.
    try:
        model.generation_config = GenerationConfig.from_pretrained(folder)
    except OSError:
        model.generation_config = GenerationConfig.from_pretrained(
            folder, config_file_name="config.json", _from_model_config=True
        )
    return model, info


def _slice_tensors(
    stored: StoredCheckpoint, here: ExpertSlice
) -> tuple[dict[str, StoredSlice | ReadWhenUsed], dict[str, int]]:
    """This rank's part of every tensor, and how many experts each MoE has in the checkpoint."""
    one, all_of = {}, {}
    found: dict[str, dict[str, set[int]]] = {}
    for name, tensor in stored.tensors.items():
        if match := _ONE_EXPERT.fullmatch(name):
            one[name] = match
            found.setdefault(match["experts"], {}).setdefault(match["weight"], set()).add(int(match["number"]))
        elif (match := _ALL_EXPERTS.fullmatch(name)) and tensor.shape:
            all_of[name] = match
            found.setdefault(match["experts"], {})[match["weight"]] = set(range(tensor.shape[0]))
    counts = {
        experts: 1 + max(max(numbers, default=-1) for numbers in weights.values()) for experts, weights in found.items()
    }
    _refuse_absent(stored.folder, found, counts)
    slices: dict[str, StoredSlice | ReadWhenUsed] = {}
    for name, tensor in stored.tensors.items():
        if name in one:
            mine = here.of(counts[one[name]["experts"]])
            if int(one[name]["number"]) in mine:
                slices[name] = ReadWhenUsed(StoredSlice(tensor))
        elif name in all_of:
            slices[name] = StoredSlice(tensor, here.of(counts[all_of[name]["experts"]]))
        else:
            slices[name] = StoredSlice(tensor)
    return slices, counts


def _refuse_absent(folder: Path, found: Mapping[str, Mapping[str, set[int]]], counts: Mapping[str, int]) -> None:
    """An expert of another rank's would not be missed here, and that rank would be alone with the error."""
    absent = [
        f"{experts}.{number}.{weight}"
        for experts, weights in found.items()
        for weight, numbers in weights.items()
        for number in range(counts[experts])
        if number not in numbers
    ]
    if absent:
        raise ValueError(
            f"load {folder}: missing tensors: {', '.join(absent[:3])}; the checkpoint is incomplete or damaged"
        )


def _cut_class(family: Family, model_class: Any, here: ExpertSlice, counts: Mapping[str, int]) -> Any:
    """The model's class, whose experts are this rank's when it is made. Named as the class itself, because transformers
    looks up its abilities, its renamings and its hooks by name and module."""

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, *args, **kwargs)
        for layer in layers_of(self):
            experts = family.sub_blocks(layer).experts
            if experts is not None:
                _cut_experts(experts, here, set(counts.values()))

    names = {"__module__": model_class.__module__, "__qualname__": model_class.__qualname__}
    return type(model_class.__name__, (model_class,), {"__init__": init, **names})


def _cut_experts(experts: nn.Module, here: ExpertSlice, stored_counts: set[int]) -> None:
    num_experts = int(experts.num_experts)  # type: ignore[arg-type]
    if stored_counts - {num_experts}:
        raise ValueError(
            f"the checkpoint has {', '.join(str(count) for count in sorted(stored_counts))} experts in a layer, its "
            f"config {num_experts}; correct config.json"
        )
    local = len(here.of(num_experts))
    for name, parameter in list(experts.named_parameters(recurse=False)):
        part = torch.empty((local, *parameter.shape[1:]), dtype=parameter.dtype, device=parameter.device)
        setattr(experts, name, nn.Parameter(part, requires_grad=parameter.requires_grad))


def _read_into(tensor: torch.Tensor, file: Path, start: int) -> None:
    """Fill a contiguous tensor from a file. One that became shorter since its header was read is an error."""
    bytes_of_tensor: Any = tensor.flatten().view(torch.uint8).numpy()
    content = memoryview(bytes_of_tensor)
    with open(file, "rb", buffering=0) as source:
        while content:
            count = os.preadv(source.fileno(), [content], start)
            if count == 0:
                raise ValueError(f"{file}: it ends where a tensor should be; the file is incomplete, copy it again")
            content, start = content[count:], start + count


def _warn(mesh: DeviceMesh, message: str) -> None:
    if mesh.get_rank() == 0:
        warnings.warn(message, stacklevel=4)  # where `load` was called
