"""The layer of megatron-core that a rewired spec names: it lets the executor run a stretch of layers in one go.

`TransformerBlock` calls its layers one by one and hands the second return value of each, `context`, to the next. So the
layers of a stretch (a segment) need nothing else to find each other:

    first layer      opens a call: the two streams at the segment's entry
    every layer      notes itself and what its attention is called with; hands the call on as context
    last layer       runs the segment; returns the full stream, and as context the one that leaves something out

Only tensors leave a segment. It ends where the block recomputes activations, behind a layer that has a forward hook
(which wants to see that layer's output), and with the pipeline stage. There both streams travel as one tensor, packed
on the batch axis: [S, 2B, D].

Legend: B batch, S sequence, D hidden.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec, get_module
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import get_pg_rank

from farskip.executor import Executor
from farskip.models.megatron_blocks import Elsewhere, MegatronSubBlocks, blocks_of, seamed
from farskip.models.megatron_limits import check_call, check_config, check_dropout, check_spec
from farskip.parallel.collectives import Link
from farskip.parallel.dispatcher import AllToAllDispatcher
from farskip.schedule import Schedule, Segment, even_segments
from farskip.wiring import ROUTED, LayerBlocks, Wiring


class Rewiring:
    """What the layers of one spec are told, and the stage that is being built from it.

    Args:
        wiring: name, or a `Wiring` for the whole model.
        layers: which layers, for a name.
        schedule: ``overlapped`` or ``serial``.
        chunks: parts of the tokens of a layer.
        make_link: makes the link of an expert-parallel group.
    """

    def __init__(
        self,
        wiring: str | Wiring,
        layers: str | Sequence[int],
        *,
        schedule: str,
        chunks: int,
        make_link: Callable[[Any], Link],
    ) -> None:
        self.schedule = schedule
        self.chunks = chunks
        self.make_link = make_link
        self._wiring = wiring
        self._layers = layers
        self._stage: Stage | None = None

    def wiring(self, num_layers: int) -> Wiring:
        """The wiring of a model of this many layers."""
        if isinstance(self._wiring, Wiring):
            return self._wiring
        return Wiring.named(self._wiring, num_layers, self._layers)

    def stage_of(
        self, layer: "FarSkipTransformerLayer", number: int, num_layers: int, kinds: Sequence[LayerBlocks]
    ) -> "Stage":
        """The stage that a new layer belongs to, the `number`-th of `num_layers`; blocks build them in order."""
        if number == 1:
            self._stage = Stage(self, layer, num_layers, kinds)
        assert self._stage is not None, "a block builds its first layer first"
        self._stage.add(layer)
        return self._stage


class Stage:
    """The layers of one pipeline stage, or of one chunk of it, and their executor.

    Args:
        rewiring: what the spec says.
        first: the first layer.
        num_layers: of this stage.
        kinds: the sub-blocks of all layers of the model.
    """

    def __init__(
        self, rewiring: Rewiring, first: "FarSkipTransformerLayer", num_layers: int, kinds: Sequence[LayerBlocks]
    ) -> None:
        self._rewiring = rewiring
        self._kinds = tuple(kinds)
        self._config = config = first.config
        self.start = first.layer_number - 1
        self.stop = self.start + num_layers
        self.wiring = rewiring.wiring(len(kinds))
        self.inputs = self.wiring.resolve(self._kinds)
        self.packs = config.pipeline_model_parallel_size > 1 and any(each.left_out for each in self.inputs)
        if self.packs and not config.variable_seq_lengths:
            raise ValueError(
                f"wiring {self.wiring}: two streams cross the pipeline cuts, packed in one tensor twice as large, and "
                "variable_seq_lengths=False makes the receiver expect half of it; set variable_seq_lengths=True"
            )
        self._layers: list[FarSkipTransformerLayer] = []
        self._executor: Executor | None = None

    @property
    def num_layers(self) -> int:
        """Number of layers of the whole model."""
        return len(self._kinds)

    @property
    def recomputes(self) -> bool:
        """Whether the block recomputes segments in training."""
        return self._config.recompute_granularity == "full"

    @property
    def executor(self) -> Executor:
        """Runs the layers.

        Raises:
            RuntimeError: not all of them were built.
        """
        if self._executor is None:
            raise RuntimeError(
                f"layers {self.start}..{self.stop - 1} make up this stage, and {len(self._layers)} of them were built "
                "from the spec; let one TransformerBlock build them all"
            )
        return self._executor

    def add(self, layer: "FarSkipTransformerLayer") -> None:
        """Take in the next layer; the last one completes the stage."""
        index = layer.layer_number - 1
        kind = blocks_of(layer.config, isinstance(layer.mlp, MoELayer))
        if index != self.start + len(self._layers) or index >= self.stop:
            raise RuntimeError(
                f"layer {index} was built where layer {self.start + len(self._layers)} of {self.start}.."
                f"{self.stop - 1} stands; give a TransformerBlock as many layers as its stage has"
            )
        if kind != self._kinds[index]:
            raise ValueError(
                f"layer {index} has {', '.join(kind)} where moe_layer_freq={layer.config.moe_layer_freq} says "
                f"{', '.join(self._kinds[index])}; set it to the list of what the layers are, 1 for experts, 0 for none"
            )
        self._layers.append(layer)
        if index + 1 == self.stop:
            self._executor = self._make_executor()

    def segments(self, *, recompute: bool) -> tuple[Segment, ...]:
        """The segments of this stage, as its block calls its layers."""
        num_layers, config = self.stop - self.start, self._config
        if not recompute:
            lengths = [num_layers]
        elif config.recompute_method == "uniform":
            lengths = [each.stop - each.start for each in even_segments(num_layers, config.recompute_num_layers)]
        else:  # block: that many layers one by one, the rest not recomputed
            alone = min(config.recompute_num_layers, num_layers)
            lengths = [1] * alone + [num_layers - alone] * (alone < num_layers)
        edges = [self.start]
        for length in lengths:
            edges.append(edges[-1] + length)
        return tuple(Segment(start, stop) for start, stop in pairwise(edges))

    def schedule(self, segment: Segment | None = None, *, recompute: bool) -> Schedule:
        """A schedule of the whole model; if a segment is given, one that has it."""
        here = self.segments(recompute=recompute)
        if segment is not None and segment not in here:  # a layer with a hook ended it
            here = (segment,)
        before, after = Segment(0, here[0].start), Segment(here[-1].stop, self.num_layers)
        whole = [each for each in (before, *here, after) if each.start < each.stop]
        return self.executor.schedule(whole)

    def _make_executor(self) -> Executor:
        blocks: list[Any] = [Elsewhere(kind) for kind in self._kinds]
        for layer in self._layers:
            blocks[layer.layer_number - 1] = MegatronSubBlocks(layer)
        dispatcher, group = None, self._layers[0].pg_collection.ep
        # Also for a stage without experts: all stages have one graph, and one order of gradient sums.
        if any(ROUTED in kind for kind in self._kinds) and group.size() > 1:
            link = self._rewiring.make_link(group)
            dispatcher = AllToAllDispatcher(link, self._config.num_moe_experts, self._rewiring.chunks)
        return Executor(blocks, self.wiring, dispatcher=dispatcher, mode=self._rewiring.schedule)


class FarSkipTransformerLayer(TransformerLayer):
    """Megatron's layer, whose forward takes part in a call of its segment.

    Args:
        config: the TransformerConfig; see `farskip.models.megatron_limits` for what it may say.
        layer_number: from 1 on, in this stage.
        rewiring: what all layers of the spec are told.
        is_moe: what all layers are; None where `moe_layer_freq` says it.

    Raises:
        ValueError: a setting that a rewired layer cannot honor, or a wiring that does not fit the model.
    """

    def __init__(
        self,
        config: Any,
        *arguments: Any,
        layer_number: int = 1,
        vp_stage: int | None = None,
        rewiring: Rewiring,
        is_moe: bool | None = None,
        **keywords: Any,
    ) -> None:
        check_config(config)
        super().__init__(config, *arguments, layer_number=layer_number, vp_stage=vp_stage, **keywords)
        check_dropout(self.hidden_dropout)
        if self.layer_number > config.num_layers:
            raise ValueError(
                f"layer {self.layer_number - 1} of a model of {config.num_layers} layers is one for multi-token "
                "prediction, which reads one stream; make its spec from the one that rewire_spec was given"
            )
        num_layers = get_num_layers_to_build(config, vp_stage, get_pg_rank(self.pg_collection.pp))
        self.farskip_stage = rewiring.stage_of(self, layer_number, num_layers, _kinds(config, is_moe))

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        context: Any = None,
        context_mask: torch.Tensor | None = None,
        *,
        padding_mask: torch.Tensor | None = None,
        inference_context: Any = None,
        inference_params: Any = None,
        **arguments: Any,
    ) -> tuple[torch.Tensor, Any]:
        """As of Megatron's layer. Inside a segment the first result is `hidden_states` again, and means nothing."""
        stage, index = self.farskip_stage, self.layer_number - 1
        extras = {"context_mask": context_mask, "padding_mask": padding_mask}
        check_call(index, extras | {"inference_context": inference_context, "inference_params": inference_params})
        recompute = stage.recomputes and self.training
        call = context if isinstance(context, _Call) else _Call(stage, index, hidden_states, context)
        call.note(index, hidden_states, {"attention_mask": attention_mask, **arguments})
        ends = any(segment.stop == index + 1 for segment in stage.segments(recompute=recompute))
        if not ends and not self._forward_hooks:
            return hidden_states, call
        return call.run(recompute=recompute)


