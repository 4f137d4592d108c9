"""`load` and `save`: checkpoints in transformers' format, with the wiring in their config (`farskip.models.export`).

Every tensor of a checkpoint is accounted for: it is a parameter of the model, or of an MTP head and carried through to
what `save` writes (`farskip.models.mtp_tensors`), or `load` fails and names it. The only exception are buffers that old
checkpoints hold and that are computed from the config, the rotary embedding's frequencies.
"""

import importlib.util
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from farskip.models.attach import attachment_of
from farskip.models.checkpoint_files import has_safetensors, read_checkpoint
from farskip.models.export import read_record
from farskip.models.family import Family
from farskip.models.folder_copy import replaced_when_complete
from farskip.models.fp8 import METHOD, Fp8
from farskip.models.mtp_tensors import carried_mtp_tensors, carry_mtp_tensors, everything_reported, is_mtp
from farskip.models.parallelize import Spread, check_spread, full_state_dict, parallelize
from farskip.models.rank_slices import RankSlices, load_slice, slices_here
from farskip.models.saving import complete_checkpoint
from farskip.models.surgery import rewire, wiring_of
from farskip.parallel.together import first_rank_says
from farskip.wiring import Wiring

_UNDONE_BY_TRANSFORMERS = "mxfp4"


def load(
    path: str | os.PathLike[str],
    wiring: str | Wiring | None = None,
    layers: str | Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    mesh: DeviceMesh | None = None,
    **spread: Unpack[Spread],
) -> Any:
    """Load a checkpoint in transformers' format.

    Args:
        path: folder with config.json and safetensors.
        wiring: how to wire it; None for what the checkpoint says (a plain one is ordinary).
        layers: which layers, for a name; all if None.
        dtype: of the parameters; None for that of the checkpoint.
        device: where the model goes.
        mesh: spread the experts over its ``ep`` axis, and cut the other sub-blocks over its ``tp`` axis (see
            `parallelize`).
        spread: with a mesh, further settings of `parallelize`: ``schedule``, ``chunks``, ``capacity``,
            ``sequence_parallel``, ``side_stream``, ``link``, ``tensor_link``, ``times``.

    Returns:
        The transformers model, in evaluation mode.

    Raises:
        TypeError: a setting that `parallelize` does not have.
        ValueError: not a checkpoint, unknown family, missing or extra tensors, a damaged file, a quantization that
            cannot be undone, settings of `parallelize` without a mesh, or what it refuses.
        RuntimeError: undoing a quantization needs accelerate, which is not installed.

    Note: with a mesh, a rank reads of the experts its own only, and of what tensor parallelism cuts its slices only
    (`farskip.models.rank_slices`). Where it has to read everything although it keeps a part, rank 0 warns.
    """
    folder = Path(path)
    for name in spread:  # now, not after everything was read
        if name not in Spread.__annotations__:
            raise TypeError(f"load() got an unexpected keyword argument {name!r}")
        if mesh is None:
            raise ValueError(f"load {folder}: {name}= spreads a model over ranks and needs mesh=")
    if mesh is not None:
        check_spread(mesh, **spread)
    config_dict = _read_config(folder)
    family, recorded = read_record(folder, config_dict)
    fp8 = undo_quantization(folder, config_dict, dtype)
    here = None if mesh is None else slices_here(folder, config_dict, mesh)
    model = _load_transformers(folder, family, config_dict, dtype, here, fp8).to(device)
    chosen = recorded if wiring is None else wiring
    if chosen is None and layers is not None:
        raise ValueError(f"load {folder}: layers={layers!r} needs wiring=, the checkpoint itself is ordinary")
    if chosen is not None:
        rewire(model, chosen, "all" if layers is None else layers)
    return parallelize(model, mesh, already_cut=here is not None, **spread) if mesh is not None else model


def save(model: Any, path: str | os.PathLike[str]) -> None:
    """Write a checkpoint in transformers' format whose config records the wiring.

    Args:
        model: a transformers model of a known family; for a parallel one a collective, rank 0 writes.
        path: a folder; if a checkpoint stands there it is replaced when the new one is complete.

    Raises:
        ValueError: unknown family, or `path` holds something that is not a checkpoint.
    """
    wiring, folder = wiring_of(model), Path(path).resolve()
    attachment = attachment_of(model)
    if attachment is None or attachment.mesh is None:
        _check_target(folder)
        _write(model, full_state_dict(model), wiring, folder)
        return
    _on_first_rank(lambda: _check_target(folder))  # before anything is gathered
    state = full_state_dict(model, first_rank_only=True)
    _on_first_rank(lambda: _write(model, state, wiring, folder))


def _check_target(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"save {folder}: it is a file, not a folder; choose another path")
    if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").exists():
        raise ValueError(f"save {folder}: the folder holds something that is not a checkpoint; choose another path")


def _write(model: Any, state: dict[str, torch.Tensor], wiring: Wiring, folder: Path) -> None:
    with replaced_when_complete(folder) as fresh:
        model.save_pretrained(fresh, state_dict=state)
        if attachment_of(model) is None:  # else its own `save_pretrained` has done so
            complete_checkpoint(model, wiring, fresh)


