"""The stages of a model and what each one waits for: wiring + sub-blocks -> `StageGraph`. Data only; no torch.

A stage is a stretch of compute that the executor runs in one go; a collective is what it launches and waits for.
Per layer, in program order:

    attention_in     norm, projections, rotary embedding        attention, up to the seam
    attention_core   core attention, output projection -> a     attention, after the seam
    mlp              norm, dense MLP -> m                       dense layers only
    route            norm, router, permutation of the rows
    dispatch         collective: rows to the ranks that hold their experts
    experts          the routed experts (without expert parallelism -> r)
    combine          collective: rows back to the ranks they came from
    shared           shared expert -> s
    merge            weighted sum of the returned rows -> r; nothing where the op that adds r sums them on the way

The adds of the residual stream are no stages: they are done when their sum is first read (`farskip.residual`).

Under tensor parallelism the outputs a, m, s, r are partial, and each group of them (`farskip.chain`) has an all-reduce
named after its last output:

    reduce_attention, reduce_mlp, reduce_shared, reduce_routed      collectives: from point to point of the stream

They are launched in the order of the stream. In backward the same names stand for the all-reduces of input gradients,
each after the last sub-block that reads the point of the stream whose gradient it sums.

Under sequence parallelism each rank holds the stream of its share of the tokens, and norms, adds, router and routed
experts work on that. Attention, MLP and shared expert, whose heads and widths are cut, see all tokens:

    attention_norm, mlp_norm, shared_norm               norm of the rank's tokens; the MLP's norm is done once
    gather_attention, gather_mlp, gather_shared         collectives (all-gather): the normed tokens of all ranks
    attention_in ... attention_core, mlp, shared        -> a, m, s of all tokens, partial
    scatter_attention, scatter_mlp, scatter_shared      collectives (reduce-scatter): the sum, of the rank's tokens

In chunked mode the tokens of a layer are routed once and then travel in chunks: dispatch, experts and combine exist
once per chunk, so that the exchanges of one chunk also hide under the routed experts of another. Under sequence
parallelism gather, MLP or shared expert, and scatter do so, too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Self

from farskip.chain import Chain, Point, Reader
from farskip.wiring import ATTENTION, MLP, ROUTED, SHARED, LayerInputs, Source

ATTENTION_IN, ATTENTION_CORE = "attention_in", "attention_core"
ROUTE, EXPERTS, MERGE = "route", "experts", "merge"
DISPATCH, COMBINE = "dispatch", "combine"
REDUCE = {block: f"reduce_{block}" for block in (ATTENTION, MLP, SHARED, ROUTED)}
"""Name of the all-reduce that ends with the output of a sub-block, or with the gradient of its input."""
REDUCTIONS = tuple(REDUCE.values())
_WHOLE = (ATTENTION, MLP, SHARED)
"""The sub-blocks that see all tokens under sequence parallelism."""
NORM = {block: f"{block}_norm" for block in _WHOLE}
GATHER = {block: f"gather_{block}" for block in _WHOLE}
SCATTER = {block: f"scatter_{block}" for block in _WHOLE}
BLOCK_OF = {name[block]: block for name in (NORM, GATHER, SCATTER) for block in _WHOLE}
"""The sub-block that a norm, gather or scatter belongs to."""
COLLECTIVES = (DISPATCH, COMBINE, *REDUCTIONS, *GATHER.values(), *SCATTER.values())


class Key(NamedTuple):
    """Names one stage or collective of a model: layer number, stage name, and chunk where there are several."""

    layer: int
    stage: str
    chunk: int = 0

    @property
    def label(self) -> str:
        """Stage and chunk as one word: ``dispatch`` for the first chunk, ``dispatch_1`` for the second."""
        return f"{self.stage}_{self.chunk}" if self.chunk else self.stage

    @classmethod
    def from_label(cls, layer: int, label: str) -> Self:
        """The inverse of `label`."""
        stage, _, chunk = label.rpartition("_")
        return cls(layer, stage, int(chunk)) if chunk.isdecimal() else cls(layer, label)

    def __str__(self) -> str:
        return f"{self.label}.{self.layer}"


@dataclass(frozen=True, slots=True)
class Stage:
    """One node of the graph: a stretch of compute, or a collective.

    Attributes:
        key: layer and name.
        after: the stages and collectives whose results it needs.
    """

    key: Key
    after: tuple[Key, ...]

    @property
    def is_collective(self) -> bool:
        """Whether it is launched and waited for instead of run."""
        return self.key.stage in COLLECTIVES

    @property
    def is_reduction(self) -> bool:
        """Whether it is an all-reduce of tensor parallelism."""
        return self.key.stage in REDUCTIONS


@dataclass(frozen=True, slots=True)
class StageGraph:
    """All stages of a model in program order, with their dependencies.

    Attributes:
        stages: in program order.
        chain: the stream between the all-reduces of tensor parallelism; None without.
    """

    stages: tuple[Stage, ...]
    chain: Chain | None = field(default=None, compare=False)

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return 1 + max(stage.key.layer for stage in self.stages)

    @property
    def has_collectives(self) -> bool:
        """Whether anything is in flight at all."""
        return any(stage.is_collective for stage in self.stages)

    @property
    def is_sequence_parallel(self) -> bool:
        """Whether each rank holds the stream of its share of the tokens."""
        return any(stage.key.stage in BLOCK_OF for stage in self.stages)

    @property
    def dispatching_layers(self) -> frozenset[int]:
        """Layers whose routed experts lie on other ranks."""
        return frozenset(stage.key.layer for stage in self.stages if stage.key.stage == DISPATCH)

    def of_layers(self, start: int, stop: int) -> tuple[Stage, ...]:
        """The stages of layers start..stop-1 in program order, without what they need from before `start`."""
        return tuple(
            Stage(stage.key, tuple(key for key in stage.after if key.layer >= start))
            for stage in self.stages
            if start <= stage.key.layer < stop
        )


def build_stage_graph(
    inputs: Sequence[LayerInputs],
    *,
    expert_parallel: bool,
    chunks: int = 1,
    tensor_parallel: bool = False,
    sequence_chunks: int = 0,
) -> StageGraph:
    """The stages of a model under a resolved wiring.

    Args:
        inputs: one entry per layer, from `Wiring.resolve`.
        expert_parallel: whether routed experts lie on other ranks, so that rows are dispatched and combined.
        chunks: into how many parts the tokens of each layer are cut for that.
        tensor_parallel: whether the outputs of sub-blocks are partial sums over ranks.
        sequence_chunks: with sequence parallelism, into how many parts the tokens of each layer are cut for MLP and
            shared expert; 0: every rank holds the whole stream.
    """
    if tensor_parallel and not sequence_chunks:
        return _reduced_graph(inputs, chunks if expert_parallel else 0)
    stages: list[Stage] = []
    full: tuple[Key, ...] = ()  # what x, the full stream at the layer's entry, needs
    outputs: dict[str, tuple[Key, ...]] = {}  # what each output of the previous layer needs
    before: tuple[Key, ...] = ()  # what the full stream at the previous layer's entry needs
    for layer, reads in enumerate(inputs):
        # n is the previous layer's entry stream plus those of its outputs that are not left out
        partial = before + tuple(key for block, keys in outputs.items() if block not in reads.left_out for key in keys)
        needs = {
            Source.FULL: full,
            Source.PARTIAL: partial,
            Source.AFTER_ATTENTION: (*full, Key(layer, SCATTER[ATTENTION] if sequence_chunks else ATTENTION_CORE)),
        }
        here, made = _layer_stages(layer, reads, needs, chunks if expert_parallel else 0, sequence_chunks)
        stages += here
        before, outputs = full, made
        full = _unique(before + tuple(key for keys in outputs.values() for key in keys))
    return StageGraph(tuple(stages))


def reduction_of(chain: Chain, point: Point) -> Key | None:
    """The all-reduce whose result makes a point of the stream; None at the model's entry."""
    layer, groups = point
    if groups == 0:
        return reduction_of(chain, Point(layer - 1, len(chain.groups[layer - 1]))) if layer else None
    return Key(layer, REDUCE[chain.groups[layer][groups - 1][-1]])


