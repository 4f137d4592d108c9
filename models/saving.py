"""What `save_pretrained` does on a model that farskip is attached to, and what completes a checkpoint.

transformers' own method writes an ordinary config, from which everybody computes the ordinary function. So the class of
an attached model is a subclass with one method of its own: it lets transformers write, and then puts the wiring, the
file that reads it, and the tensors that transformers dropped beside the weights. Trainers that call `save_pretrained`
get a checkpoint like that of `farskip.save`, but not at once: until the last file, config.json, is replaced, an
interrupted one says it is ordinary.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from farskip.models.export import export_files, read_record
from farskip.models.family import family_of_model
from farskip.models.mtp_tensors import refuse_overwriting, write_mtp_tensors
from farskip.wiring import Wiring

_ATTACHMENT = "_farskip_attachment"


class Attached(Protocol):
    """What has to be known of an attachment here.

    Attributes:
        executor: has the wiring.
        sharded_experts: names of parameters of which this rank has a slice.
        tensor_layout: ``sharded`` of it names more of them.
    """

    executor: Any
    sharded_experts: tuple[str, ...]
    tensor_layout: Any


def intercept_saving(model: Any, attachment: Attached) -> None:
    """Have `save_pretrained` of this model write its wiring."""
    setattr(model, _ATTACHMENT, attachment)
    model_class: Any = type(model)
    model.__class__ = _saving_class(model_class)


def complete_checkpoint(model: Any, wiring: Wiring, folder: Path) -> None:
    """Add to what transformers has written for a model: MTP tensors, the remote-code file, and the wiring."""
    write_mtp_tensors(model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = [type(model).__name__]
    read_record(folder, config)
    export_files(config, family_of_model(model), wiring, folder)


@cache
def _saving_class(model_class: Any) -> Any:
    """One per class, so that types compare. Named as the class itself: transformers looks it up by name and module."""

    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        attachment: Attached = getattr(self, _ATTACHMENT)
        folder = Path(save_directory)
        slices = attachment.sharded_experts or attachment.tensor_layout.sharded
        if slices and kwargs.get("state_dict") is None:
            raise ValueError(
                f"save_pretrained {folder}: the model is parallel and this rank has a slice of it; use "
                "farskip.save, which writes all of it"
            )
        if kwargs.get("push_to_hub"):
            raise ValueError(
                f"save_pretrained {folder}: push_to_hub=True would upload the checkpoint before its wiring is "
                "written; save it first and then upload the folder"
            )
        refuse_overwriting(self, folder)
        model_class.save_pretrained(self, save_directory, *args, **kwargs)
        is_main = kwargs.get("is_main_process", args[0] if args else True)
        if is_main and not getattr(self, "_hf_peft_config_loaded", False):  # adapters alone come without a config
            complete_checkpoint(self, attachment.executor.wiring, folder)

    names = {"__module__": model_class.__module__, "__qualname__": model_class.__qualname__}
    return type(model_class.__name__, (model_class,), {"save_pretrained": save_pretrained, **names})
