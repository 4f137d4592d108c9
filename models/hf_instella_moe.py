"""Instella-MoE: DeepSeek-V3 with a gate on the attention's output, born rewired; no remote code.

Its checkpoints say ``architectures: [InstellaMoEForCausalLM]`` and ``model_type: deepseek_v3``. The first decides. A
plain load by transformers goes by the second: it drops the gates and computes an ordinary DeepSeek-V3.

    out = o_proj(sigmoid(gate_proj(u)) * core)      u: normed attention input; gate_proj [heads * v_head_dim, hidden]

The class is transformers' DeepSeek-V3 with that one module more. The product is taken where the attention core hands
over its output, through the seam of `farskip.models.attention_seam`, so no forward is copied.

Config keys, as this file reads them:

    farskip                 true: the layers below are rewired; absent or false: ordinary
    farskip_start_idx       first rewired layer; 0 if absent
    farskip_end_idx         last rewired layer, INCLUSIVE and cut at the model's last one; absent: the last one
    attn_only_farskip       true: wiring attn_only            (false if absent; both at once are refused)
    mlp_only_farskip        true: wiring mlp_only
    gated_attention         true if absent, as the architecture promises; false: attention as in DeepSeek-V3

Legend: B batch, S sequence, H heads, V value size of a head.

Source: Instella-MoE (arXiv 2609.00791).
"""

import functools
from typing import Any

import torch
from torch import nn

from farskip.models.attention_seam import after_core_set, install_seam
from farskip.models.family import Family
from farskip.models.hf_deepseek_v3 import LATENT_ATTENTION_PLAN
from farskip.models.hf_layer import HFSubBlocks
from farskip.models.router_rule import grouped_sigmoid_router
from farskip.wiring import Wiring


@functools.cache
def instella_class() -> Any:
    """The class ``InstellaMoEForCausalLM``, made when it is first asked for, so that transformers is imported late."""
    from transformers import DeepseekV3ForCausalLM
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    class InstellaMoEAttention(DeepseekV3Attention):
        """Latent attention whose core output is gated by the attention's input."""

        def __init__(self, config: Any, layer_idx: int) -> None:
            super().__init__(config, layer_idx)
            self.gate_proj = nn.Linear(self.hidden_size, self.num_heads * self.v_head_dim, bias=False)

        def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> Any:
            gate_BSG = self.gate_proj(hidden_states).sigmoid()

            def gated(core_BSHV: torch.Tensor) -> torch.Tensor:
                return core_BSHV * gate_BSG.view(core_BSHV.shape)

            with after_core_set(self, gated):
                return super().forward(hidden_states=hidden_states, **arguments)

    class InstellaMoEForCausalLM(DeepseekV3ForCausalLM):
        """DeepSeek-V3 with gated attention. Ordinary until it is rewired."""

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            if getattr(config, "gated_attention", True):
                for index, layer in enumerate(self.model.layers):
                    layer.self_attn = InstellaMoEAttention(config, index)
                install_seam(self)
                self.post_init()

        # transformers looks for these abilities in the source of the class's own file.
        @classmethod
        def _can_set_attn_implementation(cls) -> bool:
            return DeepseekV3ForCausalLM._can_set_attn_implementation()

        @classmethod
        def _can_set_experts_implementation(cls) -> bool:
            return DeepseekV3ForCausalLM._can_set_experts_implementation()

    return InstellaMoEForCausalLM


class InstellaKeys:
    """Reads and writes the config keys of the module's table. Implements `farskip.models.family.WiringKeys`."""

    names: tuple[str, ...] = (
        "farskip",
        "farskip_start_idx",
        "farskip_end_idx",
        "attn_only_farskip",
        "mlp_only_farskip",
    )

    def read(self, config: dict[str, Any]) -> Wiring:
        """See `WiringKeys.read`."""
        num_layers = _whole_number("num_hidden_layers", config.get("num_hidden_layers"))
        start = _whole_number("farskip_start_idx", config.get("farskip_start_idx") or 0)
        end = config.get("farskip_end_idx")
        stop = num_layers if end is None else min(_whole_number("farskip_end_idx", end) + 1, num_layers)
        attention_only, mlp_only = bool(config.get("attn_only_farskip")), bool(config.get("mlp_only_farskip"))
        if attention_only and mlp_only:
            raise ValueError("attn_only_farskip and mlp_only_farskip are both true; at most one of them can be")
        name = "attn_only" if attention_only else "mlp_only" if mlp_only else "farskip"
        return Wiring.named(name if config.get("farskip") else "ordinary", num_layers, list(range(start, stop)))

    def write(self, wiring: Wiring) -> dict[str, Any] | None:
        """See `WiringKeys.write`; one wiring on one stretch of layers."""
        layers = wiring.rewired_layers
        if wiring.name not in ("ordinary", "farskip", "attn_only", "mlp_only"):
            return None
        if not layers:
            return {"farskip": False}
        if layers != tuple(range(layers[0], layers[-1] + 1)):
            return None
        return {
            "farskip": True,
            "farskip_start_idx": layers[0],
            "farskip_end_idx": layers[-1],
            "attn_only_farskip": wiring.name == "attn_only",
            "mlp_only_farskip": wiring.name == "mlp_only",
        }


def _whole_number(key: str, value: Any) -> int:
    """A layer number as JSON holds it: 10000.0 is one too."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or value < 0:
        raise ValueError(f"{key}={value!r} is not a whole number of layers; correct it")
    return int(value)


FAMILY = Family(
    own_name="instella_moe",
    model_type="deepseek_v3",
    architecture="InstellaMoEForCausalLM",
    own_class=instella_class,
    score="sigmoid",
    sub_blocks=HFSubBlocks,
    undeclared_config_keys=(*InstellaKeys.names, "gated_attention"),
    wiring_keys=InstellaKeys(),
    tensor_plan={**LATENT_ATTENTION_PLAN, "layers.*.self_attn.gate_proj": "colwise"},
    router=grouped_sigmoid_router,
)
