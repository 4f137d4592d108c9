"""The fused kernels under a transformers model: its routers, routed experts, norms and residual stream run on them.

A router, an experts module or a layer's norm gets a subclass of its own class, which in each call runs kernels or what
it was before; and the executor forms the sums of the stream together with the norms that read them
(`farskip.models.stream_kernels`):

    auto          kernels on CUDA (experts: where they compute in bf16), transformers' own code elsewhere
    triton        kernels, or an error that says why not
    reference     the kernels' plain-torch twins, on any device: what the kernels compute, to test against
    off           transformers' own code

The family says what its router (`Family.router`) and its experts' gate (`Family.swiglu`) compute, and
`farskip.models.norm_rule` what norms do; what is not said keeps its own code. Weights, names and checkpoints stay as
they are.

Legend: T tokens, K experts per token, E experts, D hidden, I expert's intermediate size, R rows.
"""

import difflib
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from farskip.models.hf_layer import HFSubBlocks
from farskip.models.norm_rule import is_known, norm_rule
from farskip.models.router_rule import RouterRule
from farskip.models.stream_kernels import HFStreamKernels, stream_backend, why_norm_is_called
from farskip.parallel.dispatcher import AllToAllDispatcher
from farskip.rows import product_dtype
from farskip.triton_kernels.add_rms_norm import rms_norm
from farskip.triton_kernels.backend import choose_backend
from farskip.triton_kernels.dispatch_map import dispatch_map
from farskip.triton_kernels.down_combine import down_combine
from farskip.triton_kernels.grouped_mm import choose_grouped_backend, grouped_mm
from farskip.triton_kernels.permute import permute
from farskip.triton_kernels.route import route
from farskip.triton_kernels.swiglu import swiglu
from farskip.triton_kernels.unpermute import unpermute

SETTINGS = ("auto", "triton", "reference", "off")
_SETTING, _RULE = "_farskip_kernels", "_farskip_rule"


def check_setting(setting: str) -> None:
    """Raise unless it is one of `SETTINGS`."""
    if setting not in SETTINGS:
        near = difflib.get_close_matches(setting, SETTINGS, n=1)
        raise ValueError(f"kernels={setting!r} is unknown; use {' or '.join(near or SETTINGS)}")


def dispatcher_backend(setting: str) -> str | None:
    """The backend of a dispatcher's row copies under a setting: None chooses by device."""
    check_setting(setting)
    return {"auto": None, "triton": "triton", "reference": "reference", "off": "reference"}[setting]


def setting_of(model: Any) -> str:
    """What `use_kernels` was last called with; ``auto`` if it was not."""
    return str(model.__dict__.get(_SETTING, "auto"))


def use_kernels(model: Any, setting: str = "auto") -> None:
    """Have the routers, routed experts, norms and stream of a model run on the fused kernels, or no longer.

    Args:
        model: a transformers model of a known family, rewired, parallel or neither.
        setting: see the module.

    Raises:
        ValueError: unknown setting or family.
    """
    from farskip.models.attach import attachment_of, layers_of
    from farskip.models.family import family_of_model

    check_setting(setting)
    family = family_of_model(model)
    model.__dict__[_SETTING] = setting
    for layer in layers_of(model):
        block = family.sub_blocks(layer)
        for norm in block.norms.values():
            if is_known(norm):
                _swap(norm, _fused_norm, setting, None)
        if block.experts is None:
            continue
        if family.router is not None:
            _swap(block.gate, _fused_router, setting, family.router)
        gate = family.swiglu(block.experts) if family.swiglu is not None else None
        if gate is not None:
            _swap(block.experts, _fused_experts, setting, gate)
    attachment = attachment_of(model)
    if attachment is None:
        return
    attachment.executor.stream_kernels = stream_kernels_of(model)
    if isinstance(attachment.executor.dispatcher, AllToAllDispatcher):
        attachment.executor.dispatcher.backend = dispatcher_backend(setting)


def stream_kernels_of(model: Any) -> HFStreamKernels | None:
    """What an executor over this model forms sums of the stream with; None for plain adds."""
    from farskip.models.attach import layers_of
    from farskip.models.family import family_of_model

    setting = model.__dict__.get(_SETTING, "off")
    if setting == "off":
        return None
    family = family_of_model(model)
    return HFStreamKernels([family.sub_blocks(layer) for layer in layers_of(model)], setting)


def kernels_line(model: Any, setting: str) -> str:
    """What runs where, in one line for a log; under autocast, if it is called so."""
    from farskip.models.attach import layers_of
    from farskip.models.family import family_of_model

    family = family_of_model(model)
    blocks = [family.sub_blocks(layer) for layer in layers_of(model)]
    parts = []
    moe = next((block for block in blocks if block.experts is not None), None)
    if moe is not None:
        weight = next(iter(moe.experts.parameters()))  # type: ignore[union-attr]
        router = (stream_backend(setting, weight) if family.router is not None else None) or "transformers"
        chosen = _experts_backend(setting, weight) or "transformers"
        experts = chosen if family.swiglu is not None and family.swiglu(moe.experts) is not None else "transformers"
        rows = choose_backend(dispatcher_backend(setting), weight)
        parts = [f"router {router}, experts {experts}, rows between ranks {rows}"]
    return f"kernels: {', '.join([*parts, _streams_part(model, setting, blocks)])} (kernels={setting})"


