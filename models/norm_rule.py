"""What the norms of a family compute, said as data, so that fused kernels can compute the same.

    z / sqrt(mean(z^2) + eps), in fp32, rounded to the dtype of z; then times weight, rounded again

is the RMSNorm of Llama and its kin, and what `farskip.triton_kernels.add_rms_norm` computes without a unit offset. A
class is known by its name and by coming from transformers; any other, a subclass included, keeps its own code. So does
GPT-OSS: its norm does not round before it multiplies by the weight, which is another number in bf16.
"""

from dataclasses import dataclass
from typing import Any

import torch

_EPS_OF = {
    **dict.fromkeys(
        (
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
        ),
        "variance_epsilon",
    ),
    "Llama4TextRMSNorm": "eps",
}
"""The attribute that holds eps, by class. tests/models/test_stream_kernels.py compares each class with the kernel."""


@dataclass(frozen=True, slots=True)
class NormRule:
    """What a norm computes.

    Attributes:
        weight: its gain [D].
        eps: added to the mean square.
    """

    weight: torch.Tensor
    eps: float


def is_known(norm: Any) -> bool:
    """Whether kernels can compute what a norm module's class computes."""
    return type(norm).__name__ in _EPS_OF and type(norm).__module__.startswith("transformers.")


def eps_of(norm: Any) -> float:
    """The eps of a known norm."""
    return float(getattr(norm, _EPS_OF[type(norm).__name__]))


def why_called(norm: Any) -> str | None:
    """Why a norm module has to be called, as it is now; None if an op may do its work together with other work."""
    if not is_known(norm):
        return f"{type(norm).__name__} is not known"
    if norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks or norm._backward_pre_hooks:
        return "it has hooks"
    return "its forward was replaced" if "forward" in norm.__dict__ else None


def norm_rule(norm: Any) -> NormRule:
    """The rule of a known norm."""
    return NormRule(norm.weight, eps_of(norm))
