"""What a rewired checkpoint's folder holds besides tensors: config.json with the wiring, and the file that reads it.

    "architectures": ["FarSkipForCausalLM"]   engines that choose a model by either name refuse, instead of silently
    "model_type": "farskip_<family>"          computing the ordinary function
    "auto_map": {...}                         names `modeling_farskip.py`, a copy of which stands beside the config, so
                                              that transformers computes the rewired function without farskip
    "farskip": {"base_model_type": "<family>",
                "architecture": "<class>",    what `architectures` of an ordinary checkpoint says
                "wiring": {...}}              see `Wiring.to_dict`

A checkpoint of an ordinary model is left a plain transformers checkpoint. A family that is born rewired has keys of its
own for its wiring (`farskip.models.family.WiringKeys`): they are read, and written where they can say it, with its own
architecture and model_type. Which family a checkpoint is of is decided by ``architectures``: a ``model_type`` can claim
what it likes. Nothing here needs a model in memory.
"""

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

from farskip.models.family import Family, family_of_architecture
from farskip.wiring import Wiring

REMOTE_CODE = "modeling_farskip.py"
"""The file that transformers runs with ``trust_remote_code=True``; it stands in this folder and in every export."""
ARCHITECTURE = "FarSkipForCausalLM"
AUTO_MAP = {
    "AutoConfig": "modeling_farskip.FarSkipConfig",
    "AutoModelForCausalLM": f"modeling_farskip.{ARCHITECTURE}",
}

_KEY = "farskip"
_PREFIX = "farskip_"
_RECORD = ({"base_model_type", "wiring"}, {"base_model_type", "architecture", "wiring"})
"""Keys of a record; checkpoints of farskip's first versions have no architecture in it."""


def export_files(
    config: dict[str, Any], family: Family, wiring: Wiring, folder: Path, *, own_keys: bool = True
) -> None:
    """Write config.json, and the remote-code file where a plain load would not compute the same function.

    Args:
        config: an ordinary config, as `read_record` leaves it; it is not changed.
        family: of the model.
        wiring: to be recorded.
        folder: must exist; what stands there under the two names is replaced.
        own_keys: whether a family with keys of its own for its wiring is written with them.
    """
    written = copy.deepcopy(config)
    written["architectures"] = [family.architecture]
    _record_wiring(written, family, wiring, own_keys)
    code = folder / REMOTE_CODE
    if written["model_type"] != family.model_type or family.own_class is not None:
        written["auto_map"] = dict(AUTO_MAP)
        partial = folder / f".{REMOTE_CODE}.{os.getpid()}.part"
        shutil.copyfile(Path(__file__).with_name(REMOTE_CODE), partial)
        partial.replace(code)
    else:
        written.pop("auto_map", None)
        code.unlink(missing_ok=True)
    # Last, and at once: until then the folder says what it said before.
    partial = folder / f".config.json.{os.getpid()}.part"
    partial.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
    partial.replace(folder / "config.json")


def read_record(folder: Path, config: dict[str, Any]) -> tuple[Family, Wiring | None]:
    """The family of a checkpoint and the wiring that its config records; None: an ordinary one.

    Args:
        folder: for the messages.
        config: what its config.json holds. Our record and ``auto_map`` are taken out, and the family's own
            ``model_type`` and ``architectures`` put back: what is left is an ordinary config under the family's first
            name.

    Raises:
        ValueError: unknown family, or a record that says no wiring.
    """
    config.pop("auto_map", None)  # names files of remote code, which is never run here
    recorded = config.get(_KEY)
    architectures = config.get("architectures")
    if architectures == [ARCHITECTURE]:
        if not isinstance(recorded, dict) or not isinstance(recorded.get("architecture"), str):
            raise _bad_record(folder, recorded)
        architectures = config["architectures"] = [recorded["architecture"]]
    try:
        family = family_of_architecture(architectures[0] if isinstance(architectures, list) and architectures else None)
    except ValueError as error:
        raise ValueError(f"load {folder}: {error}") from None
    if config.get("model_type") in family.other_model_types:
        config["model_type"] = family.model_type
    if family.wiring_keys is not None and not isinstance(recorded, dict):
        try:
            return family, family.wiring_keys.read(config)
        except ValueError as error:
            raise ValueError(f"load {folder}: config.json: {error}") from None
    if recorded is None:
        return family, None
    if not isinstance(recorded, dict) or set(recorded) not in _RECORD:
        raise _bad_record(folder, recorded)
    config["model_type"] = config.pop(_KEY)["base_model_type"]
    return family, Wiring.from_dict(recorded["wiring"])


def _bad_record(folder: Path, recorded: object) -> ValueError:
    return ValueError(
        f"load {folder}: config.json has {_KEY}={recorded!r}, which records no wiring; write base_model_type, "
        "architecture and wiring there, or copy the file again"
    )


def _record_wiring(config: dict[str, Any], family: Family, wiring: Wiring, own_keys: bool) -> None:
    """Write the wiring into a config, in the family's own keys where they can say it."""
    if family.wiring_keys is not None:
        own = family.wiring_keys.write(wiring) if own_keys else None
        if own is not None and family.wiring_keys.read(config) == wiring:
            return
        for name in family.wiring_keys.names:
            config.pop(name, None)
        if own is not None:
            config.update(own)
            return
    if wiring.name == "ordinary" and (own_keys or family.wiring_keys is None):
        return
    config[_KEY] = {
        "base_model_type": family.model_type,
        "architecture": family.architecture,
        "wiring": wiring.to_dict(),
    }
    config["model_type"] = _PREFIX + family.model_type
    config["architectures"] = [ARCHITECTURE]