def gradient_of(readers: Sequence[Reader]) -> Key:
    """The all-reduce, in backward, of the gradient at a point of the stream; named after the last that reads it."""
    return Key(readers[-1].layer, REDUCE[readers[-1].blocks[-1]])


def reading_stages(reader: Reader) -> tuple[Key, ...]:
    """The stages behind one norm."""
    stage = {ATTENTION: ATTENTION_IN, MLP: MLP, SHARED: SHARED, ROUTED: ROUTE}
    return tuple(Key(reader.layer, stage[block]) for block in reader.blocks)


def _reduced_graph(inputs: Sequence[LayerInputs], chunks: int) -> StageGraph:
    """The stages under tensor parallelism; 0 chunks: no expert parallelism."""
    chain = Chain(inputs)
    stages: list[Stage] = []
    for layer, reads in enumerate(inputs):
        needs: dict[Source, tuple[Key, ...]] = {}
        for source in set(reads.sources):
            made_by = reduction_of(chain, chain.point(layer, source))
            needs[source] = (made_by,) if made_by is not None else ()
        here, made = _layer_stages(layer, reads, needs, chunks)
        if not chunks:  # with nothing to dispatch the shared expert need not wait for a window
            here.sort(key=lambda stage: stage.key.stage in (ROUTE, EXPERTS))
        after = 0
        for group in chain.groups[layer]:
            producers = tuple(key for block in group for key in made[block])
            after = max(after, 1 + max(index for index, stage in enumerate(here) if stage.key in producers))
            here.insert(after, Stage(Key(layer, REDUCE[group[-1]]), producers))
            after += 1
        stages += here
    return StageGraph(tuple(stages), chain)


