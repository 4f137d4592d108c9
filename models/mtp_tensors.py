"""Tensors of multi-token-prediction (MTP) heads: kept aside when a model is loaded, written back unchanged when saved.

transformers' models have no such heads, and it drops their tensors without a word. A wiring leaves them ordinary; so
nothing is computed with them here, and nothing is lost. Their names in a checkpoint:

    model.layers.<k>.*      k from num_hidden_layers on, as many layers as num_nextn_predict_layers says (DeepSeek-V3,
                            GLM-4-MoE; GLM's and DeepSeek's own copies of embedding and head are among them)
    *.mtp_*, *.mtp.*        (ERNIE-4.5)

They stay in the files they came from, mapped into memory: on Linux the bytes remain even if the file is removed or
replaced by another, but not if it is overwritten in place. So they keep their dtype whatever `load` is asked for, and
are as old as the checkpoint they came from: training does not touch them. Matrices in fp8 are undone when they are
written, because the model around them is plain by then.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch

from farskip.models.checkpoint_files import INDEX, SINGLE, has_safetensors, read_checkpoint
from farskip.models.fp8 import SUFFIX, Fp8
from farskip.models.stored_slice import undo_blocks

SHARD = "model-mtp.safetensors"
"""The file that `write_mtp_tensors` writes; its metadata says which files of which checkpoint the tensors came from."""

_CARRIED = "_farskip_mtp_tensors"
_NAMED = re.compile(r"(?:^|\.)mtp[._]")
_SINGLE_OF_TWO = "model-00001-of-00001.safetensors"


class CarriedTensors:
    """Tensors [any shape] by name, as they lie in their files. Never changed, so copies of a model share them."""

    def __init__(self, tensors: dict[str, torch.Tensor], files: dict[str, Path], fp8: Fp8 | None = None) -> None:
        self.tensors = tensors
        self.files = files
        self._fp8 = fp8

    def plain(self) -> dict[str, torch.Tensor]:
        """Them, with matrices in fp8 undone."""
        if self._fp8 is None:
            return self.tensors
        scales = {name: self.tensors[name + SUFFIX] for name in self.tensors if name + SUFFIX in self.tensors}
        return {
            name: undo_blocks(tensor, scales[name], self._fp8.block, self._fp8.dtype) if name in scales else tensor
            for name, tensor in self.tensors.items()
            if name.removesuffix(SUFFIX) not in scales or name in scales
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


def is_mtp(config: dict[str, Any]) -> Callable[[str], bool]:
    """Whether a tensor's name is one of an MTP head, in a checkpoint with this ordinary config."""
    first, extra = config.get("num_hidden_layers"), config.get("num_nextn_predict_layers")
    layers = range(first, first + extra) if isinstance(first, int) and isinstance(extra, int) else ()
    prefixes = tuple(f"model.layers.{layer}." for layer in layers)
    return lambda name: name.startswith(prefixes) or _NAMED.search(name) is not None


def everything_reported(model_class: Any) -> Any:
    """A model's class that reports every tensor it does not use; transformers' own leaves some out. Named as the class
    itself, because transformers looks up its abilities and its renamings by name and module."""

    def adjust(self: Any, loading_info: Any) -> None:
        ignored, self._keys_to_ignore_on_load_unexpected = self._keys_to_ignore_on_load_unexpected, set()
        try:
            model_class._adjust_missing_and_unexpected_keys(self, loading_info)
        finally:
            self._keys_to_ignore_on_load_unexpected = ignored

    names = {"__module__": model_class.__module__, "__qualname__": model_class.__qualname__}
    attributes = {"_adjust_missing_and_unexpected_keys": adjust, **names}
    return type(model_class.__name__, (model_class,), attributes)


def carry_mtp_tensors(model: Any, folder: Path, config: dict[str, Any], fp8: Fp8 | None = None) -> None:
    """Keep the MTP tensors of the checkpoint that a model was loaded from, for `write_mtp_tensors`.

    Args:
        model: gets them.
        folder: of the checkpoint.
        config: its ordinary config.
        fp8: how its matrices are quantized; None for plain ones.
    """
    from safetensors import safe_open

    if not has_safetensors(folder):
        return
    wanted = is_mtp(config)
    tensors, files = {}, {}
    for file in read_checkpoint(folder).files:
        names = [tensor.name for tensor in file.tensors if wanted(tensor.name)]
        if names:
            with safe_open(file.path, framework="pt") as opened:
                tensors.update({name: opened.get_tensor(name) for name in names})
            files.update(dict.fromkeys(names, file.path.resolve()))
    if tensors:
        setattr(model, _CARRIED, CarriedTensors(tensors, files, fp8))


def carried_mtp_tensors(model: Any) -> CarriedTensors | None:
    """What `carry_mtp_tensors` kept; None if nothing."""
    return getattr(model, _CARRIED, None)


def refuse_overwriting(model: Any, folder: Path) -> None:
    """Before files in `folder` are overwritten in place.

    Raises:
        ValueError: the model's MTP tensors lie there.
    """
    carried = carried_mtp_tensors(model)
    if carried is not None and any(file.parent == folder.resolve() for file in carried.files.values()):
        raise ValueError(
            f"save_pretrained {folder}: the model's MTP tensors are read from this folder and would be overwritten; "
            "choose another folder, or use farskip.save, which replaces the folder as a whole"
        )


def write_mtp_tensors(model: Any, folder: Path) -> None:
    """Add the MTP tensors to a checkpoint that transformers has just written: one file more, and the index."""
    from safetensors.torch import save_file

    carried = carried_mtp_tensors(model)
    if carried is None:
        return
    sources = sorted({file.name for file in carried.files.values()})
    tensors = carried.plain()
    save_file(tensors, folder / SHARD, metadata={"format": "pt", "taken_from": ", ".join(sources)})
    if (folder / INDEX).exists():
        index = json.loads((folder / INDEX).read_text())
    else:
        stored = read_checkpoint(folder)
        (folder / SINGLE).rename(folder / _SINGLE_OF_TWO)  # transformers would read this name and ask no index
        index = {
            "metadata": {"total_size": sum(tensor.num_bytes for tensor in stored.tensors.values())},
            "weight_map": dict.fromkeys(sorted(stored.tensors), _SINGLE_OF_TWO),
        }
    index["weight_map"].update(dict.fromkeys(sorted(tensors), SHARD))
    index["metadata"]["total_size"] += sum(tensor.nbytes for tensor in tensors.values())
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