def _on_first_rank(action: Callable[[], None]) -> None:
    """Rank 0 acts, as long as it takes, and all ranks go on together or raise together. A collective."""
    error: BaseException | None = None
    if dist.get_rank() == 0:
        try:
            action()
        except BaseException as caught:
            error = caught
    said = first_rank_says("" if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    if said:
        raise RuntimeError(f"save: rank {dist.get_rank()} stops because rank 0 could not write: {said}")


def undo_quantization(folder: Path, config: dict[str, Any], dtype: torch.dtype | None) -> Fp8 | None:
    """Quantized experts can neither be called by row nor trained: have transformers undo the quantization as it loads,
    or take it out of the config, if it is one that is undone here as the files are read."""
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    fp8 = Fp8.of(folder, config, dtype)
    if fp8 is not None:
        if not has_safetensors(folder):
            raise ValueError(f"load {folder}: the checkpoint is in fp8 and not in safetensors; give one in bf16")
        del config["quantization_config"]
        return fp8
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method != _UNDONE_BY_TRANSFORMERS:
        raise ValueError(
            f"load {folder}: the checkpoint is quantized ({method!r}), and only {METHOD} and {_UNDONE_BY_TRANSFORMERS} "
            "are undone when loaded: give a checkpoint in bf16"
        )
    if importlib.util.find_spec("accelerate") is None:
        raise RuntimeError(
            f"load {folder}: undoing the quantization ({method!r}) needs accelerate; pip install accelerate"
        )
    config["quantization_config"] = {**quantization, "dequantize": True}
    return None


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(
            f"load {folder}: no config.json there; give the folder of a checkpoint in transformers' format"
        )
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"load {file}: not JSON ({error}); the file is damaged, copy it again") from error
    if not isinstance(config, dict):
        raise ValueError(
            f"load {file}: {type(config).__name__} instead of an object; the file is damaged, copy it again"
        )
    return config


def _load_transformers(
    folder: Path,
    family: Family,
    config_dict: dict[str, Any],
    dtype: torch.dtype | None,
    here: RankSlices | None = None,
    fp8: Fp8 | None = None,
) -> Any:
    import transformers
    from safetensors import SafetensorError

    if config_dict.get("model_type") != family.model_type:
        raise ValueError(
            f"load {folder}: architecture {family.architecture} goes with model_type {family.model_type!r}, but "
            f"config.json says {config_dict.get('model_type')!r}; correct whichever is wrong"
        )
    config = transformers.AutoConfig.for_model(**config_dict)
    arguments = {
        "dtype": dtype or ("auto" if fp8 is None else fp8.dtype),
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # reported below, by name
    }
    model_class = family.model_class()
    reporting = everything_reported(model_class)
    try:
        if here is None and fp8 is None:
            model, info = reporting.from_pretrained(folder, config=config, **arguments)
        else:
            family = replace(family, own_class=lambda: reporting)
            model, info = load_slice(family, folder, config, here or RankSlices(), fp8, **arguments)
    except (SafetensorError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "conversion" not in str(error):
            raise
        if has_safetensors(folder):
            read_checkpoint(folder)  # its error names the file that is damaged, which safetensors' own does not
        # RuntimeError: transformers could not stack a layer's experts, and only its log says which one is not there.
        absent = _absent_experts(folder) if isinstance(error, RuntimeError) else []
        why = f"missing tensors: {', '.join(absent[:3])}" if absent else " ".join(str(error).split())
        raise ValueError(f"load {folder}: {why}; the checkpoint is incomplete or damaged") from error
    model.__class__ = model_class
    carry_mtp_tensors(model, folder, config_dict, fp8)
    if carried_mtp_tensors(model) is not None:
        of_head = is_mtp(config_dict)
        info["unexpected_keys"] = [name for name in info["unexpected_keys"] if not of_head(name)]
    if "quantization_config" in config_dict:
        model._weight_conversions = None  # of the quantized tensors: `save` would write plain ones under their names
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            names = sorted(str(key) for key in info[kind])
            if kind == "unexpected_keys":
                names = _as_stored(folder, names)
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ValueError(
                f"load {folder}: {kind.replace('_keys', '')} tensors: {shown}; the checkpoint does not fit its config"
            )
    return model


def _as_stored(folder: Path, names: Sequence[str]) -> list[str]:
    """The checkpoint's names of these tensors: transformers reports stacked experts under the name of the stack."""
    stored = read_checkpoint(folder).tensors if has_safetensors(folder) else {}
    found: list[str] = []
    for name in names:
        parts = [] if name in stored else [part for part in stored if part.startswith(f"{name.rpartition('.')[0]}.")]
        found += parts or [name]
    return sorted(set(found))


def _absent_experts(folder: Path) -> list[str]:
    """Names that a complete set of experts would have: every number with every weight."""
    from safetensors import safe_open

    found: dict[str, set[tuple[int, str]]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  not a dict
                if match := re.fullmatch(r"(.*\.experts\.)(\d+)(\..*)", name):
                    found.setdefault(match[1], set()).add((int(match[2]), match[3]))
    absent = []
    for prefix, here in found.items():
        numbers, weights = {number for number, _ in here}, {weight for _, weight in here}
        absent += [
            f"{prefix}{number}{weight}"
            for number in range(max(numbers) + 1)
            for weight in sorted(weights)
            if (number, weight) not in here
        ]
    return absent
