"""In what dtype a trained model is written: its original's, so that a conversion gives back what it was given."""

import json
from pathlib import Path
from typing import Any

import torch


def checkpoint_dtype(folder: Path) -> torch.dtype:
    """The dtype that a checkpoint's config.json names; float32 where it names none."""
    config = json.loads((folder / "config.json").read_text())
    said = config.get("dtype") or config.get("torch_dtype") or "float32"
    return getattr(torch, str(said).removeprefix("torch."))


def round_weights(model: Any, dtype: torch.dtype) -> None:
    """Round parameters and stored buffers of floating point, in place, as transformers would when it loads them in
    `dtype`: what a family keeps in float32 (selection biases, some routers) stays.

    Args:
        model: a transformers model.
        dtype: any of floating point.
    """
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype is torch.float16:
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())

    def is_kept(name: str) -> bool:
        return any(f".{part}." in f".{name}." for part in kept)

    for path, module in model.named_modules():
        stored = {**module._parameters, **module._buffers}
        for name, tensor in stored.items():
            passing = name in module._non_persistent_buffers_set
            if tensor is None or passing or not tensor.is_floating_point() or is_kept(f"{path}.{name}"):
                continue
            tensor.data = tensor.data.to(dtype)
    model.config.dtype = dtype
