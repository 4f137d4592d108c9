"""Variants of `farskip bench overlap` with megatron-core 0.16.1's own MoE layer, on gloo.

    megatron_blocking    its all-to-all dispatcher, shared expert beside it
    megatron_shared      the same with moe_shared_expert_overlap

The model is the one of the other variants, with equal weights; only the MoE of each layer is Megatron's: its
dispatcher, its experts, its shared expert. The router is replaced by one that picks the benchmark's fixed experts with
the model's own weights, so that all variants send the same rows.

megatron-core runs on CPU only with a small substitution layer (`farskip.models.testing_megatron.on_cpu`). On gloo its
all-to-all blocks the host, so its shared-expert overlap, which relies on a second CUDA stream, cannot hide anything
here: these figures compare the cost of its blocking path with ours, not its overlap on GPUs.

Legend: B batch, S sequence, D hidden, T = B*S tokens, K experts per token, E experts.
"""

from typing import Any

import torch
from torch import nn

from farskip.benchmarking import fixed_experts
from farskip.launch.bench_config import BenchOverlapConfig
from farskip.launch.bench_names import BLOCKING
from farskip.launch.bench_variants import RealModels, Variant
from farskip.models.family import backbone_of
from farskip.models.testing_megatron import on_cpu


class _FixedRouter(nn.Module):
    """Fixed experts, weights of the model's router; answers in Megatron's form: probabilities and mask, both [T, E]."""

    def __init__(self, gate: nn.Module, experts_TK: torch.Tensor, num_experts: int) -> None:
        super().__init__()
        self.gate = gate
        self._experts_TK = experts_TK
        self._num_experts = num_experts

    def set_layer_number(self, layer_number: int) -> None:
        pass

    def forward(self, tokens_SBD: torch.Tensor, padding_mask: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        # the dispatcher flattens what it is given, and the adapter hands over one sequence of all tokens
        _, weights_TK, _ = self.gate(tokens_SBD.reshape(-1, tokens_SBD.shape[-1]))
        probabilities_TE = weights_TK.new_zeros(weights_TK.shape[0], self._num_experts)
        probabilities_TE = probabilities_TE.scatter(1, self._experts_TK, weights_TK)
        mask_TE = torch.zeros_like(probabilities_TE, dtype=torch.bool).scatter(1, self._experts_TK, True)
        return probabilities_TE, mask_TE


class _MegatronMoE(nn.Module):
    """Takes the place of the ``mlp`` of a transformers layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, normed_BSD: torch.Tensor) -> torch.Tensor:
        output, _ = self.layer(normed_BSD.reshape(-1, 1, normed_BSD.shape[-1]))
        return output.view(normed_BSD.shape)


def build(config: BenchOverlapConfig, models: RealModels, mesh: Any) -> list[Variant]:
    """Both variants. A collective."""
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(expert_model_parallel_size=config.hosts)
    return [_variant("megatron_blocking", config, models, False), _variant("megatron_shared", config, models, True)]


def _variant(name: str, config: BenchOverlapConfig, models: RealModels, overlap: bool) -> Variant:
    model = models.plain_model()
    backbone: Any = backbone_of(model)
    with on_cpu():
        for number, layer in enumerate(backbone.layers):
            layer.mlp = _MegatronMoE(_moe_layer(config, layer.mlp, number, overlap))

    def forward() -> torch.Tensor:
        return backbone(input_ids=models.ids_BS, use_cache=False).last_hidden_state

    return Variant(
        name=name,
        forward=forward,
        parameters=dict(backbone.named_parameters()),
        reference=BLOCKING,
        exact=False,
        around=on_cpu,
    )


def _moe_layer(config: BenchOverlapConfig, mlp: Any, number: int, overlap: bool) -> nn.Module:
    from megatron.core import parallel_state
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.transformer_config import TransformerConfig

    size = config.size
    shared_width = size.shared_experts * size.expert_width
    settings = TransformerConfig(
        num_layers=size.layers,
        hidden_size=size.hidden,
        num_attention_heads=size.heads,
        ffn_hidden_size=size.expert_width,
        num_moe_experts=size.experts,
        moe_ffn_hidden_size=size.expert_width,
        moe_router_topk=size.top_k,
        moe_token_dispatcher_type="alltoall",
        moe_shared_expert_intermediate_size=shared_width,
        moe_shared_expert_overlap=overlap,
        expert_model_parallel_size=config.hosts,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
    )
    experts_TK = fixed_experts(
        config.routing,
        num_tokens=size.batch * size.sequence,
        top_k=size.top_k,
        num_experts=size.experts,
        num_ranks=config.hosts,
        layer=number,
    )

    def router(*, config: Any, pg_collection: Any) -> nn.Module:
        return _FixedRouter(mlp.gate, experts_TK, size.experts)

    submodules = get_moe_module_spec(use_te=False, num_experts=size.experts).submodules
    submodules.router = router
    layer = MoELayer(settings, submodules, layer_number=number + 1)
    layer.set_layer_number(number + 1)
    local = size.experts // config.hosts
    first = parallel_state.get_expert_model_parallel_rank() * local
    with torch.no_grad():
        for offset, expert in enumerate(layer.experts.local_experts):
            expert.linear_fc1.weight.copy_(mlp.experts.gate_up_proj[first + offset])
            expert.linear_fc2.weight.copy_(mlp.experts.down_proj[first + offset])
        shared = mlp.shared_experts
        layer.shared_experts.linear_fc1.weight.copy_(torch.cat([shared.gate_proj.weight, shared.up_proj.weight]))
        layer.shared_experts.linear_fc2.weight.copy_(shared.down_proj.weight)
    return layer
