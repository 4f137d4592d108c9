"""Wiring: which of the newest outputs the input of each sub-block leaves out. Data only; no torch in this file.

A transformer layer is a few sub-blocks in program order: attention, then either a dense MLP or a shared and a routed
expert branch. Every output is always added to the residual stream, in program order. A wiring never changes that sum;
it only says what a sub-block does not wait for:

    name        attention leaves out                    mlp, shared and routed experts leave out
    ordinary    nothing                                 nothing
    farskip     the previous layer's routed output      this layer's attention
    attn_only   the previous layer's routed output      nothing
    mlp_only    nothing                                 this layer's attention       (usual name: parallel)
    ladder      the previous layer's whole MLP output   this layer's attention

What is left out is in flight: its collective hides behind the sub-block that did not wait for it.

Any other table is a wiring too, under two rules, both checked by `Wiring.resolve`:

1. each left-out set is a suffix of program order (leaving out an older output while reading a newer one would need the
   newer one first), and
2. at most two streams cross a layer boundary: the full one and one that leaves something out.

Legend: x is the full stream at a layer's entry, n the stream that leaves something out there, y = x + attention.

Source: FarSkip-Collective (arXiv 2511.11505) section 3; Ladder-residual (arXiv 2501.06589) section 3.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, Self

ATTENTION, MLP, SHARED, ROUTED = "attention", "mlp", "shared", "routed"

LayerBlocks = tuple[str, ...]
"""The sub-blocks of one layer in program order: one of `DENSE`, `MOE`, `MOE_SHARED`."""

DENSE: LayerBlocks = (ATTENTION, MLP)
MOE: LayerBlocks = (ATTENTION, ROUTED)
MOE_SHARED: LayerBlocks = (ATTENTION, SHARED, ROUTED)

_PREVIOUS = "previous."
_OUTPUTS = (ATTENTION, *(f"{_PREVIOUS}{block}" for block in (ATTENTION, MLP, SHARED, ROUTED)))


class Source(StrEnum):
    """What a sub-block's norm reads."""

    FULL = "x"
    PARTIAL = "n"
    AFTER_ATTENTION = "y"


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerWiring:
    """What the inputs of one layer's sub-blocks leave out.

    Each field is a tuple of outputs: ``"attention"`` is this layer's, ``"previous.routed"`` and so on are those of the
    layer before. A name that the model does not have there (``previous.shared`` after a dense layer) means nothing.
    """

    attention: tuple[str, ...] = ()
    mlp: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    routed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            for output in getattr(self, field.name):
                if output not in _OUTPUTS:
                    raise ValueError(
                        f"wiring: {field.name} leaves out {output!r}, which is not an output; "
                        f"use one of {', '.join(_OUTPUTS)}"
                    )

    def left_out(self, block: str) -> tuple[str, ...]:
        """The outputs that the input of `block` leaves out."""
        return getattr(self, block)


_WHOLE_PREVIOUS_MLP = ("previous.mlp", "previous.shared", "previous.routed")


def _layer_wiring(attention: tuple[str, ...], mlp: tuple[str, ...]) -> LayerWiring:
    return LayerWiring(attention=attention, mlp=mlp, shared=mlp, routed=mlp)


NAMED: Mapping[str, LayerWiring] = {
    "ordinary": _layer_wiring((), ()),
    "farskip": _layer_wiring(("previous.routed",), (ATTENTION,)),
    "attn_only": _layer_wiring(("previous.routed",), ()),
    "mlp_only": _layer_wiring((), (ATTENTION,)),
    "ladder": _layer_wiring(_WHOLE_PREVIOUS_MLP, (ATTENTION,)),
}
_ALIASES: Mapping[str, str] = {"parallel": "mlp_only"}


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerInputs:
    """One layer of a wiring, resolved against the sub-blocks the model has.

    Attributes:
        blocks: the layer's sub-blocks in program order.
        left_out: outputs of the previous layer that the partial stream n leaves out here; empty where n is x.
        sources: what each sub-block reads, in the order of `blocks`.
    """

    blocks: LayerBlocks
    left_out: tuple[str, ...]
    sources: tuple[Source, ...]

    def source(self, block: str) -> Source:
        """What `block` reads."""
        return self.sources[self.blocks.index(block)]


