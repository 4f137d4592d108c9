"""What the norms of a family compute, said as data, so that fused kernels can compute the same.

    Llama and its kin    z / sqrt(mean(z^2) + eps) in fp32, rounded to the dtype of z; then times weight, rounded again
    GPT-OSS              the same in fp32 throughout, rounded once

The first is what `farskip.triton_kernels.add_rms_norm` computes without a unit offset. With one it rounds once and its
gain is 1 + weight, so that GPT-OSS hands it weight - 1: in fp32 that is exact for weights in bf16 above 2^-16.

A class is known by its name and by coming from transformers; any other, a subclass included, keeps its own code.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.modules import module

_LLAMA = (
    "DeepseekV2RMSNorm",
    "DeepseekV3RMSNorm",
    "Ernie4_5_MoeRMSNorm",
    "Glm4MoeRMSNorm",
    "LlamaRMSNorm",
    "MixtralRMSNorm",
    "OlmoeRMSNorm",
    "Qwen2MoeRMSNorm",
    "Qwen3MoeRMSNorm",
    "Qwen3RMSNorm",
)
_ROUNDS_ONCE = "GptOssRMSNorm"
KNOWN = {**dict.fromkeys((*_LLAMA, _ROUNDS_ONCE), "variance_epsilon"), "Llama4TextRMSNorm": "eps"}
"""The attribute that holds eps, by class. tests/models/test_stream_kernels.py compares each class with the kernel."""


@dataclass(frozen=True, slots=True)
class NormRule:
    """What a norm computes, in the terms of `farskip.triton_kernels.add_rms_norm`.

    Attributes:
        weight: [D].
        eps: added to the mean square.
        unit_offset: whether the gain is 1 + weight, and nothing is rounded before the end.
    """

    weight: torch.Tensor
    eps: float
    unit_offset: bool


def is_known(norm: Any) -> bool:
    """Whether kernels can compute what a norm module's class computes."""
    return type(norm).__name__ in KNOWN and type(norm).__module__.startswith("transformers.")


def why_called(norm: Any) -> str | None:
    """Why a norm module has to be called, as it is now; None if an op may do its work together with other work."""
    if not is_known(norm):
        return f"{type(norm).__name__} is not known"
    if norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks or norm._backward_pre_hooks:
        return "it has hooks"
    if module._has_any_global_hook():
        return "all modules have hooks"
    return "its forward was replaced" if "forward" in norm.__dict__ else None


def norm_rule(norm: Any) -> NormRule:
    """The rule of a known norm."""
    name = type(norm).__name__
    weight, eps = norm.weight, float(getattr(norm, KNOWN[name]))
    if name == _ROUNDS_ONCE:
        return NormRule(weight.float() - 1, eps, unit_offset=True)
    return NormRule(weight, eps, unit_offset=False)
