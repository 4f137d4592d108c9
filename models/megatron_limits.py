"""What a rewired megatron-core model refuses, each with the reason: settings of a TransformerConfig, shapes of a spec.

A combination that would silently compute something else, or silently not do what it is set for, is an error when the
model is built.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_layer import TransformerLayer


class _Limit(NamedTuple):
    """One setting: whether a value of it is refused, why, and what to do."""

    setting: str
    refused: Callable[[Any], bool]
    reason: str
    remedy: str


def _above_one(value: Any) -> bool:
    return value is not None and value > 1


_LIMITS = (
    _Limit(
        "overlap_moe_expert_parallel_comm",
        bool,
        "the 1F1B schedule plan rebuilds each layer from its own pieces and would silently skip the wiring",
        "leave it off: farskip overlaps the same exchanges",
    ),
    _Limit(
        "moe_shared_expert_overlap",
        bool,
        "it runs the shared expert inside Megatron's dispatcher, and here the schedule says where it runs",
        "leave it off: the schedule puts the shared expert under an exchange",
    ),
    _Limit("tensor_model_parallel_size", _above_one, "its collectives are not in the schedule", "use 1"),
    _Limit("expert_tensor_parallel_size", _above_one, "its collectives are not in the schedule", "use 1"),
    _Limit("sequence_parallel", bool, "its collectives are not in the schedule", "leave it off"),
    _Limit("context_parallel_size", _above_one, "nothing has tested it", "use 1"),
    _Limit(
        "moe_token_dispatcher_type",
        lambda kind: kind == "flex",
        "DeepEP and HybridEP exchange rows in a call of their own that cannot be launched and waited for",
        "use alltoall",
    ),
    _Limit(
        "moe_expert_capacity_factor",
        lambda factor: factor is not None,
        "tokens that lost an expert have no fixed number of choices",
        "leave it None",
    ),
    _Limit("moe_latent_size", _above_one, "its projections stand around the exchange", "leave it None"),
    _Limit("fp8", bool, "Megatron opens its context around each layer's call, where nothing runs yet", "leave it off"),
    _Limit("fp4", bool, "Megatron opens its context around each layer's call, where nothing runs yet", "leave it off"),
    _Limit("enable_autocast", bool, "stock layers then round the stream, which is kept here", "use bf16 parameters"),
    _Limit(
        "fp32_residual_connection",
        bool,
        "stock layers round the stream to their output's dtype, which is not done here",
        "leave it off",
    ),
    _Limit(
        "cuda_graph_impl", lambda kind: kind != "none", "a graph of one layer would hold the whole segment", "use none"
    ),
    _Limit("cpu_offloading", bool, "it works on what stands between two layers, and a segment runs in one go", "off"),
    _Limit("fine_grained_activation_offloading", bool, "nothing has tested it", "leave it off"),
    _Limit("heterogeneous_block_specs", bool, "its layers have configs of their own", "leave it off"),
)

_HONORED_MODULES = frozenset({"core_attn", "mlp", "shared_experts", "moe_act"})
"""What selective recomputation may recompute."""


def check_config(config: Any) -> None:
    """Refuse settings that a rewired layer cannot honor.

    Raises:
        ValueError: names the first one.
    """
    for limit in _LIMITS:
        value = getattr(config, limit.setting)
        if limit.refused(value):
            raise ValueError(f"a rewired layer cannot honor {limit.setting}={value}: {limit.reason}; {limit.remedy}")
    if config.recompute_granularity == "selective":
        others = sorted(set(config.recompute_modules) - _HONORED_MODULES)
        if others:
            raise ValueError(
                f"a rewired layer cannot honor recompute_modules={others}: their stages would run apart from their "
                f"recomputation; use {sorted(_HONORED_MODULES)}"
            )


def check_dropout(hidden_dropout: float) -> None:
    """Refuse dropout on what joins the stream: the config's, or that of one layer's spec.

    Raises:
        ValueError: it is not 0.
    """
    if hidden_dropout:
        raise ValueError(
            f"a rewired layer cannot honor hidden_dropout={hidden_dropout}: shared and routed output join the stream "
            "apart, and one dropout mask over their sum has no place; use 0"
        )


def check_spec(spec: Any) -> None:
    """Refuse layers that are not what the sub-blocks are written for.

    Raises:
        ValueError: says what differs.
    """
    if spec.module is not TransformerLayer:
        raise ValueError(
            f"rewire_spec: a layer of class {getattr(spec.module, '__name__', spec.module)} has a forward of its own, "
            "which would not run; use Megatron's TransformerLayer"
        )
    parts = spec.submodules
    if parts.cross_attention is not IdentityOp or parts.pre_cross_attn_layernorm is not IdentityOp:
        raise ValueError(
            "rewire_spec: cross attention needs the layer's second output, which carries a stream; use none"
        )
    for name in ("self_attn_bda", "mlp_bda"):
        if getattr(parts, name) is not get_bias_dropout_add:
            raise ValueError(
                f"rewire_spec: {name} of the spec is {getattr(parts, name)}, and outputs join the stream without it; "
                "use get_bias_dropout_add"
            )
    mlp = getattr(parts.mlp, "module", None)
    if isinstance(mlp, type) and issubclass(mlp, MoELayer) and mlp is not MoELayer:
        raise ValueError(
            f"rewire_spec: the MoE layer {mlp.__name__} has a forward of its own, which would not run; use MoELayer"
        )
    if not hasattr(getattr(parts.self_attention, "submodules", None), "core_attention"):
        raise ValueError(
            f"rewire_spec: the attention {getattr(parts.self_attention, 'module', parts.self_attention)} has no core "
            "to cut it at; use SelfAttention or MLASelfAttention"
        )


def check_call(index: int, extras: dict[str, Any]) -> None:
    """Refuse what a layer is called with and would not be honored.

    Args:
        index: number of the layer.
        extras: arguments that have to be None.

    Raises:
        ValueError: one is not.
    """
    reasons = {
        "inference_context": "generation with a cache is not supported; generate with the whole sequence",
        "inference_params": "generation with a cache is not supported; generate with the whole sequence",
        "padding_mask": "routers would count padding in their auxiliary losses; leave it out",
        "context_mask": "there is no cross attention; leave it out",
    }
    for name, value in extras.items():
        if value is not None:
            raise ValueError(
                f"layer {index} was called with {name}, which a rewired layer cannot honor: {reasons[name]}"
            )
