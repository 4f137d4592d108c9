"""`load` and `save`: checkpoints in transformers' format, with the wiring in their config.

A rewired checkpoint has transformers' tensors and names, and in its config.json

    "model_type": "farskip_<family>"          so that a plain load by transformers refuses instead of silently
    "farskip": {"base_model_type": "<family>",  computing the ordinary function
                "wiring": {...}}              see `Wiring.to_dict`

A checkpoint of an ordinary model is left a plain transformers checkpoint. A family that is born rewired has keys of its
own for its wiring (`farskip.models.family.WiringKeys`): they are read, and written where they can say the wiring. Which
family a checkpoint is of is decided by ``architectures``: a ``model_type`` can claim what it likes.
"""

import importlib.util
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from farskip.models.attach import attachment_of
from farskip.models.family import Family, family_of_architecture, family_of_model
from farskip.models.parallelize import full_state_dict, parallelize
from farskip.models.surgery import rewire, wiring_of
from farskip.wiring import Wiring

_KEY = "farskip"
_PREFIX = "farskip_"
_UNDONE_WHEN_LOADED = "mxfp4"


def load(
    path: str | os.PathLike[str],
    wiring: str | Wiring | None = None,
    layers: str | Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    mesh: DeviceMesh | None = None,
) -> Any:
    """Load a checkpoint in transformers' format.

    Args:
        path: folder with config.json and safetensors.
        wiring: how to wire it; None for what the checkpoint says (a plain one is ordinary).
        layers: which layers, for a name; all if None.
        dtype: of the parameters; None for that of the checkpoint.
        device: where the model goes.
        mesh: spread the experts over its ``ep`` axis (see `parallelize`).

    Returns:
        The transformers model, in evaluation mode.

    Raises:
        ValueError: not a checkpoint, unknown family, missing or extra tensors, a damaged file, a quantization that
            cannot be undone.
        RuntimeError: undoing a quantization needs accelerate, which is not installed.

    Note: with a mesh, every rank reads the whole checkpoint into memory before it keeps its slice.
    """
    folder = Path(path)
    config_dict = _read_config(folder)
    family = _family_of(folder, config_dict)
    recorded = _recorded_wiring(folder, family, config_dict)
    config_dict.pop("auto_map", None)  # names files of remote code, which is not run here and not written by `save`
    _ask_for_plain_weights(folder, config_dict)
    model = _load_transformers(folder, family, config_dict, dtype).to(device)
    chosen = recorded if wiring is None else wiring
    if chosen is None and layers is not None:
        raise ValueError(f"load {folder}: layers={layers!r} needs wiring=, the checkpoint itself is ordinary")
    if chosen is not None:
        rewire(model, chosen, "all" if layers is None else layers)
    return parallelize(model, mesh) if mesh is not None else model


def save(model: Any, path: str | os.PathLike[str]) -> None:
    """Write a checkpoint in transformers' format whose config records the wiring.

    Args:
        model: a transformers model of a known family; for a parallel one a collective, rank 0 writes.
        path: a folder; if a checkpoint stands there it is replaced when the new one is complete.

    Raises:
        ValueError: unknown family, or `path` holds something that is not a checkpoint.
    """
    family, wiring, folder = family_of_model(model), wiring_of(model), Path(path)
    state = full_state_dict(model)
    attachment = attachment_of(model)
    is_parallel = attachment is not None and attachment.mesh is not None
    if not is_parallel or dist.get_rank() == 0:
        _write(model, state, family, wiring, folder)
    if is_parallel:
        dist.barrier()


