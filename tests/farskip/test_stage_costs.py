"""Times from shapes: sizes counted by hand, and what parallelism does to them."""

from dataclasses import replace

import pytest

from farskip.stage_costs import EP, TP, Layout, LinkRate, ModelShape, Rates, stage_costs, times_of
from farskip.wiring import MOE_SHARED

SHAPE = ModelShape(
    blocks=(MOE_SHARED,),
    hidden=8,
    num_experts=4,
    top_k=2,
    attention_in=100,
    attention_whole=10,
    attention_out=60,
    attention_width=16,
    mlp=300,
    shared=200,
    expert=50,
)
LAYOUT = Layout(tokens=64, sequence=32, number_bytes=2)


def test_operations_and_bytes_by_hand() -> None:
    costs = stage_costs(SHAPE, replace(LAYOUT, ep=4))
    assert {stage: costs[stage].flops for stage in ("attention_in", "mlp", "shared", "experts", "route")} == {
        "attention_in": 2 * 64 * 110,
        "mlp": 2 * 64 * 300,
        "shared": 2 * 64 * 200,
        "experts": 2 * 64 * 2 * 50,  # balanced: as many rows come as go
        "route": 2 * 64 * 8 * 4,
    }
    # keys and values of 16 numbers over all heads, half of 32 positions on average, 2 operations each
    assert costs["attention_core"].flops == 2 * 64 * 60 + 64 * 16 * 32
    assert costs["shared"].memory_bytes == 2 * (200 + 2 * 64 * 8)
    assert costs["experts"].memory_bytes == 2 * (50 + 2 * 128 * 8)  # one expert of four lies here


def test_bytes_of_collectives() -> None:
    costs = stage_costs(SHAPE, replace(LAYOUT, ep=4, tp=2))
    rows = 64 / 2 * 2  # each of two ranks routes half of the tokens, to two experts
    assert costs["dispatch"].link_bytes == costs["combine"].link_bytes == 2 * rows * 8 * 3 / 4
    assert costs["reduce_mlp"].link_bytes == 2 * 2 * 64 * 8 * 1 / 2
    assert costs["gather_mlp"].link_bytes == costs["scatter_mlp"].link_bytes == costs["reduce_mlp"].link_bytes / 2
    assert (costs["dispatch"].axis, costs["reduce_mlp"].axis) == (EP, TP)
    alone = stage_costs(SHAPE, LAYOUT)
    assert alone["dispatch"].link_bytes == alone["reduce_mlp"].link_bytes == 0


def test_tensor_parallelism_cuts_compute_but_for_what_stays_whole() -> None:
    whole, cut = stage_costs(SHAPE, LAYOUT), stage_costs(SHAPE, replace(LAYOUT, tp=2))
    for stage in ("attention_core", "mlp", "shared", "route", "experts", "merge"):
        assert cut[stage].flops == whole[stage].flops / 2
    assert cut["attention_in"].flops == 2 * 64 * (50 + 10)


def test_the_slower_of_two_rates_and_the_latency_of_every_chunk() -> None:
    layout = replace(LAYOUT, ep=4, chunks=2)
    costs = stage_costs(SHAPE, layout)
    link = {EP: LinkRate(gb_s=1e-3, latency_us=500.0)}
    rich_memory = times_of(costs, Rates(tflops=1e-6, memory_gb_s=1e9, links=link)).forward
    assert rich_memory["mlp"] == pytest.approx(costs["mlp"].flops / 1e6 * 1e3)
    poor_memory = times_of(costs, Rates(tflops=1e9, memory_gb_s=1e-6, links=link)).forward
    assert poor_memory["mlp"] == pytest.approx(costs["mlp"].memory_bytes / 1e3 * 1e3)
    assert rich_memory["dispatch"] == pytest.approx(2 * 0.5 + costs["dispatch"].link_bytes / 1e6 * 1e3)


def test_which_collectives_are_cut_into_chunks() -> None:
    costs = stage_costs(SHAPE, replace(LAYOUT, ep=4, tp=2, chunks=3))
    launches = {stage: cost.launches for stage, cost in costs.items() if cost.axis}
    cut = {"dispatch", "combine", *(f"{kind}_{block}" for kind in ("gather", "scatter") for block in ("mlp", "shared"))}
    assert launches == {stage: 3 if stage in cut else 1 for stage in launches}


def test_nothing_is_said_without_a_rate_or_a_size() -> None:
    assert times_of(stage_costs(SHAPE, LAYOUT), Rates(links={})).forward == {}
    only_link = times_of(stage_costs(SHAPE, LAYOUT), Rates(links={TP: LinkRate(gb_s=1.0)})).forward
    assert set(only_link) == {s for s in only_link if s.startswith(("reduce_", "gather_", "scatter_"))}
    unknown = ModelShape(blocks=(MOE_SHARED,))
    assert stage_costs(unknown, LAYOUT) == {}
