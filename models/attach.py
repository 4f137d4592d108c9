"""Attach the executor to a transformers model: its decoder layers keep their modules and names, and lose their forward.

transformers calls the layers one by one. Each layer but the last of a segment only notes what it is called with and
passes its input on; the last one lets the executor run the whole segment and returns the full stream. So the executor
owns the layer loop, and everything around it (masks, rotary embedding, cache, final norm) stays transformers' own.

A segment is the whole model, except: with gradient checkpointing it is `checkpoint_layers` layers, recomputed in
backward; when hidden states are captured, or a layer has a hook of its own, it is one layer, so that each layer returns
its full stream.

Refused, because it would silently compute something else: hidden states that are replaced between layers, and layers
that are called in another order or number, or outside the model.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import nn

from farskip.executor import Executor
from farskip.models.attention_seam import install_seam
from farskip.models.family import backbone_of
from farskip.models.saving import intercept_saving
from farskip.parallel.tensor_parallel import TensorLayout
from farskip.schedule import Segment, even_segments

_SHIM = "_farskip_shim"

BeforeForward = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]
"""Called with the backbone and what it is called with; raises on what must not be computed."""


class Attachment:
    """The executor of one model, and the state of the forward pass that is under way.

    Attributes:
        executor: runs the segments.
        checkpoint_layers: layers per recomputed segment when gradient checkpointing is on.
        recomputes_stages: whether stages keep only their inputs; survives a new executor.
        guards: called in front of every forward pass of a parallel model.
        captures: whether somebody reads what each layer returns, in the forward pass that is under way.
    """

    def __init__(self, model: Any, executor: Executor) -> None:
        self.executor = executor
        self.checkpoint_layers = 1
        self.recomputes_stages = False
        self.sharded_experts: tuple[str, ...] = ()
        self.tensor_layout = TensorLayout()
        self.mesh: Any = None
        self.guards: BeforeForward | None = None
        self._config: Any = backbone_of(model).config
        self.captures = False
        self._in_backbone = False
        self._call: _Call | None = None

    def before_backbone(self, backbone: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the backbone: is somebody going to read the layers' outputs?"""
        if self.guards is not None:
            self.guards(backbone, args, kwargs)
        layers = list(backbone.layers)[: self._config.num_hidden_layers]
        if len(layers) != self.executor.num_layers:
            raise RuntimeError(
                f"the model calls {len(layers)} of the {self.executor.num_layers} layers that farskip was attached to; "
                "cut layers before rewire or parallelize"
            )
        captures = kwargs.get("output_hidden_states")
        captures = self._config.output_hidden_states if captures is None else captures
        self.captures = bool(captures) or any(_is_hooked(layer) for layer in layers)
        self._call = None
        self._in_backbone = True

    def after_backbone(self, backbone: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the backbone: from here on nobody has a reason to call a layer."""
        self._in_backbone = False

    def call_layer(self, index: int, layer: Any, hidden_BSD: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """What a decoder layer does instead of its own forward."""
        recompute = layer.gradient_checkpointing and layer.training and torch.is_grad_enabled()
        if recompute:
            _refuse_reentrant(layer)
            kwargs = {**kwargs, "past_key_values": None, "use_cache": False}
        if not self._in_backbone:
            raise RuntimeError(
                f"layer {index} was called outside the model; under farskip a layer alone computes nothing, because "
                "its sub-blocks read the streams of its neighbors: call the model"
            )
        if self._call is None:
            self._call = _Call(self, hidden_BSD, recompute=recompute)
        result = self._call.layer(index, hidden_BSD, kwargs)
        if index + 1 == self.executor.num_layers:
            self._call = None
        return result

    def segments(self, *, recompute: bool) -> tuple[Segment, ...]:
        """Where the streams are drained in this forward pass."""
        num_layers = self.executor.num_layers
        if self.captures:
            return even_segments(num_layers, 1)
        return even_segments(num_layers, self.checkpoint_layers if recompute else num_layers)


class _Call:
    """One forward pass through the layers."""

    def __init__(self, attachment: Attachment, hidden_BSD: torch.Tensor, *, recompute: bool) -> None:
        self._executor = attachment.executor
        self._recompute = recompute
        self._schedule = attachment.executor.schedule(attachment.segments(recompute=recompute))
        self._segments = iter(self._schedule.segments)
        self._segment = next(self._segments)
        self._arguments: list[Mapping[str, Any]] = []
        self._shards = self._executor.shard_tokens(hidden_BSD.shape)
        self._x_BSD = self._n_BSD = hidden_BSD if self._shards is None else self._shards.enter(hidden_BSD)
        self._captures = attachment.captures
        self._returned = hidden_BSD

    def layer(self, index: int, hidden_BSD: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        if index != len(self._arguments):
            raise RuntimeError(
                f"layer {index} was called where layer {len(self._arguments)} stands; put layers in order before "
                "rewire or parallelize"
            )
        if hidden_BSD is not self._returned:
            raise RuntimeError(
                f"layer {index}: its input is not what the layer before returned; something between the layers (a "
                "hook, an adapter) replaced the hidden states, which farskip cannot honor: put it inside a sub-module"
            )
        self._arguments.append(kwargs)
        if index + 1 == self._segment.stop:
            self._x_BSD, self._n_BSD = self._executor.run_segment(
                self._schedule,
                self._segment,
                self._x_BSD,
                self._n_BSD,
                self._arguments,
                recompute=self._recompute,
                shards=self._shards,
            )
            self._segment = next(self._segments, self._segment)
            self._returned = self._x_BSD
            # Under sequence parallelism the whole stream exists where somebody reads it, and not between segments.
            if self._shards is not None and (self._captures or index + 1 == self._executor.num_layers):
                self._returned = self._shards.leave(self._x_BSD)
        return self._returned


def attach(model: Any, executor: Executor) -> Attachment:
    """Make the executor run the model's layers. Replaces an executor that is already attached."""
    from farskip.models.kernels import stream_kernels_of

    executor.stream_kernels = stream_kernels_of(model)
    previous = attachment_of(model)
    if previous is not None:
        if previous.recomputes_stages:
            from farskip.models.recompute import recomputed

            executor.sub_blocks = recomputed(executor.sub_blocks)
        previous.executor = executor
        return previous
    install_seam(model)
    attachment = Attachment(model, executor)
    backbone = backbone_of(model)
    for index, layer in enumerate(layers_of(model)):
        layer_class: Any = type(layer)
        layer.__class__ = _shimmed_class(layer_class)
        setattr(layer, _SHIM, (attachment, index))
    backbone.register_forward_pre_hook(attachment.before_backbone, with_kwargs=True)
    backbone.register_forward_hook(attachment.after_backbone)
    intercept_saving(model, attachment)
    return attachment


def attachment_of(model: Any) -> Attachment | None:
    """The attachment of a model; None if farskip was never attached to it."""
    shim = getattr(layers_of(model)[0], _SHIM, None)
    return shim[0] if shim is not None else None


def layers_of(model: Any) -> Any:
    """The decoder layers of a transformers model."""
    return backbone_of(model).layers


@cache
def _shimmed_class(layer_class: Any) -> type:
    """A subclass of a decoder layer class whose forward asks the attachment. One per class, so that types compare."""

    def forward(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        attachment, index = getattr(self, _SHIM)
        return attachment.call_layer(index, self, hidden_states, kwargs)

    shimmed = type(f"FarSkip{layer_class.__name__}", (layer_class,), {})
    # Set afterwards: transformers wraps the forward of a new subclass in its own, per-layer checkpointing.
    shimmed.forward = forward  # type: ignore[attr-defined]
    return shimmed


def _is_hooked(layer: nn.Module) -> bool:
    """Whether a layer has a hook besides those of transformers, which rest unless outputs are captured."""
    hooks = (*layer._forward_hooks.values(), *layer._forward_pre_hooks.values())
    return any(getattr(hook, "__module__", None) != "transformers.utils.output_capturing" for hook in hooks)


def _refuse_reentrant(layer: Any) -> None:
    keywords = getattr(layer._gradient_checkpointing_func, "keywords", {})
    if keywords.get("use_reentrant"):
        raise ValueError(
            "gradient checkpointing with use_reentrant=True loses gradients here; call "
            "model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})"
        )
