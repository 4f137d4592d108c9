"""Load a checkpoint with this rank's experts and slices only: the bytes of the others' are never read.

transformers builds the model without memory, renames and stacks what the files hold, and fills it. Two things are done
to it from outside, and the rest is its own code, so that the result is the slice of what it would have loaded, in bits:

* the parameters of the experts, and those that tensor parallelism cuts, are cut to the slice's size before they have
  memory, and
* instead of files it gets the tensors as a dict: those of other ranks' experts are left out, those that hold all
  experts are cut along their first dimension, those of attention, dense MLPs and shared experts along the dimension
  that `farskip.models.tensor_parallel` says, and each is read from its file when transformers asks for its content.

Legend: E experts.
"""

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from farskip.models.attach import layers_of
from farskip.models.checkpoint_files import has_safetensors, read_checkpoint
from farskip.models.family import Family
from farskip.models.fp8 import Fp8
from farskip.models.stored_slice import ReadWhenUsed, StoredSlice, StoredTensors
from farskip.models.tensor_parallel import check_tensor_parallel, cut_parameters
from farskip.parallel.mesh import EP_AXIS, TP_AXIS, axis_group, axis_size, check_mesh

_ONE_EXPERT = re.compile(r"(?P<experts>.*\.experts)\.(?P<number>\d+)\.(?P<weight>.+)")
_ALL_EXPERTS = re.compile(r"(?P<experts>.*\.experts)\.(?P<weight>[^.\d][^.]*)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """Which part of something is this rank's: the `rank`-th of `size` equal stretches."""

    rank: int
    size: int

    def of(self, length: int, what: str = "entries") -> range:
        """The numbers in this rank's stretch of 0..length-1.

        Raises:
            ValueError: the stretches would not be equal.
        """
        if length % self.size:
            raise ValueError(f"parallelism of {self.size} does not divide {length} {what}: choose a divisor")
        local = length // self.size
        return range(self.rank * local, (self.rank + 1) * local)


@dataclass(frozen=True, kw_only=True, slots=True)
class RankSlices:
    """What of a checkpoint is this rank's.

    Attributes:
        experts: of every layer, over the ``ep`` axis.
        tensors: of what is cut over the ``tp`` axis.
    """

    experts: Share = Share(rank=0, size=1)
    tensors: Share = Share(rank=0, size=1)


def slices_here(folder: Path, config: Mapping[str, Any], mesh: DeviceMesh) -> RankSlices | None:
    """What this rank reads; None: everything. Rank 0 warns if that is more than the mesh lets it keep.

    Args:
        folder: of the checkpoint.
        config: its config.json.
        mesh: of all ranks.

    Raises:
        ValueError: a mesh that `check_mesh` refuses.
    """
    check_mesh(mesh)
    if axis_size(mesh, EP_AXIS) == axis_size(mesh, TP_AXIS) == 1:
        return None
    reason = why_whole(folder, config)
    if reason is not None:
        _warn(mesh, f"load {folder}: every rank reads the whole checkpoint, because {reason}")
        return None
    return places_here(mesh)


def places_here(mesh: DeviceMesh) -> RankSlices:
    """What is this rank's of any model on a mesh."""
    return RankSlices(experts=_place(mesh, EP_AXIS), tensors=_place(mesh, TP_AXIS))


def _place(mesh: DeviceMesh, axis: str) -> Share:
    """What is this rank's along an axis."""
    size = axis_size(mesh, axis)
    return Share(rank=dist.get_rank(axis_group(mesh, axis)) if size > 1 else 0, size=size)


def why_whole(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The reason why a checkpoint cannot be read in slices; None if there is none."""
    if config.get("quantization_config") is not None:
        return "its tensors are quantized, and transformers undoes that as a whole"
    if not has_safetensors(folder):
        return "its tensors are not in safetensors"
    return None


def load_slice(
    family: Family, folder: Path, config: Any, here: RankSlices, fp8: Fp8 | None = None, **arguments: Any
) -> tuple[Any, dict[str, Any]]:
    """What ``from_pretrained`` gives, with this rank's experts and slices only. What modules say of themselves, as
    ``num_experts`` or ``out_features``, still is of the whole.

    Args:
        family: of the model.
        folder: of the checkpoint, in safetensors.
        config: transformers' config.
        here: which of them.
        fp8: how its matrices are quantized; None for plain ones.
        **arguments: for ``from_pretrained``; with ``output_loading_info``.

    Returns:
        The model, and what is missing, unexpected or of another shape.

    Raises:
        ValueError: a damaged file, missing experts or scales, experts that cannot be shared out equally, another
            number of them than the config says, or what `check_tensor_parallel` refuses. No tensor was read then.

    Note: memory of the process is that of the slice and of what transformers needs to stack one layer's.
    """
    from transformers import GenerationConfig

    files = read_checkpoint(folder)
    stored = StoredTensors(folder=folder, tensors=files.tensors) if fp8 is None else fp8.tensors(files)
    tensors, counts = _slice_experts(stored, here.experts)

    def cut(model: Any) -> None:
        for layer in layers_of(model):
            experts = family.sub_blocks(layer).experts
            if experts is not None:
                _cut_experts(experts, here.experts, set(counts.values()))
        if here.tensors.size > 1:
            tensors.update(_slice_tensors(model, family, stored, here.tensors))

    model_class = family.model_class()
    model, info = _cut_class(model_class, cut).from_pretrained(None, config=config, state_dict=tensors, **arguments)
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


def _slice_experts(stored: StoredTensors, here: Share) -> tuple[dict[str, StoredSlice | ReadWhenUsed], dict[str, int]]:
    """Every tensor, of experts this rank's only; and how many experts each MoE has in the checkpoint."""
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
    for name in stored.tensors:
        if name in one:
            mine = here.of(counts[one[name]["experts"]], "experts")
            if int(one[name]["number"]) in mine:
                slices[name] = ReadWhenUsed(stored.slice(name))
        elif name in all_of:
            slices[name] = stored.slice(name, here.of(counts[all_of[name]["experts"]], "experts"))
        else:
            slices[name] = stored.slice(name)
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


def _slice_tensors(model: Any, family: Family, stored: StoredTensors, here: Share) -> dict[str, StoredSlice]:
    """Cut the parameters of a model that has no memory yet as tensor parallelism does. Returns their parts of files.

    Raises:
        ValueError: what `check_tensor_parallel` refuses, or a tensor that is not as large as the config says.
    """
    check_tensor_parallel(model, family, [family.sub_blocks(layer) for layer in layers_of(model)], here.size)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found, slices = stored.tensors, {}
    for name, dim in cut_parameters(model, family, here.rank, here.size).items():
        # A checkpoint of the backbone alone has names without its prefix.
        tensor = found.get(name) or found.get(name.removeprefix(f"{model.base_model_prefix}."))
        if tensor is None:
            continue  # transformers will say that it is missing
        if tensor.shape != shapes[name]:
            raise ValueError(
                f"load {stored.folder}: mismatched tensors: {tensor.name} has shape {tensor.shape} instead of "
                f"{shapes[name]}; the checkpoint does not fit its config"
            )
        slices[tensor.name] = stored.slice(tensor.name, here.of(tensor.shape[dim]), dim)
    return slices


def _cut_class(model_class: Any, cut: Callable[[Any], None]) -> Any:
    """The model's class, cut when it is made. Named as the class itself, because transformers looks up its abilities,
    its renamings and its hooks by name and module."""

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, *args, **kwargs)
        cut(self)

    names = {"__module__": model_class.__module__, "__qualname__": model_class.__qualname__}
    return type(model_class.__name__, (model_class,), {"__init__": init, **names})


def _cut_experts(experts: nn.Module, here: Share, stored_counts: set[int]) -> None:
    num_experts = int(experts.num_experts)  # type: ignore[arg-type]
    if stored_counts - {num_experts}:
        raise ValueError(
            f"the checkpoint has {', '.join(str(count) for count in sorted(stored_counts))} experts in a layer, its "
            f"config {num_experts}; correct config.json"
        )
    local = len(here.of(num_experts, "experts"))
    for name, parameter in list(experts.named_parameters(recurse=False)):
        part = torch.empty((local, *parameter.shape[1:]), dtype=parameter.dtype, device=parameter.device)
        setattr(experts, name, nn.Parameter(part, requires_grad=parameter.requires_grad))


def _warn(mesh: DeviceMesh, message: str) -> None:
    if mesh.get_rank() == 0:
        warnings.warn(message, stacklevel=4)  # where `load` was called
