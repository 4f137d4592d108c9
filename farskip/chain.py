"""The residual stream under tensor parallelism: a chain of sums, one all-reduce per link. Data only; no torch.

Under tensor parallelism the output of a sub-block is partial: the sum over the ranks is the output. Outputs that every
reader takes in together are summed first and share one all-reduce. So each layer's outputs fall into groups, in program
order, and the stream goes from one point to the next by one reduced group:

    wiring               groups of a layer with a shared expert     all-reduces
    ordinary, ladder     {attention} {shared + routed}              2
    farskip              {attention + shared} {routed}              2
    parallel             {attention + shared + routed}              1
    attn_only            {attention} {shared} {routed}              3

A dense layer has {attention} {mlp}, or {attention + mlp} where the MLP leaves attention out and nobody reads between.
That two left-out sets are suffixes of program order is what makes the stream a chain.

Source: that attention and the shared expert can share an all-reduce is in FarSkip-Collective (arXiv 2511.11505) 4.2.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from farskip.wiring import ATTENTION, LayerBlocks, LayerInputs, Source

MLP_NORM = "mlp_norm"
"""The reader that is not attention: the norm in front of MLP, router, shared and routed experts."""


class Point(NamedTuple):
    """The stream with everything before `layer` in it, and the first `groups` groups of that layer."""

    layer: int
    groups: int


class Reader(NamedTuple):
    """A norm that reads the stream: that of attention, or the one behind which MLP, shared and routed experts stand."""

    layer: int
    norm: str
    blocks: LayerBlocks


class Chain:
    """The stream of a model under a resolved wiring.

    Args:
        inputs: one entry per layer, from `Wiring.resolve`.

    Attributes:
        groups: per layer the groups of outputs that share an all-reduce, in program order.
    """

    def __init__(self, inputs: Sequence[LayerInputs]) -> None:
        self._inputs = tuple(inputs)
        self.groups: tuple[tuple[LayerBlocks, ...], ...] = tuple(
            _groups(here, after.left_out) for here, after in zip(inputs, _followers(inputs), strict=True)
        )

    def point(self, layer: int, source: Source) -> Point:
        """Where on the chain a source of a layer lies."""
        if source is Source.FULL:
            return Point(layer, 0)
        if source is Source.AFTER_ATTENTION:
            return Point(layer, 1)
        first_left_out = self._inputs[layer].left_out[0]
        return Point(layer - 1, [group[0] for group in self.groups[layer - 1]].index(first_left_out))

    def points(self, start: int, stop: int) -> tuple[Point, ...]:
        """The points that the all-reduces of layers start..stop-1 lead to, in order."""
        return tuple(
            Point(layer, index) if index < len(self.groups[layer]) else Point(layer + 1, 0)
            for layer in range(start, stop)
            for index in range(1, len(self.groups[layer]) + 1)
        )

    def readers(self, start: int, stop: int) -> dict[Point, tuple[Reader, ...]]:
        """What reads each point, among layers start..stop-1, in program order."""
        found: dict[Point, tuple[Reader, ...]] = {}
        for layer in range(start, stop):
            here = self._inputs[layer]
            reads = [Reader(layer, ATTENTION, (ATTENTION,))]
            for source in dict.fromkeys(here.source(block) for block in here.blocks if block != ATTENTION):
                blocks = tuple(block for block in here.blocks if block != ATTENTION and here.source(block) is source)
                reads.append(Reader(layer, MLP_NORM, blocks))
            for reader in reads:
                point = self.point(layer, here.source(reader.blocks[0]))
                found[point] = (*found.get(point, ()), reader)
        return found


def _followers(inputs: Sequence[LayerInputs]) -> list[LayerInputs]:
    """The layer behind each one. The last is cut as if it came again, so that layers of one kind reduce alike."""
    last = inputs[-1]
    comes_again = len(inputs) > 1 and inputs[-2].blocks == last.blocks
    return [*inputs[1:], last if comes_again else replace(last, left_out=())]


def _groups(here: LayerInputs, left_out: LayerBlocks) -> tuple[LayerBlocks, ...]:
    """The layer's outputs, cut where somebody reads the stream between two of them."""
    cuts = {0, len(here.blocks)}
    if Source.AFTER_ATTENTION in here.sources:
        cuts.add(1)
    if left_out:
        cuts.add(here.blocks.index(left_out[0]))
    edges = sorted(cuts)
    return tuple(here.blocks[start:stop] for start, stop in itertools.pairwise(edges))
