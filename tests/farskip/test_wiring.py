"""Wirings: what every sub-block reads, the two rules, and the forms in which a wiring travels."""

import itertools
import re
from typing import Any

import pytest
import yaml

from farskip.wiring import (
    ATTENTION,
    DENSE,
    MLP,
    MOE,
    MOE_SHARED,
    NAMED,
    ROUTED,
    SHARED,
    LayerBlocks,
    LayerWiring,
    Source,
    Wiring,
    select_layers,
)

NAMES = ("ordinary", "farskip", "attn_only", "mlp_only", "ladder", "parallel")
MIXES = list(itertools.product((DENSE, MOE, MOE_SHARED), repeat=3))

# Written down from the papers' equations, not from the code: what attention leaves out of the layer before it, and
# whether the MLP side leaves out this layer's attention.
LEAVES_OUT: dict[str, tuple[set[str], bool]] = {
    "ordinary": (set(), False),
    "farskip": ({ROUTED}, True),
    "attn_only": ({ROUTED}, False),
    "mlp_only": (set(), True),
    "parallel": (set(), True),
    "ladder": ({MLP, SHARED, ROUTED}, True),
}


def mix_id(mix: tuple[LayerBlocks, ...]) -> str:
    return "-".join({DENSE: "dense", MOE: "moe", MOE_SHARED: "shared"}[blocks] for blocks in mix)


def custom(*rows: dict[str, tuple[str, ...]]) -> Wiring:
    return Wiring(tuple(LayerWiring(**row) for row in rows))


@pytest.mark.parametrize("mix", MIXES, ids=mix_id)
@pytest.mark.parametrize("name", NAMES)
def test_every_sub_block_reads_what_its_wiring_says(name: str, mix: tuple[LayerBlocks, ...]) -> None:
    attention_leaves_out, mlp_leaves_out_attention = LEAVES_OUT[name]
    resolved = Wiring.named(name, 3).resolve(mix)
    for layer, inputs in enumerate(resolved):
        before = mix[layer - 1] if layer else ()
        left_out = tuple(block for block in before if block in attention_leaves_out)
        assert inputs.blocks == mix[layer]
        assert inputs.left_out == left_out
        assert inputs.source(ATTENTION) is (Source.PARTIAL if left_out else Source.FULL)
        for block in mix[layer][1:]:
            assert inputs.source(block) is (Source.FULL if mlp_leaves_out_attention else Source.AFTER_ATTENTION)


@pytest.mark.parametrize("name", NAMES)
def test_only_the_selected_layers_are_rewired(name: str) -> None:
    mix = [MOE_SHARED] * 4
    everywhere, nowhere = Wiring.named(name, 4).resolve(mix), Wiring.named("ordinary", 4).resolve(mix)
    hybrid = Wiring.named(name, 4, [1, 2]).resolve(mix)
    assert hybrid == (nowhere[0], everywhere[1], everywhere[2], nowhere[3])


def test_the_first_rewired_layer_leaves_out_the_ordinary_layer_before_it() -> None:
    resolved = Wiring.named("farskip", 3, "last:1").resolve([MOE, MOE, MOE])
    assert [inputs.left_out for inputs in resolved] == [(), (), (ROUTED,)]


def test_the_first_layer_has_nothing_to_leave_out() -> None:
    for name in NAMES:
        assert Wiring.named(name, 1).resolve([MOE_SHARED])[0].left_out == ()


@pytest.mark.parametrize("mix", MIXES, ids=mix_id)
def test_farskip_is_ladder_exactly_where_the_layer_before_has_nothing_but_routed_experts(
    mix: tuple[LayerBlocks, ...],
) -> None:
    farskip, ladder = (Wiring.named(name, 3).resolve(mix) for name in ("farskip", "ladder"))
    assert (farskip == ladder) is all(blocks == MOE for blocks in mix[:-1])


