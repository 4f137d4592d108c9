"""Rewrite a checkpoint's wiring without loading it: the tensors are copied file by file, only config.json is made anew.

A wiring changes no tensor, so a file of tensors is copied as bytes, in pieces, after its header was compared with its
size. One case changes names: Instella-MoE's own code knows experts one by one, so a file that holds them stacked gets a
new header in front of the same bytes.
"""

import errno
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import disk_usage
from typing import Any

from farskip.models.checkpoint_config import check_model_type, transformers_config
from farskip.models.checkpoint_files import INDEX, StoredCheckpoint, StoredFile, file_header, read_checkpoint
from farskip.models.config_file import read_config
from farskip.models.export import export_files, read_record
from farskip.models.family import Family
from farskip.models.folder_copy import append, append_bytes, replaced_when_complete, size_text
from farskip.models.instella_format import (
    INSTELLA,
    LIES,
    Part,
    experts_one_by_one,
    from_instella,
    refuse_wrong_gates,
    to_instella,
)
from farskip.models.layer_kinds import blocks_of_layers
from farskip.wiring import Wiring

FORMATS = ("hf", "instella")

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz")


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """What `convert` is going to write. Made by `plan_conversion`, which has found everything to be in order.

    Attributes:
        source: folder of the checkpoint.
        target: folder of the new one.
        family: of the model that is written.
        wiring: that is written.
        config: config.json without a wiring.
        own_keys: whether the family's own keys say the wiring, where it has such keys.
        stored: the source's tensors.
        cut: new parts, by the name of the file, for files whose tensors change.
        copied: other files that are copied.
        left_out: names of what is not.
        remarks: what the user should know.
    """

    source: Path
    target: Path
    family: Family
    wiring: Wiring
    config: dict[str, Any]
    own_keys: bool
    stored: StoredCheckpoint
    cut: dict[str, tuple[Part, ...]]
    copied: tuple[Path, ...]
    left_out: tuple[str, ...]
    remarks: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        """How many bytes are copied."""
        return self.stored.num_bytes + sum(path.stat().st_size for path in self.copied)


def plan_conversion(
    source: Path,
    target: Path,
    wiring: str | Wiring | None = None,
    layers: str | Sequence[int] | None = None,
    to: str | None = None,
) -> Conversion:
    """Check everything that can be checked before a byte is written.

    Args:
        source: a checkpoint in transformers' format, in safetensors.
        target: where the new one goes; a checkpoint that stands there is replaced when the new one is complete.
        wiring: see `farskip.rewire`; None for what the checkpoint says.
        layers: which layers, for a name; all if None.
        to: one of `FORMATS`; None for the format that the checkpoint has.

    Raises:
        ValueError: not a checkpoint, unknown family, a wiring that the model cannot have, files that are damaged or
            differ from the index, a target that is in the way, too little room, or a format that cannot say the model.
    """
    try:
        return _plan(source, target, wiring, layers, to)
    except ValueError as error:
        message = str(error).removeprefix("load ")
        raise ValueError(message if str(source) in message else f"{source}: {message}") from None


def convert(conversion: Conversion, progress: Callable[[int], None] = lambda num_bytes: None) -> None:
    """Write the new checkpoint, whole or not at all.

    Args:
        conversion: from `plan_conversion`.
        progress: told how many bytes were copied since the last time.

    Raises:
        ValueError: a file became shorter while it was copied.
        OSError: the disk is full, or something else about it.

    Note: memory is a few megabytes, whatever the size of the checkpoint.
    """
    try:
        with replaced_when_complete(conversion.target) as fresh:
            export_files(conversion.config, conversion.family, conversion.wiring, fresh, own_keys=conversion.own_keys)
            for file in conversion.stored.files:
                _write_file(file, conversion.cut.get(file.path.name), fresh / file.path.name, progress)
            if conversion.stored.index is not None:
                _write_index(conversion, fresh / INDEX)
            for path in conversion.copied:
                with open(fresh / path.name, "xb") as new:
                    append_bytes(path, new.fileno(), 0, path.stat().st_size, progress)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            f"{conversion.target}: no space left on its disk ({size_text(conversion.num_bytes)} are needed); nothing "
            "was left there: make room or give another path"
        ) from error