def _streams_part(model: Any, setting: str, blocks: Sequence[HFSubBlocks]) -> str:
    """What adds and norms the residual stream."""
    from farskip.models.attach import attachment_of

    norms = [(layer, block, name) for layer, block in enumerate(blocks) for name in block.norms]
    stream: torch.Tensor = model.get_input_embeddings().weight  # as it begins
    chosen = stream_backend(setting, stream)
    reasons = ((layer, why_norm_is_called(block, name, stream)) for layer, block, name in norms)
    called = [f"layer {layer}: {why}" for layer, why in reasons if why is not None]
    if chosen is None or len(called) == len(norms):
        return "streams and norms transformers" + (f" ({called[0]})" if chosen else "")
    some = f" but {len(called)} of {len(norms)} norms ({called[0]})" if called else ""
    attachment = attachment_of(model)
    if attachment is None:
        return f"norms {chosen}{some}"
    if attachment.executor.graph.chain is not None:
        return f"norms {chosen}{some}, streams added at all-reduces"
    return f"streams and norms {chosen}{some}"


def _swap(module: Any, make: Any, setting: str, rule: Any) -> None:
    """Give a module a class that looks at its setting. Twice is once."""
    if _SETTING not in module.__dict__:
        module.__class__ = make(type(module))
    module.__dict__[_SETTING], module.__dict__[_RULE] = setting, rule


def _experts_backend(setting: str, tensor: torch.Tensor) -> str | None:
    """What experts run on for this tensor; None is transformers' own code."""
    # torch's grouped matmul takes bf16 on CUDA; for other dtypes the plain loop would ask the device for sizes
    if setting == "auto" and product_dtype(tensor) != torch.bfloat16:
        return None
    return stream_backend(setting, tensor)


@cache
def _fused_router(router_class: Any) -> type:
    """A subclass of a router's class that may run `route`. One per class, so that types compare."""

    def forward(self: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        backend = stream_backend(self.__dict__[_SETTING], hidden_states)
        if backend is None:
            return router_class.forward(self, hidden_states)
        rule: RouterRule = self.__dict__[_RULE](self)
        tokens_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        weight, bias = self.weight, getattr(self, "bias", None)
        if rule.fp32_logits:
            tokens_TD, weight = tokens_TD.float(), weight.float()
        logits_TE = F.linear(tokens_TD, weight, bias)
        routing = route(
            logits_TE,
            rule.top_k,
            score=rule.score,
            bias=rule.bias,
            num_groups=rule.num_groups,
            top_groups=rule.top_groups,
            group_score=rule.group_score,
            renormalize=rule.renormalize,
            scale=rule.scale,
            backend=backend,
        )
        return logits_TE, routing.weights, routing.experts

    return type(router_class.__name__, (router_class,), {"forward": forward, "__module__": router_class.__module__})


@cache
def _fused_norm(norm_class: Any) -> type:
    """A subclass of a norm's class that may run `rms_norm`. One per class, so that types compare."""

    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        backend = stream_backend(self.__dict__[_SETTING], hidden_states)
        if backend is None or self.weight.dtype != hidden_states.dtype or not is_known(self):  # not: subclassed since
            return norm_class.forward(self, hidden_states)
        rule = norm_rule(self)
        return rms_norm(hidden_states, rule.weight, rule.eps, unit_offset=rule.unit_offset, backend=backend)

    return type(norm_class.__name__, (norm_class,), {"forward": forward, "__module__": norm_class.__module__})


@cache
def _fused_experts(experts_class: Any) -> type:
    """A subclass of an experts' class that may run on the kernels. One per class, so that types compare."""

    def forward(self: Any, hidden_states: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
        backend = _experts_backend(self.__dict__[_SETTING], hidden_states)
        if backend is None:
            return experts_class.forward(self, hidden_states, *arguments, **keywords)
        tokens_TD, gate = hidden_states.to(product_dtype(hidden_states)), self.__dict__[_RULE]
        return _experts(self, tokens_TD, *arguments, **keywords, gate=gate, backend=backend).to(hidden_states.dtype)

    return type(experts_class.__name__, (experts_class,), {"forward": forward, "__module__": experts_class.__module__})


def _experts(
    module: Any,
    tokens_TD: torch.Tensor,
    experts_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    *,
    gate: Mapping[str, Any],
    backend: str,
) -> torch.Tensor:
    """All experts of a module on their rows, weighted and summed per token [T, D]."""
    up, down = (weight.to(tokens_TD.dtype) for weight in (module.gate_up_proj, module.down_proj))
    if not module.is_transposed:  # transformers keeps [E, out, in]
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    products = "reference" if backend == "reference" else choose_grouped_backend(None, tokens_TD, up)
    dispatch = dispatch_map(experts_TK, up.shape[0], backend=backend)
    rows_RD = permute(tokens_TD, dispatch, backend=backend)
    hidden_RI = grouped_mm(rows_RD, up, dispatch.padded_offsets, backend=products)
    if not module.has_bias:
        activations_RI = swiglu(hidden_RI, **gate, backend=backend)
        return down_combine(activations_RI, down, dispatch, weights_TK, backend=backend, mm_backend=products)
    expert_R = experts_TK.reshape(-1)[dispatch.src.long()]
    hidden_RI = hidden_RI + module.gate_up_proj_bias[expert_R].to(hidden_RI.dtype)
    activations_RI = swiglu(hidden_RI, **gate, backend=backend)
    output_RD = grouped_mm(activations_RI, down, dispatch.padded_offsets, backend=products)
    output_RD = output_RD + module.down_proj_bias[expert_R].to(output_RD.dtype)
    return unpermute(output_RD, dispatch, weights_TK, backend=backend)
