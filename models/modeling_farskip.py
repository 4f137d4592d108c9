# SPDX-License-Identifier: Apache-2.0
"""A causal language model whose skip connections were rewired; needs torch and transformers 5.15, and no farskip.

farskip writes this file beside the weights of a rewired model. The file is the same for every model:

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

builds the family's own class of transformers from config.json and changes what the sub-blocks of its layers read, as
the record there says. Weights and their names are the family's.

    "farskip": {"base_model_type": "qwen3_moe",             the family's model_type
                "architecture": "Qwen3MoeForCausalLM",      the family's class
                "wiring": {"name": "farskip", "layers": [0, 1, 2, 3], "num_layers": 4}}

WARNING. Do not load the folder with the family's class itself, as in Qwen3MoeForCausalLM.from_pretrained(FOLDER). It
computes another function, from experts that transformers initializes at random, and only logs that.
AutoModelForCausalLM without trust_remote_code refuses, except for a checkpoint in Instella-MoE's own format, whose
model_type claims to be deepseek_v3: there it silently drops the gates and computes an ordinary DeepSeek-V3.

What a layer reads. In program order its sub-blocks are attention and then a dense MLP, or shared and routed experts.
Every output is always added to the stream; a wiring says what the input of a sub-block leaves out.

    y  = x + a          a: attention                    x: full stream at a layer's entry
    x' = y + (r + s)    r, s: routed, shared experts    n: the stream that leaves something of the layer before out
    x' = y + m          m: dense MLP

Where the next layer needs both, a layer returns them stacked, [2, B, S, D], x first. So everything that carries tensors
between layers (recomputation, device maps, sharding) carries both; a forward hook on a layer sees the stack. The hidden
states that the model returns are x. Source: FarSkip-Collective (arXiv 2511.11505) section 3.

Legend: B batch, S sequence, D hidden, T = B*S tokens, K experts per token, E experts.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_OLDEST = (5, 15)
"""Of transformers. Before, some routers return something else, for ERNIE-4.5 without any error."""
_INSTELLA = "InstellaMoEForCausalLM"
_DENSE, _MOE, _MOE_SHARED = ("attention", "mlp"), ("attention", "routed"), ("attention", "shared", "routed")
_ROUTED, _WHOLE_MLP = ("previous.routed",), ("previous.mlp", "previous.shared", "previous.routed")


def _row(attention: tuple[str, ...], mlp: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    return {"attention": attention, "mlp": mlp, "shared": mlp, "routed": mlp}


NAMED: dict[str, dict[str, tuple[str, ...]]] = {
    "ordinary": _row((), ()),
    "farskip": _row(_ROUTED, ("attention",)),
    "attn_only": _row(_ROUTED, ()),
    "mlp_only": _row((), ("attention",)),
    "ladder": _row(_WHOLE_MLP, ("attention",)),
}
"""What the input of each sub-block leaves out, by the name of the wiring."""


class Plan(NamedTuple):
    """What one layer reads and returns.

    Attributes:
        sources: by sub-block, ``x``, ``n`` or ``y``.
        two_in: whether the layer is handed x and n.
        partial_out: what it hands on as n, ``x``, ``y`` or ``y+s``; None: the next layer needs x alone.
    """

    sources: dict[str, str]
    two_in: bool
    partial_out: str | None


def plans_of(wiring: Mapping[str, Any], blocks: Sequence[tuple[str, ...]]) -> list[Plan]:
    """The recorded wiring on a model whose layers have these sub-blocks.

    Raises:
        ValueError: the record is of another depth, or of a wiring that needs more than two streams.
    """
    if wiring["name"] == "custom":
        rows = [dict(row) for row in wiring["table"]]
    else:
        chosen = set(wiring["layers"])
        named = NAMED["mlp_only" if wiring["name"] == "parallel" else wiring["name"]]
        rows = [named if layer in chosen else {} for layer in range(wiring["num_layers"])]
    if len(rows) != len(blocks):
        raise ValueError(f"config.json: the wiring has {len(rows)} layers, the model {len(blocks)}; correct either")
    sources, left_out = [], []
    previous: tuple[str, ...] = ()
    for layer, (row, here) in enumerate(zip(rows, blocks, strict=True)):
        older = {block: tuple(p for p in previous if f"previous.{p}" in row.get(block, ())) for block in here}
        streams = {names for names in older.values() if names}
        if len(streams) > 1 or any(names != previous[-len(names) :] for names in streams):
            raise ValueError(
                f"config.json: layer {layer} leaves out {sorted(streams)}: that needs more than two streams"
            )
        reads = {}
        for block in here:
            full = "x" if block == "attention" or "attention" in row.get(block, ()) else "y"
            reads[block] = "n" if older[block] else full
        sources.append(reads)
        left_out.append(next(iter(streams), ()))
        previous = here
    plans = []
    for layer, here in enumerate(blocks):
        later = left_out[layer + 1] if layer + 1 < len(blocks) else ()
        partial = "x" if "attention" in later else "y+s" if "shared" in here and "shared" not in later else "y"
        plans.append(Plan(sources[layer], bool(left_out[layer]), partial if later else None))
    return plans


# -- one layer --------------------------------------------------------------------------------------------------------


def _mlp_of(layer: Any) -> Any:
    return layer.feed_forward if hasattr(layer, "feed_forward") else layer.mlp


def _shared_of(mlp: Any) -> Any:
    plural = getattr(mlp, "shared_experts", None)
    return getattr(mlp, "shared_expert", None) if plural is None else plural


def blocks_of(layer: Any) -> tuple[str, ...]:
    """The sub-blocks of a decoder layer in program order."""
    mlp = _mlp_of(layer)
    if getattr(mlp, "experts", None) is None:
        return _DENSE
    return _MOE if _shared_of(mlp) is None else _MOE_SHARED


def _mlp_input(layer: Any, stream_BSD: torch.Tensor) -> torch.Tensor:
    """The normed stream; Mixtral may multiply it with noise in training."""
    mlp, normed_BSD = _mlp_of(layer), layer.post_attention_layernorm(stream_BSD)
    noise = getattr(mlp, "jitter_noise", 0)
    if not mlp.training or not noise:
        return normed_BSD
    return normed_BSD * torch.empty_like(normed_BSD).uniform_(1.0 - noise, 1.0 + noise)


def _shared(mlp: Any, normed_BSD: torch.Tensor) -> torch.Tensor:
    """The shared expert; that of Qwen2-MoE has a gate of its own."""
    output_BSD = _shared_of(mlp)(normed_BSD)
    gate = getattr(mlp, "shared_expert_gate", None)
    return output_BSD if gate is None else gate(normed_BSD).sigmoid() * output_BSD


def _routed(mlp: Any, normed_BSD: torch.Tensor) -> torch.Tensor:
    """The routed experts. A router that returns scores [T, E] (Llama-4) weighs their input, others their output."""
    tokens_TD = normed_BSD.reshape(-1, normed_BSD.shape[-1])
    routing = (mlp.router if hasattr(mlp, "router") else mlp.gate)(tokens_TD)
    if len(routing) == 3:
        _, weights_TK, experts_TK = routing
        return mlp.experts(tokens_TD, experts_TK, weights_TK).view(normed_BSD.shape)
    scores_TE, _ = routing
    num_experts = scores_TE.shape[1]
    rows = tokens_TD.repeat(num_experts, 1) * scores_TE.transpose(0, 1).reshape(-1, 1)
    return mlp.experts(rows).view(num_experts, *normed_BSD.shape).sum(dim=0)


class RewiredLayer:
    """The forward of a rewired decoder layer; mixed into the family's own layer class."""

    farskip_plan: Plan

    def forward(self: Any, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        """Both streams or one in, [2, B, S, D] or [B, S, D]; both or one out."""
        plan = self.farskip_plan
        if hidden_states.dim() != (4 if plan.two_in else 3):
            raise RuntimeError(
                f"a rewired layer got hidden states of {hidden_states.dim()} dimensions; something between the layers "
                "replaced them, or a layer was left out, which the wiring does not allow"
            )
        x_BSD, n_BSD = hidden_states.unbind(0) if plan.two_in else (hidden_states, hidden_states)
        attention_input_BSD = n_BSD if plan.sources["attention"] == "n" else x_BSD
        a_BSD = self.self_attn(hidden_states=self.input_layernorm(attention_input_BSD), **arguments)[0]
        y_BSD = x_BSD + a_BSD
        streams = {"x": x_BSD, "n": n_BSD, "y": y_BSD}
        blocks = [block for block in plan.sources if block != "attention"]
        normed = {name: _mlp_input(self, streams[name]) for name in dict.fromkeys(plan.sources[b] for b in blocks)}
        mlp = _mlp_of(self)
        shared_BSD = None
        if "mlp" in blocks:
            output_BSD = mlp(normed[plan.sources["mlp"]])
        else:
            output_BSD = _routed(mlp, normed[plan.sources["routed"]])
            if "shared" in blocks:
                shared_BSD = _shared(mlp, normed[plan.sources["shared"]])
                output_BSD = output_BSD + shared_BSD
        full_BSD = y_BSD + output_BSD
        if plan.partial_out is None:
            return full_BSD
        partial_BSD = x_BSD if plan.partial_out == "x" else y_BSD
        if plan.partial_out == "y+s":
            partial_BSD = y_BSD + shared_BSD
        return torch.stack((full_BSD, partial_BSD))


@functools.cache
def _layer_class(layer_class: Any) -> type:
    """The family's layer class with our forward. It keeps its name, by which device maps and sharding know it."""
    return type(layer_class.__name__, (RewiredLayer, layer_class), {})


def _unstack(backbone: nn.Module, args: Any, output: Any) -> Any:
    """Forward hook of the backbone: of the hidden states that it captured, keep the full stream."""

    def full(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(full(item) for item in value)
        return value[0] if isinstance(value, torch.Tensor) and value.dim() == 4 else value

    if isinstance(output, tuple):  # return_dict=False
        _refuse_early_end(output[0])
        return (output[0], *(full(item) if _is_hidden_states(item) else item for item in output[1:]))
    _refuse_early_end(output.last_hidden_state)
    if output.get("hidden_states") is not None:
        output["hidden_states"] = full(output["hidden_states"])
    return output


def _is_hidden_states(item: Any) -> bool:
    """Hidden states have three axes at one end at least; attentions [B, heads, S, S] have four throughout."""
    return isinstance(item, tuple) and any(isinstance(part, torch.Tensor) and part.dim() == 3 for part in item)


def _refuse_early_end(last_hidden_state: torch.Tensor) -> None:
    if last_hidden_state.dim() == 4:
        raise RuntimeError("the model ended behind a layer that hands on two streams; run all of its layers")


# -- Instella-MoE: DeepSeek-V3 with a gate on the attention's output --------------------------------------------------


@functools.cache
def _gated(attention_class: Any) -> type:
    def forward(self: Any, hidden_states: torch.Tensor, **arguments: Any) -> Any:
        gate_BSG = self.gate_proj(hidden_states).sigmoid()
        handle = self.o_proj.register_forward_pre_hook(lambda module, args: args[0] * gate_BSG)
        try:
            return attention_class.forward(self, hidden_states=hidden_states, **arguments)
        finally:
            handle.remove()

    return type(attention_class.__name__, (attention_class,), {"forward": forward})


def _add_gates(model: Any) -> None:
    for layer in model.model.layers:
        attention = layer.self_attn
        attention_class: Any = type(attention)
        width = attention.o_proj.in_features
        attention.gate_proj = nn.Linear(
            model.config.hidden_size, width, bias=False, dtype=attention.o_proj.weight.dtype
        )
        attention.__class__ = _gated(attention_class)
    model.post_init()


def _instella_wiring(config: Mapping[str, Any]) -> dict[str, Any]:
    """Instella-MoE's own keys say: one wiring on the layers from start to end, both included."""
    num_layers, end = config["num_hidden_layers"], config.get("farskip_end_idx")
    start = int(config.get("farskip_start_idx") or 0)
    stop = num_layers if end is None else min(int(end) + 1, num_layers)
    attention_only, mlp_only = config.get("attn_only_farskip"), config.get("mlp_only_farskip")
    if attention_only and mlp_only:
        raise ValueError(
            "config.json: attn_only_farskip and mlp_only_farskip are both true; at most one of them can be"
        )
    name = "attn_only" if attention_only else "mlp_only" if mlp_only else "farskip"
    layers = list(range(start, stop)) if config.get("farskip") else []
    return {"name": name, "layers": layers, "num_layers": num_layers}


# -- what config.json names in auto_map -------------------------------------------------------------------------------


def _with_record(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with farskip's record in it; Instella-MoE's own keys are read and become one."""
    architectures = config.get("architectures") or [None]
    if isinstance(config.get("farskip"), dict):
        return dict(config)
    if architectures[0] != _INSTELLA:
        raise ValueError(f"config.json: farskip={config.get('farskip')!r} records no wiring; copy the file again")
    own = ("farskip", "farskip_start_idx", "farskip_end_idx", "attn_only_farskip", "mlp_only_farskip")
    record = {"base_model_type": config["model_type"], "architecture": _INSTELLA, "wiring": _instella_wiring(config)}
    rest = {key: value for key, value in config.items() if key not in own}
    model_type = f"farskip_{config['model_type']}"
    return {**rest, "farskip": record, "architectures": ["FarSkipForCausalLM"], "model_type": model_type}


@functools.cache
def _config_class(base_model_type: str) -> Any:
    """The family's config class under a model_type of ours. Its experts are stored like the family's."""
    model_type = f"farskip_{base_model_type}"
    mapping = get_checkpoint_conversion_mapping(base_model_type)
    if mapping is not None:
        register_checkpoint_conversion_mapping(model_type, mapping, overwrite=True)
    attributes = {"model_type": model_type, "_auto_class": "AutoConfig", "__module__": __name__}
    return type("FarSkipConfig", (CONFIG_MAPPING[base_model_type],), attributes)


@functools.cache
def _model_class(base_model_type: str, architecture: str) -> Any:
    """The family's class with our layers. Under the name in auto_map, so that saving it writes what loads again."""
    base = getattr(transformers, "DeepseekV3ForCausalLM" if architecture == _INSTELLA else architecture)
    attributes = {
        "config_class": _config_class(base_model_type),
        "_auto_class": "AutoModelForCausalLM",
        "_farskip_base": base,
        "__module__": __name__,
    }
    return type("FarSkipForCausalLM", (FarSkipForCausalLM, base), attributes)


class FarSkipConfig(PreTrainedConfig):
    """Reads config.json into the family's config class, whose model_type becomes ours."""

    model_type = "farskip"

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """See `PreTrainedConfig.from_pretrained`."""
        config, rest = cls.get_config_dict(pretrained_model_name_or_path, **kwargs)
        return cls.from_dict(config, **rest)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """See `PreTrainedConfig.from_dict`."""
        if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < _OLDEST:
            raise ImportError(
                f"transformers {transformers.__version__} would compute something else from this checkpoint; it needs "
                f"{_OLDEST[0]}.{_OLDEST[1]} or newer: pip install -U transformers"
            )
        config_dict = _with_record(config_dict)
        return _config_class(config_dict["farskip"]["base_model_type"]).from_dict(config_dict, **kwargs)


class FarSkipForCausalLM(PreTrainedModel):
    """Loads as the family's own causal language model with rewired layers."""

    config_class = FarSkipConfig
    _farskip_base: Any = None

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        record, backbone = config.farskip, self.model
        if record["architecture"] == _INSTELLA and getattr(config, "gated_attention", True):
            _add_gates(self)
        plans = plans_of(record["wiring"], [blocks_of(layer) for layer in backbone.layers])
        for layer, plan in zip(backbone.layers, plans, strict=True):
            layer_class: Any = type(layer)
            layer.__class__ = _layer_class(layer_class)
            layer.farskip_plan = plan
        backbone.register_forward_hook(_unstack)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """See `PreTrainedModel.from_pretrained`."""
        if cls is not FarSkipForCausalLM:
            return super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)
        if config is None:
            config = FarSkipConfig.from_pretrained(pretrained_model_name_or_path)
        return cls._of(config).from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        if cls is not FarSkipForCausalLM:
            return super()._from_config(config, **kwargs)
        return cls._of(config)._from_config(config, **kwargs)

    @staticmethod
    def _of(config: Any) -> Any:
        return _model_class(config.farskip["base_model_type"], config.farskip["architecture"])

    # transformers looks for these abilities in the source of the class's own file.
    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return cls._farskip_base._can_set_attn_implementation()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return cls._farskip_base._can_set_experts_implementation()