def _plan(
    source: Path,
    target: Path,
    wiring: str | Wiring | None,
    layers: str | Sequence[int] | None,
    to: str | None,
) -> Conversion:
    if to not in (None, *FORMATS):
        raise ValueError(f"format {to!r} is unknown; use one of {', '.join(FORMATS)}")
    config = read_config(source)
    _refuse_target(source, target)
    is_ours = isinstance(config.get("farskip"), dict)
    family, recorded = read_record(source, config)
    chosen = recorded if wiring is None else wiring
    if chosen is None and layers is not None:
        raise ValueError(f"layers={layers!r} needs a wiring, the checkpoint itself is ordinary")
    check_model_type(family, config)
    stored = read_checkpoint(source)
    checked = _checked_wiring(stored, _num_layers(family, config), chosen or "ordinary", layers)
    if family.architecture == INSTELLA:
        refuse_wrong_gates(stored, config, checked.num_layers)
    own_keys = to == "instella" or (to is None and not is_ours)
    if to == "instella":
        family, config = to_instella(family, config, transformers_config(family, config), checked)
    elif to == "hf" and family.architecture == INSTELLA:
        family, config = from_instella(family, config)
    lies = own_keys and family.wiring_keys is not None and family.wiring_keys.write(checked) is not None
    others = tuple(_others(source, stored))
    conversion = Conversion(
        source=source,
        target=target,
        family=family,
        wiring=checked,
        config=config,
        own_keys=own_keys,
        stored=stored,
        cut=experts_one_by_one(stored) if to == "instella" else {},
        copied=tuple(path for path in others if _is_copied(path)),
        left_out=tuple(path.name for path in others if not _is_copied(path)),
        remarks=(LIES,) if lies else (),
    )
    _refuse_full_disk(conversion)
    return conversion


def _num_layers(family: Family, config: dict[str, Any]) -> int:
    found = config.get("num_hidden_layers")
    return found if isinstance(found, int) else int(transformers_config(family, config).num_hidden_layers)


def _checked_wiring(
    stored: StoredCheckpoint, num_layers: int, wiring: str | Wiring, layers: str | Sequence[int] | None
) -> Wiring:
    """The wiring, by the rules that `rewire` goes by, on the layers that the checkpoint has."""
    if isinstance(wiring, str):
        wiring = Wiring.named(wiring, num_layers, "all" if layers is None else layers)
    elif layers is not None:
        raise ValueError(f"layers={layers!r} goes with the name of a wiring; a Wiring already says its layers")
    wiring.resolve(blocks_of_layers(stored.tensors, num_layers))
    return wiring


def _others(source: Path, stored: StoredCheckpoint) -> Iterator[Path]:
    """What else is in the folder, but for what is written anew."""
    written = {"config.json", INDEX, *(file.path.name for file in stored.files)}
    for path in sorted(source.iterdir()):
        if path.name not in written and not path.name.startswith("."):
            yield path


def _is_copied(path: Path) -> bool:
    """Tokenizer, generation settings, model card, license: no other weights, and no code of another wiring."""
    return path.is_file() and path.suffix not in (*_WEIGHTS, ".py") and not path.name.endswith(".index.json")


def _write_file(file: StoredFile, parts: Sequence[Part] | None, path: Path, progress: Callable[[int], None]) -> None:
    with open(path, "xb") as new:
        if parts is None:
            append_bytes(file.path, new.fileno(), 0, file.num_bytes, progress)
            return
        header = file_header({name: (dtype, shape, size) for name, dtype, shape, _, size in parts}, file.metadata)
        append(new.fileno(), header)
        # The parts follow each other as in the old file: its data is copied in one go.
        start = file.num_bytes - sum(size for *_, size in parts)
        append_bytes(file.path, new.fileno(), start, file.num_bytes - start, progress)
        progress(start)


def _write_index(conversion: Conversion, path: Path) -> None:
    where = {}
    for file in conversion.stored.files:
        parts = conversion.cut.get(file.path.name)
        names = [part[0] for part in parts] if parts is not None else [tensor.name for tensor in file.tensors]
        where.update(dict.fromkeys(names, file.path.name))
    index = {**(conversion.stored.index or {}), "weight_map": dict(sorted(where.items()))}
    path.write_text(json.dumps(index, indent=2) + "\n")


def _refuse_target(source: Path, target: Path) -> None:
    old, new = source.resolve(), target.resolve()
    if old == new:
        raise ValueError("the output is the checkpoint itself; give another path")
    if old in new.parents or new in old.parents:
        raise ValueError(f"{target} and the checkpoint lie inside each other; give another path")
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file, not a folder; give another path")
    if target.exists() and any(target.iterdir()) and not (target / "config.json").exists():
        raise ValueError(f"{target} holds something that is not a checkpoint; give another path")


def _refuse_full_disk(conversion: Conversion) -> None:
    target = conversion.target.absolute()
    free = disk_usage(next(path for path in (target, *target.parents) if path.exists())).free
    if free < conversion.num_bytes:
        raise ValueError(
            f"{size_text(conversion.num_bytes)} are needed and {size_text(free)} are free on the disk of "
            f"{conversion.target}; make room or give another path"
        )
