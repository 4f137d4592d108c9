"""The residual stream: the bracketing, which outputs each stream holds, and the order in which gradients are added."""

import itertools
from collections.abc import Sequence

import pytest
import torch

from farskip.residual import GATE, MLP_NORM, ROWS, Residual, stream_uses
from farskip.wiring import (
    ATTENTION,
    DENSE,
    MLP,
    MOE,
    MOE_SHARED,
    ROUTED,
    SHARED,
    LayerBlocks,
    LayerWiring,
    Source,
    Wiring,
)

WHOLE_LAYER = LayerWiring(attention=("previous.attention", "previous.mlp", "previous.shared", "previous.routed"))
MIXES = [(DENSE, DENSE), (MOE, MOE), (MOE_SHARED, MOE_SHARED), (DENSE, MOE_SHARED), (MOE_SHARED, DENSE)]
WIRINGS = [
    *(Wiring.named(name, 2) for name in ("ordinary", "farskip", "attn_only", "parallel", "ladder")),
    Wiring((LayerWiring(), WHOLE_LAYER)),
]

# Float32 numbers whose sum depends on the bracketing.
OUTPUTS = {ATTENTION: 0.25, MLP: 3e7, SHARED: -1e8, ROUTED: 1e8}


def drive(
    wiring: Wiring, mix: Sequence[LayerBlocks], x: torch.Tensor, *, fixed_order: bool = True
) -> dict[str, torch.Tensor]:
    """Read and put in program order, as a serial executor does; every value that was read, by name."""
    inputs = wiring.resolve(mix)
    residual = Residual(inputs, stream_uses(inputs), 0, len(mix), x, x, fixed_order=fixed_order)
    seen: dict[str, torch.Tensor] = {}
    for layer, blocks in enumerate(mix):
        for block in blocks:
            source = inputs[layer].source(block)
            if block == ATTENTION:
                seen[f"{block}.{layer}"] = residual.read(layer, source, ATTENTION)
            else:
                if not residual.has_normed(layer, source):
                    residual.put_normed(layer, source, residual.read(layer, source, MLP_NORM))
                uses = {MLP: (MLP,), SHARED: (SHARED,), ROUTED: (GATE, ROWS)}[block]
                for use in uses:
                    seen[f"{block}.{layer}"] = residual.read_normed(layer, source, use)
            residual.put(layer, block, torch.full_like(x, OUTPUTS[block] * (layer + 1)))
    seen["x.out"], _ = residual.leave()
    return seen


def full_stream(x: torch.Tensor, mix: Sequence[LayerBlocks], layer: int) -> torch.Tensor:
    """The full stream at the entry of a layer, in the bracketing of DESIGN.md 3, by hand."""
    for index, blocks in enumerate(mix[:layer]):
        out = {block: torch.full_like(x, value * (index + 1)) for block, value in OUTPUTS.items()}
        y = x + out[ATTENTION]
        if MLP in blocks:
            x = y + out[MLP]
        elif SHARED in blocks:
            x = y + (out[ROUTED] + out[SHARED])
        else:
            x = y + out[ROUTED]
    return x


@pytest.mark.parametrize("mix", MIXES, ids=str)
@pytest.mark.parametrize("wiring", WIRINGS, ids=str)
def test_the_full_stream_is_bracketed_as_in_ordinary_models(wiring: Wiring, mix: Sequence[LayerBlocks]) -> None:
    x = torch.ones(3)
    assert torch.equal(drive(wiring, mix, x)["x.out"], full_stream(x, mix, 2))


@pytest.mark.parametrize("mix", MIXES, ids=str)
@pytest.mark.parametrize("wiring", WIRINGS, ids=str)
def test_every_read_holds_all_outputs_but_those_left_out(wiring: Wiring, mix: Sequence[LayerBlocks]) -> None:
    x, inputs = torch.ones(3), wiring.resolve(mix)
    seen = drive(wiring, mix, x)
    for layer, blocks in enumerate(mix):
        full = full_stream(x, mix, layer)
        y = full + OUTPUTS[ATTENTION] * (layer + 1)
        partial = None
        if layer and inputs[layer].left_out:
            entry, before = full_stream(x, mix, layer - 1), mix[layer - 1]
            partial = entry if ATTENTION in inputs[layer].left_out else entry + OUTPUTS[ATTENTION] * layer
            if SHARED in before and SHARED not in inputs[layer].left_out:
                partial = partial + OUTPUTS[SHARED] * layer
        for block in blocks:
            expected = {Source.FULL: full, Source.PARTIAL: partial, Source.AFTER_ATTENTION: y}[
                inputs[layer].source(block)
            ]
            assert expected is not None and torch.equal(seen[f"{block}.{layer}"], expected), f"{block}.{layer}"


def test_uses_are_listed_in_program_order() -> None:
    """Attention before the add of its output before the norm behind it before the next layer's adds."""
    rank = {use: position for position, use in enumerate(("attention", "add_y", "mlp_norm", "add_x", "add_n"))}
    normed = {use: position for position, use in enumerate((ATTENTION, MLP, GATE, ROWS, SHARED))}
    for wiring, mix in itertools.product(WIRINGS, MIXES):
        for value, uses in stream_uses(wiring.resolve(mix)).items():
            order = normed if value.name.startswith("normed_") else rank
            positions = [order[use] for use in uses]
            assert positions == sorted(set(positions)), f"{wiring} {mix} {value}: {uses}"