@dataclass(frozen=True, slots=True)
class Wiring:
    """The wiring of a whole model: one `LayerWiring` per layer. Prints, compares, and travels as a plain dict."""

    layers: tuple[LayerWiring, ...]

    @classmethod
    def named(cls, name: str, num_layers: int, layers: "str | Sequence[int]" = "all") -> Self:
        """The wiring called `name` on the selected layers, ordinary on the rest.

        Args:
            name: ``ordinary``, ``farskip``, ``attn_only``, ``mlp_only``, ``ladder`` or ``parallel``.
            num_layers: number of decoder layers of the model.
            layers: ``"all"``, ``"last:3"``, ``"first:3"``, ``"2:5"`` (half-open), ``"3"``, ``"0,4,5"``,
                ``"[0,4,5]"`` or a list of layer numbers.

        Raises:
            ValueError: unknown name, or a layer outside the model.
        """
        canonical = _ALIASES.get(name, name)
        if canonical not in NAMED:
            near = difflib.get_close_matches(name, [*NAMED, *_ALIASES], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"wiring {name!r} is unknown{hint}; use one of {', '.join([*NAMED, *_ALIASES])}")
        chosen = set(select_layers(layers, num_layers))
        return cls(tuple(NAMED[canonical if layer in chosen else "ordinary"] for layer in range(num_layers)))

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def name(self) -> str:
        """The name that all rewired layers share, ``"ordinary"``, or ``"custom"``; as in records, so ``"mlp_only"``."""
        rewired = {layer for layer in self.layers if layer != NAMED["ordinary"]}
        if not rewired:
            return "ordinary"
        if len(rewired) == 1:
            only = rewired.pop()
            for name, layer in NAMED.items():
                if layer == only:
                    return name
        return "custom"

    @property
    def rewired_layers(self) -> tuple[int, ...]:
        """The layers that are not ordinary."""
        return tuple(index for index, layer in enumerate(self.layers) if layer != NAMED["ordinary"])

    def resolve(self, blocks: Sequence[LayerBlocks]) -> tuple[LayerInputs, ...]:
        """Check the wiring against a model and say what every sub-block reads.

        Args:
            blocks: the sub-blocks of each layer of the model.

        Raises:
            ValueError: wrong number of layers, or a table that breaks one of the two rules of this module.
        """
        if len(blocks) != self.num_layers:
            raise ValueError(
                f"wiring has {self.num_layers} layers, the model {len(blocks)}: build it with {len(blocks)}"
            )
        resolved = []
        previous: LayerBlocks = ()
        for index, (layer, here) in enumerate(zip(self.layers, blocks, strict=True)):
            resolved.append(_resolve_layer(index, layer, here, previous))
            previous = here
        return tuple(resolved)

    def to_dict(self) -> dict[str, Any]:
        """A plain dict for YAML and for a checkpoint's config: name and layers, or the whole table."""
        if self.name != "custom":
            return {"name": self.name, "layers": list(self.rewired_layers), "num_layers": self.num_layers}
        table = [
            {field.name: list(getattr(layer, field.name)) for field in fields(layer) if getattr(layer, field.name)}
            for layer in self.layers
        ]
        return {"name": "custom", "table": table}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            ValueError: a key is missing or unknown.
        """
        keys = {"name", "table"} if data.get("name") == "custom" else {"name", "layers", "num_layers"}
        if set(data) != keys:
            raise ValueError(f"wiring: keys {sorted(data)} do not describe a wiring; expected {sorted(keys)}")
        if data["name"] != "custom":
            return cls.named(data["name"], data["num_layers"], list(data["layers"]))
        known = {field.name for field in fields(LayerWiring)}
        for index, row in enumerate(data["table"]):
            if unknown := set(row) - known:
                raise ValueError(f"wiring: layer {index} has unknown sub-blocks {sorted(unknown)}; use {sorted(known)}")
        return cls(tuple(LayerWiring(**{key: tuple(value) for key, value in row.items()}) for row in data["table"]))

    def __str__(self) -> str:
        rewired = self.rewired_layers
        if not rewired:
            return f"ordinary ({self.num_layers} layers)"
        usual = {name: alias for alias, name in _ALIASES.items()}
        return f"{usual.get(self.name, self.name)} on {len(rewired)} of {self.num_layers} layers ({_ranges(rewired)})"


def select_layers(layers: "str | Iterable[int]", num_layers: int) -> tuple[int, ...]:
    """Layer numbers, ascending. The one reader of layers: settings and options of all commands come here as text.

    Args:
        layers: ``"all"``, ``"last:3"``, ``"first:3"``, ``"2:5"`` (half-open), ``"3"``, ``"0,4,5"``, ``"[0,4,5]"``, or a
            list of numbers. A list may be empty, as in the record of an ordinary model; text of an empty list may not.
        num_layers: number of decoder layers of the model.

    Raises:
        ValueError: not one of these forms, or a layer outside 0..num_layers-1.
    """
    if isinstance(layers, str):
        chosen = _select_by_text(layers, num_layers)
    else:
        if not isinstance(layers, Iterable):
            raise ValueError(_not_understood(layers))
        chosen = list(layers)
        for layer in chosen:
            if isinstance(layer, bool) or not isinstance(layer, int):
                raise ValueError(f"layers {layers!r}: {layer!r} is not a layer number; use integers")
    for layer in chosen:
        if not 0 <= layer < num_layers:
            raise ValueError(f"layers {layers!r}: layer {layer} is outside 0..{num_layers - 1} of this model")
    return tuple(sorted(set(chosen)))


def _select_by_text(layers: str, num_layers: int) -> list[int]:
    if layers == "all":
        return list(range(num_layers))
    left, separator, right = layers.partition(":")
    if separator and left in ("first", "last") and right.isdecimal():
        count = int(right)
        if count > num_layers:
            raise ValueError(f"layers {layers!r}: the model has only {num_layers} layers")
        return list(range(count)) if left == "first" else list(range(num_layers - count, num_layers))
    if separator and left.isdecimal() and right.isdecimal():
        if int(right) > num_layers or int(left) > int(right):
            raise ValueError(f"layers {layers!r}: use START:STOP with 0 <= START <= STOP <= {num_layers}")
        return list(range(int(left), int(right)))
    is_bracketed = layers.startswith("[") and layers.endswith("]")
    inside = layers[1:-1].strip() if is_bracketed else layers
    if is_bracketed and not inside:
        raise ValueError(f"layers {layers!r} names no layer; name one or more, as [0,4,5], or all")
    numbers = [word.strip() for word in inside.split(",")]
    if all(word.isdecimal() for word in numbers):
        return [int(word) for word in numbers]
    raise ValueError(_not_understood(layers))


def _not_understood(layers: object) -> str:
    return f"layers {layers!r} is not understood; use all, last:3, first:3, 2:5, 3 or a list such as [0,4,5]"


def _resolve_layer(index: int, layer: LayerWiring, here: LayerBlocks, previous: LayerBlocks) -> LayerInputs:
    """Resolve one layer; `previous` is empty for the first one, which has nothing to leave out."""
    if here not in (DENSE, MOE, MOE_SHARED):
        raise ValueError(f"layer {index} has sub-blocks {here}; known are {DENSE}, {MOE}, {MOE_SHARED}")
    from_previous: dict[str, tuple[str, ...]] = {}
    leaves_attention: dict[str, bool] = {}
    for block in here:
        names = layer.left_out(block)
        older = tuple(name for name in previous if f"{_PREVIOUS}{name}" in names)
        if older != previous[len(previous) - len(older) :]:
            newer = [name for name in previous if name not in older and previous.index(name) > previous.index(older[0])]
            raise ValueError(
                f"wiring: layer {index} {block} leaves out {list(older)} of layer {index - 1} but reads the newer "
                f"{newer}; leave out a suffix of {list(previous)}"
            )
        if block == ATTENTION and ATTENTION in names:
            raise ValueError(f"wiring: layer {index} attention cannot leave out its own output; remove 'attention'")
        if block != ATTENTION and older and ATTENTION not in names:
            raise ValueError(
                f"wiring: layer {index} {block} leaves out {list(older)} of layer {index - 1} but reads this layer's "
                "newer attention; leave out 'attention' too"
            )
        from_previous[block], leaves_attention[block] = older, ATTENTION in names
    streams = {older for older in from_previous.values() if older}
    if len(streams) > 1:
        raise ValueError(
            f"wiring: layer {index} needs {len(streams) + 1} streams across its boundary ({sorted(streams)}); at most "
            "two may cross: let its sub-blocks leave out the same outputs of the previous layer"
        )

    def source(block: str) -> Source:
        if from_previous[block]:
            return Source.PARTIAL
        return Source.FULL if block == ATTENTION or leaves_attention[block] else Source.AFTER_ATTENTION

    return LayerInputs(
        blocks=here,
        left_out=next(iter(streams), ()),
        sources=tuple(source(block) for block in here),
    )


def _ranges(numbers: Sequence[int]) -> str:
    """Sorted integers as ``0-3, 5``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