class _Call:
    """One pass through a segment, as far as its layers were called.

    Args:
        stage: whose layers they are.
        start: the first one.
        hidden: what the block hands it: the full stream, or both behind a pipeline cut.
        partial: the stream that leaves something out; None where it is the full one.
    """

    def __init__(self, stage: Stage, start: int, hidden: torch.Tensor, partial: torch.Tensor | None) -> None:
        if start == stage.start and partial is not None:
            raise ValueError(
                f"layer {start} was called with a context, which carries the second stream here: leave it out"
            )
        if start > stage.start and partial is None and stage.inputs[start].left_out:
            raise RuntimeError(
                f"layer {start} was called without the context that layer {start - 1} returned, which carries the "
                "second stream: hand it on, as Megatron's TransformerBlock does"
            )
        self._stage = stage
        self._start = start
        self._hidden = hidden
        self._arguments: list[dict[str, Any]] = []
        if start == stage.start and start > 0 and stage.packs:
            self._x_BSD, self._n_BSD = (each.contiguous() for each in hidden.chunk(2, dim=1))
        else:
            self._x_BSD, self._n_BSD = hidden, hidden if partial is None else partial

    def note(self, index: int, hidden: torch.Tensor, arguments: dict[str, Any]) -> None:
        """A layer was called."""
        if index != self._start + len(self._arguments) or hidden is not self._hidden:
            raise RuntimeError(
                f"layer {index}: its input is not what layer {index - 1} returned; something between the layers "
                "replaced the hidden states or left a layer out, which farskip cannot honor: put it inside a sub-module"
            )
        self._arguments.append(arguments)

    def run(self, *, recompute: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the layers that were called. Returns both streams; one tensor in front of a pipeline cut."""
        stage, stop = self._stage, self._start + len(self._arguments)
        segment = Segment(self._start, stop)
        x_BSD, n_BSD = stage.executor.run_segment(
            stage.schedule(segment, recompute=recompute),
            segment,
            self._x_BSD,
            self._n_BSD,
            [*({} for _ in range(self._start)), *self._arguments],
        )
        if stop == stage.stop and stop < stage.num_layers and stage.packs:
            return torch.cat((x_BSD, n_BSD), dim=1), None
        return x_BSD, None if n_BSD is x_BSD else n_BSD


def rewire_layer_spec(spec: Any, rewiring: Rewiring, *, alike: bool = False) -> Any:
    """The spec of a layer, rewired.

    Args:
        spec: of a TransformerLayer.
        rewiring: what its layers are told.
        alike: whether all layers of the model are built from it.

    Raises:
        ValueError: the layer has parts that the sub-blocks do not know.
    """
    check_spec(spec)
    parts = spec.submodules
    attention = parts.self_attention
    core = attention.submodules.core_attention
    seamed_core = seamed(get_module(core))
    core = replace(core, module=seamed_core) if isinstance(core, ModuleSpec) else seamed_core
    attention = replace(attention, submodules=replace(attention.submodules, core_attention=core))
    told: dict[str, Any] = {"rewiring": rewiring}
    if alike:
        told["is_moe"] = getattr(parts.mlp, "module", None) is MoELayer
    return replace(
        spec,
        module=FarSkipTransformerLayer,
        params={**spec.params, **told},
        submodules=replace(parts, self_attention=attention),
    )


def _kinds(config: Any, is_moe: bool | None) -> list[LayerBlocks]:
    """The sub-blocks of every layer of a model, those of other pipeline stages included."""
    pattern = config.moe_layer_freq
    if is_moe is not None or config.num_moe_experts is None:
        experts = [bool(is_moe)] * config.num_layers
    elif isinstance(pattern, int):
        experts = [layer % pattern == 0 for layer in range(config.num_layers)]
    else:
        experts = [bool(one) for one in pattern]
    return [blocks_of(config, here) for here in experts]