def test_farskip_is_parallel_on_dense_models() -> None:
    assert Wiring.named("farskip", 3).resolve([DENSE] * 3) == Wiring.named("parallel", 3).resolve([DENSE] * 3)
    assert Wiring.named("farskip", 3).resolve([MOE] * 3) != Wiring.named("parallel", 3).resolve([MOE] * 3)


def test_parallel_is_mlp_only_under_its_usual_name() -> None:
    assert Wiring.named("parallel", 3) == Wiring.named("mlp_only", 3)
    wiring = Wiring.named("parallel", 3)
    assert wiring.name == "mlp_only"
    record = wiring.to_dict()
    assert record["name"] == "mlp_only"  # as checkpoints have it since the first one
    assert Wiring.from_dict(record) == Wiring.from_dict({**record, "name": "parallel"}) == wiring


# -- the two rules --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mix", "row", "reason"),
    [
        ((MOE_SHARED, MOE), {"attention": ("previous.shared",)}, "layer 1 attention .*reads the newer ['routed']"),
        ((MOE_SHARED, MOE), {"attention": ("previous.attention",)}, "reads the newer ['shared', 'routed']"),
        ((DENSE, DENSE), {"mlp": ("previous.mlp",)}, "layer 1 mlp .*reads this layer's newer attention"),
        ((MOE, MOE), {"routed": ("previous.routed",)}, "layer 1 routed .*reads this layer's newer attention"),
    ],
)
def test_a_left_out_set_that_is_no_suffix_is_refused_with_the_reason(
    mix: tuple[LayerBlocks, ...], row: dict[str, tuple[str, ...]], reason: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(reason).replace(r"\.\*", ".*")):
        custom({}, row).resolve(mix)


def test_a_third_stream_is_refused_with_the_reason() -> None:
    row = {"attention": ("previous.routed",), "routed": ("previous.shared", "previous.routed", "attention")}
    with pytest.raises(ValueError, match=r"layer 1 needs 3 streams across its boundary .*at most two may cross"):
        custom({}, row).resolve((MOE_SHARED, MOE))


def test_two_sub_blocks_may_share_the_partial_stream() -> None:
    row = {"attention": ("previous.routed",), "routed": ("previous.routed", "attention")}
    inputs = custom({}, row).resolve((MOE_SHARED, MOE_SHARED))[1]
    assert inputs.sources == (Source.PARTIAL, Source.AFTER_ATTENTION, Source.PARTIAL)


def test_shared_and_routed_may_read_different_streams() -> None:
    inputs = custom({"routed": ("attention",)}).resolve((MOE_SHARED,))[0]  # ScMoE Pos-1
    assert inputs.sources == (Source.FULL, Source.AFTER_ATTENTION, Source.FULL)


def test_attention_cannot_leave_out_itself() -> None:
    with pytest.raises(ValueError, match="layer 0 attention cannot leave out its own output"):
        custom({"attention": ("attention",)}).resolve([DENSE])


def test_names_of_outputs_that_the_layer_before_lacks_mean_nothing() -> None:
    assert Wiring.named("ladder", 2).resolve([DENSE, DENSE])[1].left_out == (MLP,)