def _layer_stages(
    layer: int, reads: LayerInputs, needs: dict[Source, tuple[Key, ...]], chunks: int, sequence_chunks: int = 0
) -> tuple[list[Stage], dict[str, tuple[Key, ...]]]:
    """Stages of one layer, and for each of its outputs the keys that produce it.

    0 chunks: no expert parallelism; 0 sequence chunks: no sequence parallelism.
    """
    stages: list[Stage] = []
    outputs: dict[str, tuple[Key, ...]] = {}

    def key(stage: str) -> Key:
        return Key(layer, stage)

    def add(stage: str, after: tuple[Key, ...], chunk: int = 0) -> tuple[Key, ...]:
        stages.append(Stage(Key(layer, stage, chunk), _unique(after)))
        return (stages[-1].key,)

    def add_whole(block: str, names: tuple[str, ...], before: tuple[Key, ...] = ()) -> None:
        """A sub-block that sees all tokens, and with sequence parallelism what brings them together and apart."""
        after, outputs[block] = needs[reads.source(block)], ()
        if sequence_chunks:
            after = add(NORM[block], after)
        for chunk in range(1 if block == ATTENTION else max(sequence_chunks, 1)):
            last = (*(add(GATHER[block], after, chunk) if sequence_chunks else after), *before)
            for name in names:
                last = add(name, last, chunk)
            outputs[block] += add(SCATTER[block], last, chunk) if sequence_chunks else last

    # One attention at a time: its second half runs inside the call that the first half has opened.
    one_at_a_time = (Key(layer - 1, ATTENTION_CORE),) if layer else ()
    add_whole(ATTENTION, (ATTENTION_IN, ATTENTION_CORE), one_at_a_time)
    if MLP in reads.blocks:
        add_whole(MLP, (MLP,))
    if ROUTED in reads.blocks:
        stages.append(Stage(key(ROUTE), _unique(needs[reads.source(ROUTED)])))
        for chunk in range(chunks):
            stages.append(Stage(Key(layer, DISPATCH, chunk), (key(ROUTE),)))
            stages.append(Stage(Key(layer, EXPERTS, chunk), (Key(layer, DISPATCH, chunk),)))
            stages.append(Stage(Key(layer, COMBINE, chunk), (Key(layer, EXPERTS, chunk),)))
        if not chunks:
            stages.append(Stage(key(EXPERTS), (key(ROUTE),)))
        if SHARED in reads.blocks:
            add_whole(SHARED, (SHARED,))
        if chunks:
            stages.append(Stage(key(MERGE), tuple(Key(layer, COMBINE, chunk) for chunk in range(chunks))))
        outputs[ROUTED] = (key(MERGE if chunks else EXPERTS),)
    return stages, outputs


def _unique(keys: tuple[Key, ...]) -> tuple[Key, ...]:
    return tuple(dict.fromkeys(keys))
