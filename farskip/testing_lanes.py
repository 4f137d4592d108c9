"""A side lane for tests on CPU: nothing runs beside anything, and a book says what a device with two streams could do.

`LaneBook` is a `farskip.side_stream.SideLane` whose lanes are but names. It sees every operator, knows in which lane it
was issued, and keeps a clock per lane of what that lane is surely behind. A race is

    * an operator that reads or writes what another lane wrote, and is not behind it, or that writes what another lane
      reads, and is not behind that;
    * an operator on memory of the other lane that was not kept for this one: freed, it could be handed out too early.

In backward it does what autograd does on a device: runs each node in the lane of its forward op, has it wait for the
lanes that its gradients come from, and keeps them for it. Sums of gradients between nodes belong to no lane.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

MAIN, SIDE = "main", "side"
_NOBODY = ""

Clock = dict[str, int]


class _Mark(NamedTuple):
    lane: str
    clock: Clock


@dataclass(slots=True)
class _Memory:
    """What is known of one allocation. `storage` keeps its address from being used again."""

    storage: StorageWeakRef
    owner: str
    writer: str
    written: int
    read: Clock = field(default_factory=dict)
    kept: set[str] = field(default_factory=set)


class LaneBook(TorchDispatchMode):
    """Implements `farskip.side_stream.SideLane`; also the mode under which a pass has to run, forward and backward.

    Attributes:
        races: what went wrong, in words.
        crossings: how many values were read in another lane than that of their mark.
    """

    def __init__(self) -> None:
        super().__init__()
        self.races: list[str] = []
        self.crossings = 0
        self._lane = MAIN
        self._clocks: dict[str, Clock] = {lane: {MAIN: 0, SIDE: 0} for lane in (MAIN, SIDE)}
        self._memory: dict[int, _Memory] = {}
        self._switches: list[tuple[int, str]] = [(-1, MAIN)]

    # the lane

    @contextmanager
    def entered(self) -> Iterator[None]:
        """See `SideLane.entered`."""
        with self._in(SIDE):
            yield

    def mark(self) -> _Mark:
        """See `SideLane.mark`."""
        return _Mark(self._lane, dict(self._clocks[self._lane]))

    def read(self, mark: _Mark, *tensors: torch.Tensor) -> None:
        """See `SideLane.read`."""
        if mark.lane != self._lane:
            self.crossings += 1
            self._follow(self._lane, mark.clock)
            self.keep(*tensors)

    def keep(self, *tensors: torch.Tensor) -> None:
        """See `SideLane.keep`."""
        for tensor in tensors:
            self._keep(tensor, self._lane)

    @contextmanager
    def at(self, mark: _Mark) -> Iterator[None]:
        """See `SideLane.at`."""
        with self._in(mark.lane):
            yield
        self._follow(self._lane, self._clocks[mark.lane])

    def sent(self, tensor: torch.Tensor) -> Callable[[], bool]:
        """For a link, when it is waited for. What it returns says, later, whether the lane that waited has kept what
        was sent: no other lane knows when the transfer has read it."""
        lane, known = self._lane, self._memory.get(_address(tensor))
        return lambda: known is None or known.owner == lane or lane in known.kept

    # what is not a lane

    @contextmanager
    def on_the_wire(self) -> Iterator[None]:
        """Around what a link does to rows: it has streams of its own."""
        with self._in(_NOBODY):
            yield

    def backward(self, loss: torch.Tensor) -> None:
        """`loss.backward()`, each node in the lane that autograd would run it in."""
        nodes: dict[Any, str] = {}
        unseen = [loss.grad_fn]
        while unseen:
            node = unseen.pop()
            if node is not None and node not in nodes:
                nodes[node] = self._lane_of(node)
                unseen += [following for following, _ in node.next_functions]
        for node in nodes:
            node.register_prehook(partial(self._begin_node, nodes[node]))
            node.register_hook(partial(self._end_node, nodes, node))
        try:
            with self:
                loss.backward()
        finally:
            self._lane = MAIN
        self._follow(MAIN, self._clocks[SIDE])

    def _lane_of(self, node: Any) -> str:
        """A node was made between two switches of the lane. One that adds up a parameter's gradient is nobody's."""
        if type(node).__name__ == "AccumulateGrad":
            return _NOBODY
        return self._switches[bisect_right(self._switches, node._sequence_nr(), key=lambda each: each[0]) - 1][1]

    def _begin_node(self, lane: str, *_: Any) -> None:
        self._lane = lane

    def _end_node(self, nodes: dict[Any, str], node: Any, gradients: tuple[torch.Tensor | None, ...], *_: Any) -> None:
        lane, self._lane = nodes[node], _NOBODY
        for (following, _number), gradient in zip(node.next_functions, gradients, strict=False):
            other = nodes.get(following, _NOBODY)
            if gradient is not None and lane and other and other != lane:
                self._follow(other, self._clocks[lane])
                self._keep(gradient, other)

    # the book

    @contextmanager
    def _in(self, lane: str) -> Iterator[None]:
        before, self._lane = self._lane, lane
        self._switched()
        try:
            yield
        finally:
            self._lane = before
            self._switched()

    def _switched(self) -> None:
        """Nodes from here on are of this lane."""
        if self._lane:
            number: int = torch._C._autograd._get_sequence_nr()
            self._switches.append((number, self._lane))

    def _follow(self, lane: str, clock: Clock) -> None:
        own = self._clocks[lane]
        for other, time in clock.items():
            own[other] = max(own[other], time)

    def _keep(self, tensor: torch.Tensor, lane: str) -> None:
        known = self._memory.get(_address(tensor))
        if known is not None:
            known.kept.add(lane)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self._lane:
            return result
        taken = _tensors((args, *kwargs.values()))
        known = {_address(tensor) for tensor in taken}
        made = [tensor for tensor in _tensors(result) if _address(tensor) not in known]
        places, names = _written(func)
        values = [args[place] for place in places if place < len(args)] + [kwargs.get(name) for name in names]
        written = _tensors(values) if values else []
        if not made and not written:
            return result  # a view: nothing is read
        clock = self._clocks[self._lane]
        clock[self._lane] += 1
        for tensor in taken:
            self._check(func, tensor, is_write=any(tensor is each for each in written))
        for tensor in made:
            ref = StorageWeakRef(tensor.untyped_storage())
            self._memory[_address(tensor)] = _Memory(ref, self._lane, self._lane, clock[self._lane])
        return result

    def _check(self, func: Any, tensor: torch.Tensor, *, is_write: bool) -> None:
        known = self._memory.get(_address(tensor))
        if known is None or not tensor.numel():
            return
        lane, clock = self._lane, self._clocks[self._lane]
        what = f"{func} in the {lane} lane"
        if clock[known.writer] < known.written:
            self.races.append(f"{what} is not behind what the {known.writer} lane wrote")
        if known.owner != lane and lane not in known.kept:
            self.races.append(f"{what} uses memory of the {known.owner} lane that was not kept for it")
        known.read[lane] = clock[lane]
        if is_write:
            for other, time in known.read.items():
                if clock[other] < time:
                    self.races.append(f"{what} writes what the {other} lane may still read")
            known.writer, known.written = lane, clock[lane]


@cache
def _written(func: Any) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The arguments that an operator writes into: their places and names."""
    found = [
        (place, argument.name)
        for place, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return tuple(place for place, _ in found), tuple(name for _, name in found)


def _tensors(value: Any) -> list[torch.Tensor]:
    """Those in the arguments or results of an operator, which nest in lists and tuples."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for each in value for tensor in _tensors(each)] if isinstance(value, (list, tuple)) else []


def _address(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
