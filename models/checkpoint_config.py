"""config.json of a checkpoint as an ordinary model's: without our record, under the family's own names."""

import json
from pathlib import Path
from typing import Any

from farskip.models.export import read_record
from farskip.models.family import Family
from farskip.wiring import Wiring


def read_config(folder: Path) -> dict[str, Any]:
    """What config.json holds.

    Raises:
        ValueError: it is not there, or not an object.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder}: no config.json there; give the folder of a checkpoint in transformers' format")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error}); the file is damaged, copy it again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file}: {type(config).__name__} instead of an object; the file is damaged, copy it again")
    return config


def check_model_type(family: Family, config: dict[str, Any]) -> None:
    """Refuse an ordinary config whose model_type lies.

    Raises:
        ValueError: it is not the family's.
    """
    if config.get("model_type") != family.model_type:
        raise ValueError(
            f"architecture {family.architecture} goes with model_type {family.model_type!r}, but config.json says "
            f"{config.get('model_type')!r}; correct whichever is wrong"
        )


def transformers_config(family: Family, config: dict[str, Any]) -> Any:
    """An ordinary config.json as transformers' object, with all defaults.

    Raises:
        ValueError: its model_type is not the family's.
    """
    import transformers

    check_model_type(family, config)
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    return transformers.AutoConfig.for_model(**plain)


def ordinary_config(folder: Path) -> tuple[Family, Wiring | None, dict[str, Any]]:
    """Family, recorded wiring (None: an ordinary checkpoint) and the ordinary config.

    Raises:
        ValueError: no checkpoint, an unknown family, or a record that says no wiring.
    """
    config = read_config(folder)
    family, wiring = read_record(folder, config)
    return family, wiring, config