@pytest.mark.parametrize("mix", MIXES, ids=str)
@pytest.mark.parametrize("wiring", WIRINGS, ids=str)
def test_every_alias_is_used_exactly_once(wiring: Wiring, mix: Sequence[LayerBlocks]) -> None:
    """An alias too many would be a gradient that nobody adds; one too few would have failed already."""
    inputs = wiring.resolve(mix)
    residual = Residual(inputs, stream_uses(inputs), 0, 2, torch.ones(3), torch.ones(3), fixed_order=True)
    for layer, blocks in enumerate(mix):
        for block in blocks:
            source = inputs[layer].source(block)
            if block == ATTENTION:
                residual.read(layer, source, ATTENTION)
            else:
                if not residual.has_normed(layer, source):
                    residual.put_normed(layer, source, residual.read(layer, source, MLP_NORM))
                for use in {MLP: (MLP,), SHARED: (SHARED,), ROUTED: (GATE, ROWS)}[block]:
                    residual.read_normed(layer, source, use)
            residual.put(layer, block, torch.zeros(3))
    residual.leave()
    assert not {value: list(left) for value, left in residual._aliases.items() if left}


def test_gradients_of_a_stream_value_are_added_in_the_order_of_its_uses() -> None:
    """In bits: 1 + 1e8 - 1e8 and its permutations differ in float32."""
    inputs = Wiring.named("parallel", 1).resolve([DENSE])
    parts = {ATTENTION: 1.0, "mlp": 1e8}
    for order in itertools.permutations(parts):
        x = torch.zeros(1, requires_grad=True)
        residual = Residual(inputs, stream_uses(inputs), 0, 1, x * 1.0, x, fixed_order=True)
        reads = {
            ATTENTION: residual.read(0, Source.FULL, ATTENTION),
            "mlp": residual.read(0, Source.FULL, MLP_NORM),
        }
        used = {name: reads[name] * parts[name] for name in order}
        residual.put(0, ATTENTION, torch.zeros(1))
        residual.put(0, MLP, torch.zeros(1))
        out, _ = residual.leave()
        (out * -1e8 + used[order[0]] + used[order[1]]).sum().backward()
        # program order: attention, the add (the stream's way out), the norm of the MLP
        expected = (torch.tensor([parts[ATTENTION]]) + -1e8) + parts["mlp"]
        assert x.grad is not None and torch.equal(x.grad, expected)


@pytest.mark.parametrize("mix", [(MOE_SHARED,)])
@pytest.mark.parametrize("name", ["ordinary", "farskip"])
def test_gradients_of_a_normed_value_are_added_in_the_order_of_its_uses(name: str, mix: Sequence[LayerBlocks]) -> None:
    """Router, rows, shared expert, whatever order they ran in."""
    inputs = Wiring.named(name, 1).resolve(mix)
    source = inputs[0].source(ROUTED)
    parts = {GATE: 1.0, ROWS: 1e8, SHARED: -1e8}
    for order in itertools.permutations(parts):
        x = torch.zeros(1, requires_grad=True)
        residual = Residual(inputs, stream_uses(inputs), 0, 1, x, x, fixed_order=True)
        residual.put_normed(0, source, x * 1.0)
        used = [residual.read_normed(0, source, use) * parts[use] for use in order]
        (used[0] + used[1] + used[2]).sum().backward()
        assert x.grad is not None and torch.equal(x.grad, torch.zeros(1)), order  # (1 + 1e8) - 1e8


def test_gradients_behind_attention_are_added_in_the_order_of_their_uses() -> None:
    """y: the norm of the MLP, then the full stream, then the partial one, in whatever order they were formed."""
    inputs = Wiring.named("attn_only", 2).resolve([MOE, MOE])
    parts = {"mlp_norm": 1.0, "x": 1e8, "n": -1e8}
    for order in itertools.permutations(parts):
        x = torch.zeros(1, requires_grad=True)
        residual = Residual(inputs, stream_uses(inputs), 0, 2, x * 1.0, x, fixed_order=True)
        residual.put(0, ATTENTION, torch.zeros(1))
        residual.put(0, ROUTED, torch.zeros(1))
        read = {
            "mlp_norm": lambda residual=residual: residual.read(0, Source.AFTER_ATTENTION, MLP_NORM),
            "x": lambda residual=residual: residual.read(1, Source.FULL, "add_y"),
            "n": lambda residual=residual: residual.read(1, Source.PARTIAL, ATTENTION),
        }
        used = [read[name]() * parts[name] for name in order]
        (used[0] + used[1] + used[2]).sum().backward()
        assert x.grad is not None and torch.equal(x.grad, torch.zeros(1)), order  # (1 + 1e8) - 1e8


def test_both_streams_leave_a_segment_where_the_next_layer_wants_them() -> None:
    inputs = Wiring.named("farskip", 2).resolve([MOE_SHARED, MOE_SHARED])
    residual = Residual(inputs, stream_uses(inputs), 0, 1, torch.ones(3), torch.ones(3), fixed_order=True)
    for block, output in ((ATTENTION, 2.0), (SHARED, 4.0), (ROUTED, 8.0)):
        residual.put(0, block, torch.full((3,), output))
    full, partial = residual.leave()
    assert torch.equal(full, torch.full((3,), 15.0)) and torch.equal(partial, torch.full((3,), 7.0))


def test_one_stream_leaves_a_segment_where_the_next_layer_is_ordinary() -> None:
    inputs = Wiring.named("farskip", 2, [0]).resolve([MOE_SHARED, MOE_SHARED])
    residual = Residual(inputs, stream_uses(inputs), 0, 1, torch.ones(3), torch.ones(3), fixed_order=True)
    for block in (ATTENTION, SHARED, ROUTED):
        residual.put(0, block, torch.ones(3))
    full, partial = residual.leave()
    assert full is partial
