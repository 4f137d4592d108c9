"""The residual stream: every sum of sub-block outputs, in the one bracketing that this project uses.

    y  = x + a                      a: attention
    n' = y + s                      s: shared expert; n' leaves out the routed output
    x' = y + (r + s)                r: routed experts
    x' = y + m                      m: dense MLP

A sum is formed when it is first read; where kernels are at hand, in one op with the norm that reads it, as a plan says
(`farskip.fusion`). Each value is handed out as one alias per use, so that in backward the gradients of its uses are
added in program order whatever order the stages ran in (`farskip.async_autograd.fan_out`). An op adds the gradient that
comes through its norm last; one that hands out its norm by use adds the gradients of the uses itself, in that order.

Source: the bracketing is that of ordinary models and of Instella-MoE (arXiv 2609.00791).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from farskip.async_autograd import fan_out
from farskip.chain import MLP_NORM as MLP_NORM
from farskip.rows_gradient import RowsGradient
from farskip.side_stream import SideLane, tensors_in
from farskip.stage import Norm, RoutedRows, StreamKernels
from farskip.wiring import ATTENTION, MLP, ROUTED, SHARED, LayerInputs, Source

GATE, ROWS = "gate", "rows"
ADD_Y, ADD_X, ADD_N, _OUT = "add_y", "add_x", "add_n", "out"
_NORMED = "normed_"


class Value(NamedTuple):
    """A tensor of the stream: x, n, y of a layer, an output of one of its sub-blocks, or a normed input."""

    layer: int
    name: str


Uses = Mapping[Value, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Fusion:
    """One op that forms values of the stream together with the norms that read them.

    Attributes:
        op: the method of `farskip.stage.StreamKernels`.
        takes: the values that it adds up, each with the use that this is; in the op's order.
        makes: what it returns: one sum, and a normed value per norm.
        norms: the norms.
        as_rows: whether the routed output that it adds may come as rows.
        by_use: whether it hands out its norm itself, one alias per use, and takes the gradient of the rows that are
            copied from it unsummed (`farskip.rows_gradient`).
    """

    op: str
    takes: tuple[tuple[Value, str], ...]
    makes: tuple[Value, ...]
    norms: tuple[Norm, ...]
    as_rows: bool = False
    by_use: bool = False


_NO_FUSIONS: Mapping[Value, Fusion] = MappingProxyType({})

Mark = Callable[..., tuple[torch.Tensor, ...]]
"""Called with the tensors that a stage takes in; returns the same ones."""


def _unmarked(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tensors


def normed_value(norm: Norm, stream: Value) -> Value:
    """The normed form of a value of the stream. Attention reads one value, the norm behind it up to three."""
    return Value(norm.layer, _NORMED + (ATTENTION if norm.name == ATTENTION else stream.name))


def stream_uses(inputs: Sequence[LayerInputs]) -> Uses:
    """For every value of the stream, what uses it, in program order: the order in which gradients are added."""
    uses: dict[Value, tuple[str, ...]] = {}
    for layer, here in enumerate(inputs):
        after = inputs[layer + 1] if layer + 1 < len(inputs) else None
        base = partial_base(here.blocks, after.left_out) if after and after.left_out else None
        mlp_sources = {here.source(block) for block in here.blocks if block != ATTENTION}

        def readers(source: Source, mlp_sources: set[Source] = mlp_sources, here: LayerInputs = here) -> list[str]:
            found = [ATTENTION] if here.source(ATTENTION) is source else []
            return found + ([MLP_NORM] if source in mlp_sources else [])

        full = readers(Source.FULL)
        full.insert(1 if ATTENTION in full else 0, ADD_Y)
        uses[Value(layer, Source.FULL)] = (*full, *([ADD_N] if base == "x" else []))
        uses[Value(layer, Source.PARTIAL)] = tuple(readers(Source.PARTIAL))
        uses[Value(layer, Source.AFTER_ATTENTION)] = (
            *readers(Source.AFTER_ATTENTION),
            ADD_X,
            *([ADD_N] if base in ("y", "y+s") else []),
        )
        uses[Value(layer, SHARED)] = (ADD_X, *([ADD_N] if base == "y+s" else []))
        for block in (ATTENTION, MLP, ROUTED):
            uses[Value(layer, block)] = (ADD_X,)
        uses[Value(layer, _NORMED + ATTENTION)] = (ATTENTION,)
        for source in mlp_sources:
            wanted: list[str] = []
            for block, names in ((MLP, (MLP,)), (ROUTED, (GATE, ROWS)), (SHARED, (SHARED,))):
                if block in here.blocks and here.source(block) is source:
                    wanted += names
            uses[Value(layer, _NORMED + source)] = tuple(wanted)
    return uses


def partial_base(blocks: tuple[str, ...], left_out: tuple[str, ...]) -> str:
    """What n is made of, at the entry of the layer after one with these sub-blocks: x, y or y+s of that layer."""
    if ATTENTION in left_out:
        return "x"
    return "y+s" if SHARED in blocks and SHARED not in left_out else "y"


def _marked(mark: Mark, terms: Sequence[torch.Tensor | RoutedRows]) -> list[Any]:
    """The same terms behind one mark. Of a routed output in rows: the rows, and the weights, which are read here."""
    tensors: list[torch.Tensor] = []
    for term in terms:
        if isinstance(term, RoutedRows):
            tensors += [term.rows_RD] if term.weights_TK is None else [term.rows_RD, term.weights_TK]
        else:
            tensors.append(term)
    marked = iter(mark(*tensors))
    return [
        replace(term, rows_RD=next(marked), weights_TK=None if term.weights_TK is None else next(marked))
        if isinstance(term, RoutedRows)
        else next(marked)
        for term in terms
    ]


class Residual:
    """The streams of one run through the layers start..stop-1.

    Args:
        inputs: the resolved wiring of the whole model.
        uses: `stream_uses(inputs)`, or what a plan leaves of it.
        start: first layer.
        stop: one past the last layer.
        x_BSD: full stream at the entry of `start`.
        n_BSD: the stream that leaves something out there; ignored where nothing is left out.
        fixed_order: whether gradients are added in program order; needed only where stages can move.
        fusions: the op that makes a value; those without one are added up here.
        kernels: has the ops.
        lane: told where each value is formed and where it is read; None where there is one lane.
    """

    def __init__(
        self,
        inputs: Sequence[LayerInputs],
        uses: Uses,
        start: int,
        stop: int,
        x_BSD: torch.Tensor,
        n_BSD: torch.Tensor,
        *,
        fixed_order: bool,
        fusions: Mapping[Value, Fusion] = _NO_FUSIONS,
        kernels: StreamKernels | None = None,
        lane: SideLane | None = None,
    ) -> None:
        self._inputs = inputs
        self._uses = uses
        self._stop = stop
        self._fixed_order = fixed_order
        self._fusions = fusions
        self._kernels = kernels
        self._lane = lane
        self._marks: dict[Value, Any] = {}
        self._dtype = x_BSD.dtype
        self._aliases: dict[Value, dict[str, Any]] = {}
        self._rows_gradients: dict[Value, RowsGradient] = {}
        self._offer(Value(start, Source.FULL), x_BSD)
        if inputs[start].left_out:
            self._offer(Value(start, Source.PARTIAL), n_BSD)

    def read(self, layer: int, source: Source, use: str, mark: Mark = _unmarked) -> torch.Tensor:
        """The alias of a stream value for one use; forms the value if this is its first use.

        Args:
            layer: whose entry or middle the value stands at.
            source: which value.
            use: the use.
            mark: called with what the reader takes in: the terms, if an op forms the value now, else the value.
        """
        value = Value(layer, source)
        if value in self._fusions and value not in self._aliases:
            self._run(self._fusions[value], mark)
            return self._take(value, use)
        return mark(self._take(value, use))[0]

    def put(self, layer: int, block: str, output_BSD: torch.Tensor) -> None:
        """Hand over the output of a sub-block. Where there are ops it takes the stream's dtype here, once, before its
        uses part: under autocast it has another one, and which op or plain add reads it must not change a bit."""
        self._offer(Value(layer, block), output_BSD if self._kernels is None else output_BSD.to(self._dtype))

    def takes_rows(self, layer: int, rows: Sequence[torch.Tensor]) -> bool:
        """Whether `put_rows` takes the routed output of a layer: an op adds it, and it is one piece whose dtype is the
        stream's or a narrower one, in which it is rounded as if it was merged."""
        fusion = self._fusions.get(Value(layer + 1, Source.FULL))
        if fusion is None or not fusion.as_rows or len(rows) > 1:
            return False
        return torch.promote_types(rows[0].dtype, self._dtype) == self._dtype

    def put_rows(self, layer: int, routed: RoutedRows) -> None:
        """Hand over a routed output as rows."""
        self._hand_out(Value(layer, ROUTED), {ADD_X: routed})

    def form_normed(self, layer: int, which: str, mark: Mark) -> bool:
        """Form a normed value together with its sum, if there is an op for that.

        Args:
            layer: whose norm.
            which: `ATTENTION` for its input, or the `Source` that MLP, router, shared and routed experts read.
            mark: called with what the op takes in.
        """
        fusion = self._fusions.get(Value(layer, _NORMED + which))
        if fusion is not None:
            self._run(fusion, mark)
        return fusion is not None

    def put_normed(self, layer: int, which: str, normed_BSD: torch.Tensor) -> None:
        """Hand over a normed value for which there is no op; see `form_normed`."""
        self._offer(Value(layer, _NORMED + which), normed_BSD)

    def has_normed(self, layer: int, which: str) -> bool:
        """Whether a normed value is there."""
        return Value(layer, _NORMED + which) in self._aliases

    def read_normed(self, layer: int, which: str, use: str) -> torch.Tensor:
        """The alias of a normed value for one use."""
        return self._take(Value(layer, _NORMED + which), use)

    def rows_gradient(self, layer: int, which: str) -> RowsGradient | None:
        """Where the gradient of rows that are copied from a normed value can be laid aside; once per value."""
        return self._rows_gradients.pop(Value(layer, _NORMED + which), None)

    def leave(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Both streams behind the last layer; the same tensor twice where nothing is left out there."""
        full = self._take(Value(self._stop, Source.FULL), _OUT)
        if self._stop == len(self._inputs) or not self._inputs[self._stop].left_out:
            return full, full
        return full, self._take(Value(self._stop, Source.PARTIAL), _OUT)

    def _offer(self, value: Value, tensor: torch.Tensor) -> None:
        uses = (_OUT,) if value.layer == self._stop else self._uses[value]
        if self._fixed_order:
            self._hand_out(value, dict(zip(uses, fan_out(tensor, len(uses)), strict=True)))
        else:
            self._hand_out(value, dict.fromkeys(uses, tensor))

    def _hand_out(self, value: Value, aliases: dict[str, Any]) -> None:
        """A value is there, in the lane that the caller is in."""
        self._aliases[value] = aliases
        if self._lane is not None:
            self._marks[value] = self._lane.mark()

    def _take(self, value: Value, use: str) -> Any:
        if value not in self._aliases:
            if value in self._fusions:
                self._run(self._fusions[value], _unmarked)
            else:
                self._offer(value, self._form(value))
        alias = self._aliases[value].pop(use)
        if self._lane is not None:
            self._lane.read(self._marks[value], *tensors_in(alias))
        return alias

    def _run(self, fusion: Fusion, mark: Mark) -> None:
        """Form values by an op."""
        terms = _marked(mark, [self._take(value, use) for value, use in fusion.takes])
        if not fusion.by_use:
            made = getattr(self._kernels, fusion.op)(fusion.norms, *terms)
            for value, tensor in zip(fusion.makes, made, strict=True):
                self._offer(value, tensor)
            return
        assert self._kernels is not None
        (stream, normed), (norm,) = fusion.makes, fusion.norms
        uses, gradient = self._uses[normed], RowsGradient()
        stream_BSD, *aliases = self._kernels.release_router_by_use((norm,), len(uses), gradient, *terms)
        self._offer(stream, stream_BSD)
        self._hand_out(normed, dict(zip(uses, aliases, strict=True)))
        self._rows_gradients[normed] = gradient

    def _form(self, value: Value) -> torch.Tensor:
        """The bracketing, where no op forms the value. With the ops, whose bracketing is the same, the only place where
        sub-block outputs are added to the stream."""
        layer, name = value
        if name == Source.AFTER_ATTENTION:
            return self._take(Value(layer, Source.FULL), ADD_Y) + self._take(Value(layer, ATTENTION), ADD_X)
        before = layer - 1
        blocks = self._inputs[before].blocks
        if name == Source.FULL:
            y_BSD = self._take(Value(before, Source.AFTER_ATTENTION), ADD_X)
            if MLP in blocks:
                return y_BSD + self._take(Value(before, MLP), ADD_X)
            routed_BSD = self._take(Value(before, ROUTED), ADD_X)
            if SHARED in blocks:
                return y_BSD + (routed_BSD + self._take(Value(before, SHARED), ADD_X))
            return y_BSD + routed_BSD
        assert name == Source.PARTIAL, f"{value} was read before it was put"
        base = partial_base(blocks, self._inputs[layer].left_out)
        if base == "x":
            return self._take(Value(before, Source.FULL), ADD_N)
        y_BSD = self._take(Value(before, Source.AFTER_ATTENTION), ADD_N)
        return y_BSD if base == "y" else y_BSD + self._take(Value(before, SHARED), ADD_N)
