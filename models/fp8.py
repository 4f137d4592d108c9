"""Checkpoints in fp8, as DeepSeek-V3, Kimi-K2 and Qwen3-MoE publish them: undone, matrix by matrix, as they are read.

config.json says ``quantization_config: {quant_method: fp8, weight_block_size: [128, 128]}``. A matrix ``NAME`` is
stored in fp8 (e4m3), and beside it ``NAME_scale_inv`` with one scale per block; blocks at the lower and right edge may
be smaller:

    plain[r, c] = stored[r, c] * scale_inv[r // 128, c // 128]

The name says inverse because quantization divided by it. Products are taken in fp32 and rounded once, to the model's
dtype. What is not in fp8 (norms, routers, embeddings, head) is stored plain.

Source: the blocks are those of the DeepSeek-V3 report (arXiv 2412.19437) 3.3.2; names as in the published files.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from farskip.models.checkpoint_files import StoredCheckpoint
from farskip.models.stored_slice import BlockScales, StoredTensors

METHOD = "fp8"
SUFFIX = "_scale_inv"
_MATRIX = "F8_E4M3"
_SCALE = ("F32", "BF16", "F16")
_PLAIN = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8:
    """How the matrices of a checkpoint are quantized, and what they become.

    Attributes:
        block: rows and columns that share a scale.
        dtype: of the plain matrices.
    """

    block: tuple[int, int]
    dtype: torch.dtype

    @classmethod
    def of(cls, folder: Path, config: Mapping[str, Any], dtype: torch.dtype | None) -> Self | None:
        """What a config.json says; None if it says nothing of fp8.

        Args:
            folder: of the checkpoint.
            config: its config.json.
            dtype: of the plain matrices; None for what the config says of the model.

        Raises:
            ValueError: fp8 in another form than blocks with a scale each, or no plain dtype.
        """
        quantization = config.get("quantization_config")
        if not isinstance(quantization, dict) or quantization.get("quant_method") != METHOD:
            return None
        block = quantization.get("weight_block_size")
        if not (isinstance(block, list | tuple) and len(block) == 2 and all(_is_size(size) for size in block)):
            raise ValueError(
                f"load {folder}: the checkpoint is in fp8 with weight_block_size {block!r}, and only blocks of [rows, "
                "columns] with a scale each are undone; give a checkpoint in bf16"
            )
        said = str(dtype or config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
        if said not in _PLAIN:
            raise ValueError(f"load {folder}: an fp8 checkpoint becomes one of {', '.join(_PLAIN)}, not {said!r}")
        return cls(block=(block[0], block[1]), dtype=getattr(torch, said))

    def tensors(self, stored: StoredCheckpoint) -> StoredTensors:
        """The tensors of a checkpoint without their scales, which go with their matrices.

        Raises:
            ValueError: a matrix without its scales, scales without their matrix, or of another shape or dtype.
        """
        found = stored.tensors
        scales = {}
        for name, tensor in found.items():
            if tensor.dtype != _MATRIX:
                continue
            where = f"load {stored.folder}: fp8 tensor {name}"
            scale = found.get(name + SUFFIX)
            if scale is None:
                raise ValueError(f"{where}: {name + SUFFIX} is not there; the checkpoint is incomplete or damaged")
            blocks = tuple(-(-length // size) for length, size in zip(tensor.shape, self.block, strict=False))
            if len(tensor.shape) != 2 or scale.shape != blocks or scale.dtype not in _SCALE:
                raise ValueError(
                    f"{where} of shape {tensor.shape} in blocks of {self.block} goes with scales of shape {blocks} in "
                    f"{' or '.join(_SCALE)}, but {scale.name} is {scale.dtype} {scale.shape}; give a checkpoint in bf16"
                )
            scales[name] = BlockScales(stored=scale, block=self.block, dtype=self.dtype)
        used = {scale.stored.name for scale in scales.values()}
        for name in found:
            if name.endswith(SUFFIX) and name not in used:
                raise ValueError(
                    f"load {stored.folder}: {name} scales no fp8 tensor; the checkpoint is incomplete or damaged"
                )
        plain = {name: tensor for name, tensor in found.items() if name not in used}
        return StoredTensors(folder=stored.folder, tensors=plain, scales=scales)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
