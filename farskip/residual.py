"""The residual stream: every sum of sub-block outputs, in the one bracketing that this project uses.

    y  = x + a                      a: attention
    n' = y + s                      s: shared expert; n' leaves out the routed output
    x' = y + (r + s)                r: routed experts
    x' = y + m                      m: dense MLP

A sum is formed when it is first read. Each value is handed out as one alias per use, so that in backward the gradients
of its uses are added in program order whatever order the stages ran in (`farskip.async_autograd.fan_out`).

Source: the bracketing is that of ordinary models and of Instella-MoE (arXiv 2609.00791).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from farskip.async_autograd import fan_out
from farskip.chain import MLP_NORM as MLP_NORM
from farskip.wiring import ATTENTION, MLP, ROUTED, SHARED, LayerInputs, Source

GATE, ROWS = "gate", "rows"
_ADD_Y, _ADD_X, _ADD_N, _OUT = "add_y", "add_x", "add_n", "out"
_NORMED = "normed_"


class Value(NamedTuple):
    """A tensor of the stream: x, n, y of a layer, an output of one of its sub-blocks, or a normed input."""

    layer: int
    name: str


Uses = Mapping[Value, tuple[str, ...]]


def stream_uses(inputs: Sequence[LayerInputs]) -> Uses:
    """For every value of the stream, what uses it, in program order: the order in which gradients are added."""
    uses: dict[Value, tuple[str, ...]] = {}
    for layer, here in enumerate(inputs):
        after = inputs[layer + 1] if layer + 1 < len(inputs) else None
        base = _partial_base(here.blocks, after.left_out) if after and after.left_out else None
        mlp_sources = {here.source(block) for block in here.blocks if block != ATTENTION}

        def readers(source: Source, mlp_sources: set[Source] = mlp_sources, here: LayerInputs = here) -> list[str]:
            found = [ATTENTION] if here.source(ATTENTION) is source else []
            return found + ([MLP_NORM] if source in mlp_sources else [])

        full = readers(Source.FULL)
        full.insert(1 if ATTENTION in full else 0, _ADD_Y)
        uses[Value(layer, Source.FULL)] = (*full, *([_ADD_N] if base == "x" else []))
        uses[Value(layer, Source.PARTIAL)] = tuple(readers(Source.PARTIAL))
        uses[Value(layer, Source.AFTER_ATTENTION)] = (
            *readers(Source.AFTER_ATTENTION),
            _ADD_X,
            *([_ADD_N] if base in ("y", "y+s") else []),
        )
        uses[Value(layer, SHARED)] = (_ADD_X, *([_ADD_N] if base == "y+s" else []))
        for block in (ATTENTION, MLP, ROUTED):
            uses[Value(layer, block)] = (_ADD_X,)
        for source in mlp_sources:
            wanted: list[str] = []
            for block, names in ((MLP, (MLP,)), (ROUTED, (GATE, ROWS)), (SHARED, (SHARED,))):
                if block in here.blocks and here.source(block) is source:
                    wanted += names
            uses[Value(layer, _NORMED + source)] = tuple(wanted)
    return uses


def _partial_base(blocks: tuple[str, ...], left_out: tuple[str, ...]) -> str:
    """What n is made of, at the entry of the layer after one with these sub-blocks: x, y or y+s of that layer."""
    if ATTENTION in left_out:
        return "x"
    return "y+s" if SHARED in blocks and SHARED not in left_out else "y"


class Residual:
    """The streams of one run through the layers start..stop-1.

    Args:
        inputs: the resolved wiring of the whole model.
        uses: `stream_uses(inputs)`.
        start: first layer.
        stop: one past the last layer.
        x_BSD: full stream at the entry of `start`.
        n_BSD: the stream that leaves something out there; ignored where nothing is left out.
        fixed_order: whether gradients are added in program order; needed only where stages can move.
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
    ) -> None:
        self._inputs = inputs
        self._uses = uses
        self._stop = stop
        self._fixed_order = fixed_order
        self._aliases: dict[Value, dict[str, torch.Tensor]] = {}
        self._offer(Value(start, Source.FULL), x_BSD)
        if inputs[start].left_out:
            self._offer(Value(start, Source.PARTIAL), n_BSD)

    def read(self, layer: int, source: Source, use: str) -> torch.Tensor:
        """The alias of a stream value for one use; forms the value if this is its first use."""
        return self._take(Value(layer, source), use)

    def put(self, layer: int, block: str, output_BSD: torch.Tensor) -> None:
        """Hand over the output of a sub-block."""
        self._offer(Value(layer, block), output_BSD)

    def put_normed(self, layer: int, source: Source, normed_BSD: torch.Tensor) -> None:
        """Hand over the normed form of a stream value, the common input of router, shared and routed experts."""
        self._offer(Value(layer, _NORMED + source), normed_BSD)

    def has_normed(self, layer: int, source: Source) -> bool:
        """Whether `put_normed` was called."""
        return Value(layer, _NORMED + source) in self._aliases

    def read_normed(self, layer: int, source: Source, use: str) -> torch.Tensor:
        """The alias of a normed value for one use."""
        return self._take(Value(layer, _NORMED + source), use)

    def leave(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Both streams behind the last layer; the same tensor twice where nothing is left out there."""
        full = self._take(Value(self._stop, Source.FULL), _OUT)
        if self._stop == len(self._inputs) or not self._inputs[self._stop].left_out:
            return full, full
        return full, self._take(Value(self._stop, Source.PARTIAL), _OUT)

    def _offer(self, value: Value, tensor: torch.Tensor) -> None:
        uses = (_OUT,) if value.layer == self._stop else self._uses[value]
        if self._fixed_order:
            self._aliases[value] = dict(zip(uses, fan_out(tensor, len(uses)), strict=True))
        else:
            self._aliases[value] = dict.fromkeys(uses, tensor)

    def _take(self, value: Value, use: str) -> torch.Tensor:
        if value not in self._aliases:
            self._offer(value, self._form(value))
        return self._aliases[value].pop(use)

    def _form(self, value: Value) -> torch.Tensor:
        """The bracketing. The only place where sub-block outputs are added to the stream."""
        layer, name = value
        if name == Source.AFTER_ATTENTION:
            return self._take(Value(layer, Source.FULL), _ADD_Y) + self._take(Value(layer, ATTENTION), _ADD_X)
        before = layer - 1
        blocks = self._inputs[before].blocks
        if name == Source.FULL:
            y_BSD = self._take(Value(before, Source.AFTER_ATTENTION), _ADD_X)
            if MLP in blocks:
                return y_BSD + self._take(Value(before, MLP), _ADD_X)
            routed_BSD = self._take(Value(before, ROUTED), _ADD_X)
            if SHARED in blocks:
                return y_BSD + (routed_BSD + self._take(Value(before, SHARED), _ADD_X))
            return y_BSD + routed_BSD
        assert name == Source.PARTIAL, f"{value} was read before it was put"
        base = _partial_base(blocks, self._inputs[layer].left_out)
        if base == "x":
            return self._take(Value(before, Source.FULL), _ADD_N)
        y_BSD = self._take(Value(before, Source.AFTER_ATTENTION), _ADD_N)
        return y_BSD if base == "y" else y_BSD + self._take(Value(before, SHARED), _ADD_N)