# -- forms of `layers` ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("all", (0, 1, 2, 3, 4)),
        ("last:2", (3, 4)),
        ("first:3", (0, 1, 2)),
        ("first:0", ()),
        ("last:5", (0, 1, 2, 3, 4)),
        ("2:4", (2, 3)),
        ("2:2", ()),
        ("3", (3,)),
        ("0,4, 2", (0, 2, 4)),
        ("[3, 0,4,3]", (0, 3, 4)),
        ([4, 0, 4], (0, 4)),
        ((1,), (1,)),
        (range(1, 3), (1, 2)),
        ([], ()),
    ],
    ids=str,
)
def test_layers_forms(layers: Any, expected: tuple[int, ...]) -> None:
    assert select_layers(layers, 5) == expected


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ("last:6", "the model has only 5 layers"),
        ("2:6", "0 <= START <= STOP <= 5"),
        ("3:2", "0 <= START <= STOP <= 5"),
        ("-1:2", "is not understood"),
        ("some", "is not understood"),
        ("", "is not understood"),
        ("[]", "names no layer; name one or more"),
        ("[ ]", "names no layer; name one or more"),
        ("[1,x]", "is not understood"),
        ("0,,2", "is not understood"),
        ("[0,2", "is not understood"),
        ("0,7", r"layer 7 is outside 0\.\.4"),
        ([5], r"layer 5 is outside 0\.\.4"),
        ([-1], r"layer -1 is outside 0\.\.4"),
        ([1.5], r"1\.5 is not a layer number"),
        ([True], "True is not a layer number"),
        (["1"], "'1' is not a layer number"),
        (3, "is not understood"),
    ],
    ids=str,
)
def test_layers_that_make_no_sense_are_refused(layers: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        select_layers(layers, 5)


# -- as text and as data ----------------------------------------------------------------------------------------------

ROUND_TRIPS = [
    *(Wiring.named(name, 4, layers) for name in NAMES for layers in ("all", "last:2", [0, 2])),
    custom({}, {"routed": ("attention",)}, {"attention": ("previous.routed",)}),
    Wiring((NAMED["farskip"], NAMED["ladder"], NAMED["ordinary"])),
]


@pytest.mark.parametrize("wiring", ROUND_TRIPS, ids=str)
def test_a_wiring_survives_a_dict_and_yaml(wiring: Wiring) -> None:
    assert Wiring.from_dict(wiring.to_dict()) == wiring
    assert Wiring.from_dict(yaml.safe_load(yaml.safe_dump(wiring.to_dict()))) == wiring
    assert hash(Wiring.from_dict(wiring.to_dict())) == hash(wiring)


@pytest.mark.parametrize(
    ("wiring", "text"),
    [
        (Wiring.named("farskip", 4), "farskip on 4 of 4 layers (0-3)"),
        (Wiring.named("ladder", 6, [0, 1, 4]), "ladder on 3 of 6 layers (0-1, 4)"),
        (Wiring.named("farskip", 4, "first:0"), "ordinary (4 layers)"),
        (Wiring.named("parallel", 4), "parallel on 4 of 4 layers (0-3)"),
        (Wiring.named("mlp_only", 4, "last:2"), "parallel on 2 of 4 layers (2-3)"),
        (custom({"routed": ("attention",)}, {}), "custom on 1 of 2 layers (0)"),
    ],
)
def test_a_wiring_prints_in_one_line(wiring: Wiring, text: str) -> None:
    assert str(wiring) == text


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({}, "do not describe a wiring"),
        ({"name": "farskip"}, "expected .*layers"),
        ({"name": "farskip", "layers": [0], "num_layers": 2, "extra": 1}, "do not describe a wiring"),
        ({"name": "custom", "layers": [0], "num_layers": 2}, "expected .*table"),
        ({"name": "custom", "table": [{"atention": []}]}, r"layer 0 has unknown sub-blocks \['atention'\]"),
        ({"name": "custom", "table": [{"mlp": ["previous.router"]}]}, "mlp leaves out 'previous.router'"),
        ({"name": "farskp", "layers": [0], "num_layers": 2}, "did you mean 'farskip'"),
        ({"name": "farskip", "layers": [7], "num_layers": 2}, "layer 7 is outside"),
    ],
)
def test_a_damaged_record_is_refused(data: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Wiring.from_dict(data)


def test_an_unknown_name_gets_the_near_miss() -> None:
    with pytest.raises(ValueError, match=r"wiring 'laddder' is unknown; did you mean 'ladder'\?; use one of ordinary"):
        Wiring.named("laddder", 4)


def test_a_wiring_of_another_depth_is_refused() -> None:
    with pytest.raises(ValueError, match="wiring has 4 layers, the model 3: build it with 3"):
        Wiring.named("farskip", 4).resolve([DENSE] * 3)


def test_unknown_sub_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="layer 0 has sub-blocks"):
        Wiring.named("farskip", 1).resolve([(MLP, ATTENTION)])
