"""Mixtral: all layers MoE, softmax router, no shared expert, optional noise on the router's and experts' input."""

import torch

from farskip.models.family import Family
from farskip.models.hf_layer import HFSubBlocks
from farskip.models.router_rule import softmax_router


class MixtralSubBlocks(HFSubBlocks):
    """In training, with ``router_jitter_noise``, the MoE's normed input is multiplied with uniform noise around 1."""

    def mlp_norm(self, stream_BSD: torch.Tensor) -> torch.Tensor:
        """See `SubBlocks.mlp_norm`."""
        normed_BSD = super().mlp_norm(stream_BSD)
        noise: float = self.mlp_module.jitter_noise
        if not self.mlp_module.training or noise <= 0:
            return normed_BSD
        return normed_BSD * torch.empty_like(normed_BSD).uniform_(1.0 - noise, 1.0 + noise)


FAMILY = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    score="softmax",
    sub_blocks=MixtralSubBlocks,
    router=softmax_router,
)
