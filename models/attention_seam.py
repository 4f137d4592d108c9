"""The seam: a call-back between the projections and the core of a transformers attention, without touching its code.

Every supported attention calls transformers' attention interface exactly once, after its projections. A model under
farskip uses an implementation named ``farskip_<name>``, which calls the seam of the attention module, if one is set,
and then the implementation <name> itself. The name is registered for attention and for masks: without the mask entry
the model would silently run without one.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from farskip.stage import Seam

_PREFIX = "farskip_"
_SEAM = "_farskip_seam"


@contextmanager
def seam_set(attention: nn.Module, seam: Seam) -> Iterator[None]:
    """Have this attention call `seam` on its way, inside the ``with`` block."""
    setattr(attention, _SEAM, seam)
    try:
        yield
    finally:
        delattr(attention, _SEAM)


def install_seam(model: Any) -> None:
    """Switch a transformers model to the seamed form of the attention implementation it uses.

    Raises:
        ValueError: its implementation is unknown to transformers' interfaces.
    """
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    name = original_implementation(model)
    functions, masks = AttentionInterface(), AttentionMaskInterface()
    if name not in masks or (name != "eager" and name not in functions):
        raise ValueError(f"attention implementation {name!r} has no place for the seam; use sdpa or eager")
    AttentionInterface.register(_PREFIX + name, _seamed(name))
    AttentionMaskInterface.register(_PREFIX + name, masks[name])
    model.set_attn_implementation(_PREFIX + name)


def original_implementation(model: Any) -> str:
    """The attention implementation that the model would use without the seam."""
    return (model.config._attn_implementation or "eager").removeprefix(_PREFIX)


def _seamed(name: str) -> Callable[..., Any]:
    from transformers.modeling_utils import AttentionInterface

    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **arguments: Any,
    ) -> Any:
        seam = getattr(module, _SEAM, None)
        if seam is not None:
            query, key, value = seam(query, key, value)
        # eager is no entry of the interface: each family has its own, in the module of its attention class
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        return AttentionInterface().get_interface(name, eager)(module, query, key, value, attention_mask, **arguments)

    return attention
