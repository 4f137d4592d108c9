"""config.json of a checkpoint, as it is. No torch here."""

import json
from pathlib import Path
from typing import Any


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
