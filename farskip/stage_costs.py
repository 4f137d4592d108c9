"""How long stages take, derived from shapes at stated rates: for a what-if before anything was measured. No torch.

A stage takes as long as its slower half: its floating-point operations at a rate, or its bytes of memory at another
(weights, inputs and outputs, each once). A collective takes a latency, and its bytes at a bandwidth:

    dispatch, combine    rows * D * (W - 1) / W         routing is taken to be balanced; rows = own tokens * K
    all-reduce           tokens * D * 2 (W - 1) / W     gather, scatter: half of that

Left out: launches, norms inside stages, biases, sliding windows (every layer attends to the whole sequence, causally),
skew of the routing. Backward is twice the compute and the same bytes (`farskip.simulator.StageTimes`).

Legend: D hidden, K experts per token, W ranks of an axis. Tokens are those of one data-parallel rank; under tensor
parallelism the ranks of a group have the same tokens, and each of them routes its share, its own tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from farskip.simulator import StageTimes
from farskip.stage_graph import (
    ATTENTION_CORE,
    ATTENTION_IN,
    COMBINE,
    DISPATCH,
    EXPERTS,
    GATHER,
    MERGE,
    NORM,
    REDUCTIONS,
    ROUTE,
    SCATTER,
)
from farskip.wiring import MLP, SHARED, LayerBlocks

EP, TP = "ep", "tp"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Sizes of a model, and how many weights the parts of a layer have. 0: unknown, or there is no such part.

    Attributes:
        blocks: the sub-blocks of each layer.
        hidden: D.
        num_experts: routed experts of a layer.
        top_k: K.
        attention_in: weights in front of the attention core that tensor parallelism cuts.
        attention_whole: those that it leaves whole (the latents of latent attention).
        attention_out: weights behind the core.
        attention_width: heads * (size of a key + size of a value): products per pair of tokens in the core.
        mlp: weights of a dense MLP.
        shared: of the shared expert.
        expert: of one routed expert.
    """

    blocks: tuple[LayerBlocks, ...]
    hidden: int = 0
    num_experts: int = 0
    top_k: int = 0
    attention_in: int = 0
    attention_whole: int = 0
    attention_out: int = 0
    attention_width: int = 0
    mlp: int = 0
    shared: int = 0
    expert: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Who has what.

    Attributes:
        tokens: of one step of one data-parallel rank.
        sequence: tokens of one sequence.
        ep: ranks that share the experts.
        tp: ranks that share attention, dense MLPs and shared experts.
        sequence_parallel: whether they share the stream, too.
        chunks: parts into which tokens are cut on their way.
        number_bytes: of one number, computed with, stored and sent.
    """

    tokens: int
    sequence: int
    ep: int = 1
    tp: int = 1
    sequence_parallel: bool = False
    chunks: int = 1
    number_bytes: int = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkRate:
    """A link between ranks: what leaves and enters one of them."""

    gb_s: float
    latency_us: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """What a machine achieves; None: not said.

    Attributes:
        tflops: 10^12 floating-point operations per second.
        memory_gb_s: 10^9 bytes per second.
        links: by axis, ``ep`` and ``tp``.
    """

    tflops: float | None = None
    memory_gb_s: float | None = None
    links: Mapping[str, LinkRate]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What one stage of one layer does in forward, all chunks together.

    Attributes:
        flops: floating-point operations.
        memory_bytes: read and written.
        link_bytes: sent by one rank.
        axis: whose link carries them; empty for compute.
        launches: how often the latency is paid.
    """

    flops: float = 0.0
    memory_bytes: float = 0.0
    link_bytes: float = 0.0
    axis: str = ""
    launches: int = 1

    def ms(self, rates: Rates) -> float | None:
        """Milliseconds; None if a rate that it takes is not said."""
        if self.axis:
            link = rates.links.get(self.axis)
            return None if link is None else self.launches * link.latency_us / 1e3 + self.link_bytes / link.gb_s / 1e6
        if rates.tflops is None or rates.memory_gb_s is None:
            return None
        return max(self.flops / rates.tflops / 1e9, self.memory_bytes / rates.memory_gb_s / 1e6)


def stage_costs(shape: ModelShape, layout: Layout) -> dict[str, Cost]:
    """What every stage and collective does whose sizes are known, by name."""
    tokens, own = layout.tokens, layout.tokens / layout.tp
    rows, width, size = own * shape.top_k, shape.hidden, layout.number_bytes
    found: dict[str, Cost] = {}

    def product(stage: str, inputs: float, weights: float, *, times: float | None = None, more: float = 0.0) -> None:
        """`inputs` vectors of width D in and out, each multiplied with `times` weights, of which `weights` are read."""
        if weights:
            flops = 2.0 * inputs * (weights if times is None else times) + more
            found[stage] = Cost(flops=flops, memory_bytes=size * (weights + 2 * inputs * width))

    product(ATTENTION_IN, tokens, shape.attention_in / layout.tp + shape.attention_whole)
    core = tokens * layout.sequence * shape.attention_width / layout.tp  # causal: half of all pairs, 2 operations each
    product(ATTENTION_CORE, tokens, shape.attention_out / layout.tp, more=core)
    product(MLP, tokens, shape.mlp / layout.tp)
    product(SHARED, tokens, shape.shared / layout.tp)
    product(EXPERTS, rows, shape.expert * shape.num_experts / layout.ep, times=shape.expert)
    if width:
        copied = size * width * (own + rows)
        found |= {
            ROUTE: Cost(flops=2.0 * own * width * shape.num_experts, memory_bytes=copied),
            MERGE: Cost(flops=2.0 * rows * width, memory_bytes=copied),
            **dict.fromkeys(NORM.values(), Cost(flops=4.0 * own * width, memory_bytes=2 * size * own * width)),
        }
        exchange = Cost(link_bytes=size * rows * width * _others(layout.ep), axis=EP, launches=layout.chunks)
        found |= dict.fromkeys((DISPATCH, COMBINE), exchange)
        moved = size * tokens * width * _others(layout.tp)
        found |= dict.fromkeys(REDUCTIONS, Cost(link_bytes=2 * moved, axis=TP))
        for name in (GATHER, SCATTER):
            for block, stage in name.items():
                launches = layout.chunks if block in (MLP, SHARED) else 1
                found[stage] = Cost(link_bytes=moved, axis=TP, launches=launches)
    return found


def times_of(costs: Mapping[str, Cost], rates: Rates) -> StageTimes:
    """Milliseconds of the stages for which the rates are said."""
    known = {stage: cost.ms(rates) for stage, cost in costs.items()}
    return StageTimes(forward={stage: ms for stage, ms in known.items() if ms is not None})


def _others(ranks: int) -> float:
    """The share of something spread evenly that lies on other ranks."""
    return (ranks - 1) / ranks
