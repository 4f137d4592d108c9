"""The residual stream under tensor parallelism: sub-blocks hand over partial outputs, all-reduces carry it on.

    x' = x + sum over ranks (a)          one link of the chain (`farskip.chain`); several outputs of one group are added
    x' = x + sum over ranks (a + s)      before they are reduced

The counterpart of `farskip.residual` with the same face to the executor; the only place where outputs meet the stream.
Its points are formed at launch and filled at wait, so that backward finds them in the right order
(`farskip.reduction_autograd`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from farskip.async_autograd import Notify
from farskip.autograd_order import entry_points
from farskip.chain import Chain, Point
from farskip.pending import Pending
from farskip.reduction_autograd import GradientSum, enter, fill, join, tap
from farskip.residual import Mark, Residual, Uses
from farskip.stage import TensorParallel
from farskip.stage_graph import REDUCE, Key, StageGraph, gradient_of
from farskip.wiring import LayerBlocks, LayerInputs, Source


@dataclass(frozen=True, slots=True)
class _Layout:
    """What one segment's stretch of the chain looks like.

    Attributes:
        entries: the points at which the stream enters.
        gradients: for each point that is read, the all-reduce of its gradient, and how many norms read it.
        taps: the number of each reader of a point: (point, layer, norm).
        reductions: where each all-reduce of outputs leads to, and the outputs that it carries.
        uses: how often each point is used: read, added to, handed on.
    """

    entries: tuple[Point, ...]
    gradients: Mapping[Point, tuple[Key, int]]
    taps: Mapping[tuple[Point, int, str], int]
    reductions: Mapping[Key, tuple[Point, LayerBlocks]]
    uses: Mapping[Point, int]


@lru_cache(maxsize=256)
def _layout_of(chain: Chain, start: int, stop: int, leaves_partial: bool) -> _Layout:
    """Kept, because generation runs the same segment for every token."""
    readers, entries = chain.readers(start, stop), tuple(entry_points(chain.readers(start, stop), start))
    groups = [(layer, group) for layer in range(start, stop) for group in chain.groups[layer]]
    points = chain.points(start, stop)
    uses = {point: len(readers.get(point, ())) + (point >= Point(start, 0)) for point in (*entries, *points)}
    uses[Point(stop, 0)] = 1
    if leaves_partial:
        uses[chain.point(stop, Source.PARTIAL)] += 1
    return _Layout(
        entries,
        {point: (gradient_of(found), len(found)) for point, found in readers.items()},
        {
            (point, reader.layer, reader.norm): number
            for point, found in readers.items()
            for number, reader in enumerate(found)
        },
        {Key(layer, REDUCE[group[-1]]): (point, group) for point, (layer, group) in zip(points, groups, strict=True)},
        uses,
    )


class ReducedResidual(Residual):
    """The stream of one run through the layers start..stop-1.

    Args:
        graph: a graph with a chain.
        inputs: the resolved wiring of the whole model.
        uses: `stream_uses(inputs)`; those of the normed values count.
        start: first layer.
        stop: one past the last layer.
        x_BSD: full stream at the entry of `start`.
        n_BSD: the stream that leaves something out there; ignored where nothing is left out.
        ranks: who sums.
        blocking: whether all-reduces of gradients are waited for where they are launched.
        notify: who is told of an all-reduce; None for nobody.
    """

    def __init__(
        self,
        graph: StageGraph,
        inputs: Sequence[LayerInputs],
        uses: Uses,
        start: int,
        stop: int,
        x_BSD: torch.Tensor,
        n_BSD: torch.Tensor,
        *,
        ranks: TensorParallel,
        blocking: bool,
        notify: Callable[[Key], Notify | None],
    ) -> None:
        assert graph.chain is not None
        self._inputs, self._uses, self._stop, self._fixed_order = inputs, uses, stop, True
        self._fusions, self._kernels = {}, None  # sums are made by all-reduces
        self._aliases, self._rows_gradients = {}, {}
        self._lane = None
        self._chain, self._ranks, self._notify = graph.chain, ranks, notify
        self._layout = _layout_of(graph.chain, start, stop, self._leaves_partial())
        self._gradients = {
            point: GradientSum(ranks, num_taps, blocking=blocking, notify=notify(key))
            for point, (key, num_taps) in self._layout.gradients.items()
        }
        self._streams: dict[Point, torch.Tensor] = {}
        self._outputs: dict[tuple[int, str], torch.Tensor] = {}
        self._reducing: dict[Key, tuple[Pending, Notify | None, Point, Point]] = {}
        self._newest = Point(start, 0)
        self._uses_left = dict(self._layout.uses)
        for point in self._layout.entries:
            entering_BSD = x_BSD if point == self._newest else n_BSD
            self._streams[point] = enter(entering_BSD, self._gradients.get(point))

    def read(self, layer: int, source: Source, use: str, mark: Mark = lambda *tensors: tensors) -> torch.Tensor:
        """See `Residual.read`; behind a tap."""
        point = self._chain.point(layer, source)
        return mark(tap(self._use(point), self._gradients[point], self._layout.taps[point, layer, use]))[0]

    def put(self, layer: int, block: str, output_BSD: torch.Tensor) -> None:
        """Hand over the partial output of a sub-block."""
        self._outputs[layer, block] = output_BSD

    def launch(self, key: Key) -> None:
        """Start the all-reduce of a group of outputs, and form the point that it leads to."""
        (point, group), before = self._layout.reductions[key], self._newest
        first, *more = (self._outputs.pop((key.layer, block)) for block in group)
        partial_BSD = first
        for output_BSD in more:
            partial_BSD = partial_BSD + output_BSD
        # The join first: the all-reduce works in place, and autograd takes no view of a tensor that was overwritten.
        self._streams[point] = join(self._streams[before], partial_BSD, self._gradients.get(point))
        notify = self._notify(key)
        ended = notify("launch", False) if notify else None
        pending = self._ranks.all_reduce(partial_BSD.detach().contiguous())
        if ended:
            ended()
        self._reducing[key] = (pending, notify, before, point)
        self._newest = point

    def wait(self, key: Key) -> None:
        """Wait for an all-reduce and fill the point that it leads to."""
        pending, notify, before, point = self._reducing.pop(key)
        ended = notify("wait", False) if notify else None
        summed_BSD = pending.wait()
        if ended:
            ended()
        fill(self._streams[point], self._use(before), summed_BSD)

    def leave(self) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Residual.leave`."""
        full = self._use(Point(self._stop, 0))
        return full, self._use(self._chain.point(self._stop, Source.PARTIAL)) if self._leaves_partial() else full

    def _leaves_partial(self) -> bool:
        return self._stop < len(self._inputs) and bool(self._inputs[self._stop].left_out)

    def _use(self, point: Point) -> torch.Tensor:
        """The stream at a point; let go with its last use."""
        self._uses_left[point] -= 1
        return self._streams[point] if self._uses_left[point] else self._streams.pop(point)
