"""The seam: a call-back between the projections and the core of a transformers attention, without touching its code.

Every supported attention calls transformers' attention interface exactly once, after its projections. A model under
farskip uses an implementation named ``farskip_<name>``, which calls the seam of the attention module, if one is set,
and then the implementation <name> itself. The name is registered for attention and for masks: without the mask entry
the model would silently run without one. An implementation <name> that looks itself up by the name in the module's
config, as flash attention and the hub's kernels do, finds its own name there: it is called with a view of the module.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from farskip.models.core_gradients import refuse_lost_gradients
from farskip.stage import Seam

_PREFIX = "farskip_"
_SEAM = "_farskip_seam"
_AFTER_CORE = "_farskip_after_core"
_RECOMPUTE = "_farskip_recompute_core"


AfterCore = Callable[[torch.Tensor], torch.Tensor]
"""Called by an attention with its core's output [B, S, heads, head_dim]; its output projection reads the result."""


@contextmanager
def _attribute_set(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Not through the attribute protocol of nn.Module: this happens once per layer and pass."""
    module.__dict__[name] = value
    try:
        yield
    finally:
        del module.__dict__[name]


def seam_set(attention: nn.Module, seam: Seam) -> AbstractContextManager[None]:
    """Have this attention call `seam` on its way, inside the ``with`` block."""
    return _attribute_set(attention, _SEAM, seam)


def seam_of(attention: nn.Module) -> Seam | None:
    """What `seam_set` has set; None outside of it."""
    return attention.__dict__.get(_SEAM)


def core_recomputed(attention: nn.Module) -> AbstractContextManager[None]:
    """Have this attention keep only query, key and value of its core and run the core again in backward."""
    return _attribute_set(attention, _RECOMPUTE, True)


@contextmanager
def after_core_set(attention: nn.Module, after_core: AfterCore) -> Iterator[None]:
    """Have this attention pass its core's output through `after_core`, inside the ``with`` block.

    For families whose attention does something between core and output projection that transformers' class does not.

    Raises:
        RuntimeError: the attention did not get there, because its implementation is not the seamed one.
    """
    num_calls = 0

    def counted(output_BSHV: torch.Tensor) -> torch.Tensor:
        nonlocal num_calls
        num_calls += 1
        return after_core(output_BSHV)

    with _attribute_set(attention, _AFTER_CORE, counted):
        yield
    if num_calls != 1:
        raise RuntimeError(
            f"{type(attention).__name__}: its core was left {num_calls} times through the seam instead of once; its "
            "attention implementation was changed by set_attn_implementation: give it to from_pretrained instead"
        )


def install_seam(model: Any) -> None:
    """Switch a transformers model to the seamed form of the attention implementation it uses.

    The name is set in the config and not by transformers' ``set_attn_implementation``, which would load flash attention
    by the seamed name, or replace it by a name that it knows.

    Raises:
        ValueError: its implementation is unknown to transformers' interfaces, or one that this model does not go with.
    """
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    name = original_implementation(model)
    functions, masks = AttentionInterface(), AttentionMaskInterface()
    if name not in masks or (name != "eager" and name not in functions):
        raise ValueError(f"attention implementation {name!r} has no place for the seam; use sdpa or eager")
    # transformers refuses or replaces these while it loads; a config that was changed by hand has got past it. They
    # would run, and leave out the attention sinks of GPT-OSS or the chunks of Llama-4 without a word.
    known = model._compatible_flash_implementations
    if is_flash(name) and not (model._supports_flash_attn and name in (known or [name])):
        raise ValueError(
            f"attention implementation {name!r} does not compute the attention of {type(model).__name__}; load it with "
            f"one of {', '.join(['eager', *(known or ['sdpa'])])}"
        )
    AttentionInterface.register(_PREFIX + name, _seamed(name))
    AttentionMaskInterface.register(_PREFIX + name, masks[name])
    model.config._attn_implementation = _PREFIX + name


def is_flash(name: str) -> bool:
    """Whether transformers takes an implementation of this name for flash attention: its mask is None or [B, S]."""
    return "flash" in name


def original_implementation(model: Any) -> str:
    """The attention implementation that the model would use without the seam."""
    return (model.config._attn_implementation or "eager").removeprefix(_PREFIX)


def _seamed(name: str) -> Callable[..., Any]:
    from transformers.modeling_utils import AttentionInterface

    # A compiled attention breaks its graph here: traced into it, routers and collectives would end up in one graph with
    # the projections, and in one backward node.
    outside_graphs = torch.compiler.disable(_call, reason="farskip runs other stages in the seam")

    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **arguments: Any,
    ) -> Any:
        seam = seam_of(module)
        if seam is not None:
            call = outside_graphs if torch.compiler.is_compiling() else _call
            query, key, value = call(seam, query, key, value)
        core = AttentionInterface().get_interface(name, _eager_of(module))
        # The config itself keeps the seamed name: autograd's threads may recompute one attention while another runs.
        seen = _View(module, config=_View(module.config, _attn_implementation=name))
        if _RECOMPUTE in module.__dict__ and torch.is_grad_enabled():
            output_BSHV, weights = checkpoint(
                core, seen, query, key, value, attention_mask, use_reentrant=False, **arguments
            )
        else:
            output_BSHV, weights = core(seen, query, key, value, attention_mask, **arguments)
        if is_flash(name) and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            inputs = {"query": query, "key": key, "value": value, "sinks": arguments.get("s_aux")}
            refuse_lost_gradients(name, output_BSHV, inputs, needed=("query", "sinks"))
        after_core = module.__dict__.get(_AFTER_CORE)
        return (output_BSHV if after_core is None else after_core(output_BSHV)), weights

    return attention


class _View:
    """Another object, but for some attributes."""

    def __init__(self, viewed: Any, **attributes: Any) -> None:
        self.__dict__.update(attributes, _viewed=viewed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._viewed, name)


def _call(seam: Seam, *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return seam(*tensors)


def _eager_of(module: nn.Module) -> Any:
    """eager is no entry of the interface: each family has its own, in the module of its attention class or a base."""
    for kind in type(module).__mro__:
        eager = getattr(sys.modules[kind.__module__], "eager_attention_forward", None)
        if eager is not None:
            return eager
    return None
