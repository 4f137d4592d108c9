"""config.json of a checkpoint as an ordinary model's: without our record, under the family's own names."""

from pathlib import Path
from typing import Any

from farskip.models.config_file import read_config
from farskip.models.export import read_record
from farskip.models.family import Family
from farskip.wiring import Wiring


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
        ValueError: its model_type is not the family's, or a value is of another kind than transformers expects.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    check_model_type(family, config)
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    try:
        return transformers.AutoConfig.for_model(**plain)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ValueError(f"config.json does not make a {family.name}: {' '.join(str(error).split())}") from error


def ordinary_config(folder: Path) -> tuple[Family, Wiring | None, dict[str, Any]]:
    """Family, recorded wiring (None: an ordinary checkpoint) and the ordinary config.

    Raises:
        ValueError: no checkpoint, an unknown family, or a record that says no wiring.
    """
    config = read_config(folder)
    family, wiring = read_record(folder, config)
    return family, wiring, config