def _write(model: Any, state: dict[str, torch.Tensor], family: Family, wiring: Wiring, folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"save {folder}: it is a file, not a folder; choose another path")
    if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").exists():
        raise ValueError(f"save {folder}: the folder holds something that is not a checkpoint; choose another path")
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        model.save_pretrained(fresh, state_dict=state)
        config = json.loads((fresh / "config.json").read_text())
        if _record_wiring(config, family, wiring):
            (fresh / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        if folder.exists():
            replaced = folder.with_name(f".{folder.name}.{os.getpid()}.replaced")
            folder.rename(replaced)
            try:
                fresh.rename(folder)
            except BaseException:
                replaced.rename(folder)
                raise
            shutil.rmtree(replaced)
        else:
            fresh.rename(folder)
    finally:
        if fresh.exists():
            shutil.rmtree(fresh)


def _recorded_wiring(folder: Path, family: Family, config: dict[str, Any]) -> Wiring | None:
    """The wiring that a checkpoint's config records; None if none. Takes our record out of the config."""
    recorded = config.get(_KEY)
    if family.wiring_keys is not None and not isinstance(recorded, dict):
        try:
            return family.wiring_keys.read(config)
        except ValueError as error:
            raise ValueError(f"load {folder}: config.json: {error}") from None
    if recorded is None:
        return None
    if not isinstance(recorded, dict) or set(recorded) != {"base_model_type", "wiring"}:
        raise ValueError(
            f"load {folder}: config.json has {_KEY}={recorded!r}, which records no wiring; write base_model_type and "
            "wiring there, or copy the file again"
        )
    config["model_type"] = config.pop(_KEY)["base_model_type"]
    return Wiring.from_dict(recorded["wiring"])


def _ask_for_plain_weights(folder: Path, config: dict[str, Any]) -> None:
    """Have transformers undo a quantization as it loads: quantized experts cannot be called by row, nor trained."""
    quantization = config.get("quantization_config")
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method != _UNDONE_WHEN_LOADED:
        raise ValueError(
            f"load {folder}: the checkpoint is quantized ({method!r}), and only {_UNDONE_WHEN_LOADED} is undone when "
            "loaded: give a checkpoint in bf16"
        )
    if importlib.util.find_spec("accelerate") is None:
        raise RuntimeError(
            f"load {folder}: undoing the quantization ({method!r}) needs accelerate; pip install accelerate"
        )
    config["quantization_config"] = {**quantization, "dequantize": True}


def _record_wiring(config: dict[str, Any], family: Family, wiring: Wiring) -> bool:
    """Write the wiring into a config, in the family's own keys where they can say it. Whether anything was changed."""
    if family.wiring_keys is not None:
        own = family.wiring_keys.write(wiring)
        if own is not None and family.wiring_keys.read(config) == wiring:
            return False
        for name in family.wiring_keys.names:
            config.pop(name, None)
        if own is not None:
            config.update(own)
            return True
    if wiring.name == "ordinary":
        return False
    config[_KEY] = {"base_model_type": family.model_type, "wiring": wiring.to_dict()}
    config["model_type"] = _PREFIX + family.model_type
    return True


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


def _family_of(folder: Path, config: dict[str, Any]) -> Family:
    architectures = config.get("architectures")
    try:
        return family_of_architecture(architectures[0] if isinstance(architectures, list) and architectures else None)
    except ValueError as error:
        raise ValueError(f"load {folder}: {error}") from None


def _load_transformers(folder: Path, family: Family, config_dict: dict[str, Any], dtype: torch.dtype | None) -> Any:
    import transformers
    from safetensors import SafetensorError

    if config_dict.get("model_type") != family.model_type:
        raise ValueError(
            f"load {folder}: architecture {family.architecture} goes with model_type {family.model_type!r}, but "
            f"config.json says {config_dict.get('model_type')!r}; correct whichever is wrong"
        )
    config = transformers.AutoConfig.for_model(**config_dict)
    try:
        model, info = family.model_class().from_pretrained(
            folder,
            config=config,
            dtype="auto" if dtype is None else dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
        )
    except (SafetensorError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "conversion" not in str(error):
            raise
        # RuntimeError: transformers could not stack a layer's experts, and only its log says which one is not there.
        absent = _absent_experts(folder) if isinstance(error, RuntimeError) else []
        why = f"missing tensors: {', '.join(absent[:3])}" if absent else " ".join(str(error).split())
        raise ValueError(f"load {folder}: {why}; the checkpoint is incomplete or damaged") from error
    if "quantization_config" in config_dict:
        model._weight_conversions = None  # of the quantized tensors: `save` would write plain ones under their names
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            names = sorted(str(key) for key in info[kind])
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ValueError(
                f"load {folder}: {kind.replace('_keys', '')} tensors: {shown}; the checkpoint does not fit its config"
            )
    return model


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
