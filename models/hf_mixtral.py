"""Mixtral: all layers MoE, softmax router, no shared expert, optional noise on the router's and experts' input."""

import torch

from farskip.chain import MLP_NORM
from farskip.models.family import Family
from farskip.models.hf_layer import HFSubBlocks
from farskip.models.router_rule import softmax_router
from farskip.wiring import ATTENTION


class MixtralSubBlocks(HFSubBlocks):
    """In training, with ``router_jitter_noise``, the MoE's normed input is multiplied with uniform noise around 1."""

    @property
    def noise(self) -> float:
        """Half the width of the noise; 0 where there is none."""
        return max(self.mlp_module.jitter_noise, 0.0) if self.mlp_module.training else 0.0

    @property
    def bare_norms(self) -> frozenset[str]:
        """See `HFSubBlocks.bare_norms`."""
        return frozenset({ATTENTION} if self.noise else {ATTENTION, MLP_NORM})

    def mlp_norm(self, stream_BSD: torch.Tensor) -> torch.Tensor:
        """See `SubBlocks.mlp_norm`."""
        normed_BSD = super().mlp_norm(stream_BSD)
        if not self.noise:
            return normed_BSD
        return normed_BSD * torch.empty_like(normed_BSD).uniform_(1.0 - self.noise, 1.0 + self.noise)


FAMILY = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    score="softmax",
    sub_blocks=MixtralSubBlocks,
    router=softmax_router,
)
