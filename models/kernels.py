"""The fused kernels under a transformers model: its routers and its routed experts, where they run on kernels.

A router or an experts module gets a subclass of its own class, which in each call runs kernels or what it was before:

    auto          kernels on CUDA in bf16, transformers' own code elsewhere
    triton        kernels, or an error that says why not
    reference     the kernels' plain-torch twins, on any device: what the kernels compute, to test against
    off           transformers' own code

The family says what its router (`Family.router`) and its experts' gate (`Family.swiglu`) compute; one that does not
keeps its own code. Weights, names and checkpoints stay as they are.

Legend: T tokens, K experts per token, E experts, D hidden, I expert's intermediate size, R rows.
"""

import difflib
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from farskip.models.router_rule import RouterRule
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
    """Have the routers and routed experts of a model run on the fused kernels, or no longer.

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
        if block.experts is None:
            continue
        if family.router is not None:
            _swap(block.gate, _fused_router, setting, family.router)
        gate = family.swiglu(block.experts) if family.swiglu is not None else None
        if gate is not None:
            _swap(block.experts, _fused_experts, setting, gate)
    attachment = attachment_of(model)
    if attachment is not None and attachment.executor.dispatcher is not None:
        attachment.executor.dispatcher.backend = dispatcher_backend(setting)  # type: ignore[attr-defined]


def kernels_line(model: Any, setting: str) -> str:
    """What runs where, in one line for a log."""
    from farskip.models.attach import layers_of
    from farskip.models.family import family_of_model

    family = family_of_model(model)
    blocks = [family.sub_blocks(layer) for layer in layers_of(model)]
    moe = next((block for block in blocks if block.experts is not None), None)
    if moe is None:
        return "kernels: none, the model has no routed experts"
    weight = next(iter(moe.experts.parameters()))  # type: ignore[union-attr]
    chosen = _backend(setting, weight) or "transformers"
    rows = choose_backend(dispatcher_backend(setting), weight)
    router = chosen if family.router is not None else "transformers"
    experts = chosen if family.swiglu is not None and family.swiglu(moe.experts) is not None else "transformers"
    return f"kernels: router {router}, experts {experts}, rows between ranks {rows} (kernels={setting})"


def _swap(module: Any, make: Any, setting: str, rule: Any) -> None:
    """Give a module a class that looks at its setting. Twice is once."""
    if _SETTING not in module.__dict__:
        module.__class__ = make(type(module))
    module.__dict__[_SETTING], module.__dict__[_RULE] = setting, rule


def _backend(setting: str, tensor: torch.Tensor) -> str | None:
    """What a module runs on for this tensor; None is transformers' own code."""
    if setting == "off":
        return None
    if setting == "auto":
        # torch's grouped matmul takes bf16 on CUDA; for other dtypes the plain loop would ask the device for sizes
        return "triton" if tensor.is_cuda and tensor.dtype == torch.bfloat16 else None
    return choose_backend(setting, tensor)


@cache
def _fused_router(router_class: Any) -> type:
    """A subclass of a router's class that may run `route`. One per class, so that types compare."""

    def forward(self: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        backend = _backend(self.__dict__[_SETTING], hidden_states)
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
def _fused_experts(experts_class: Any) -> type:
    """A subclass of an experts' class that may run on the kernels. One per class, so that types compare."""

    def forward(self: Any, hidden_states: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
        backend = _backend(self.__dict__[_SETTING], hidden_states)
        if backend is None:
            return experts_class.forward(self, hidden_states, *arguments, **keywords)
        return _experts(self, hidden_states, *arguments, **keywords, gate=self.__dict__[_RULE], backend=backend)

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
    up, down = module.gate_up_proj, module.down_proj
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
    hidden_RI = hidden_RI + module.gate_up_proj_bias[expert_R]
    activations_RI = swiglu(hidden_RI, **gate, backend=backend)
    output_RD = grouped_mm(activations_RI, down, dispatch.padded_offsets, backend=products)
    output_RD = output_RD + module.down_proj_bias[expert_R]
    return unpermute(output_RD, dispatch, weights_TK, backend=backend)
