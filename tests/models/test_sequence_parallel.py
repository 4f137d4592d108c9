"""Sequence parallelism on real ranks: the proofs of test_tensor_parallel.py, with the stream in shares of tokens.

What is asked of both is asked there; here is what a stream in shares may break: batches that no share divides, ranks
without a token, chunks, the ends of the model.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch.distributed as dist

from farskip.models.parallelize import parallelize, set_sequence_parallel
from farskip.models.recompute import recompute_stages
from farskip.models.testing_families import CASES, build
from farskip.models.testing_models import run_backward, token_ids
from farskip.parallel.mesh import build_mesh
from farskip.testing import assert_equal_bits, load_beside, pairwise

if TYPE_CHECKING:
    from farskip.testing import RankPool

tensor = load_beside(__file__, "test_tensor_parallel")
Setting = tensor.Setting
SHARED_TOKENS: dict[str, Any] = {"sequence_parallel": True, "chunks": 2}


def run_corner(changes: dict[str, Any]) -> None:
    """As `run_grid_point`, for the mutations."""
    tensor.run_grid_point(Setting(sequence_parallel=True, **changes))


DIMENSIONS: dict[str, tuple[Any, ...]] = {
    "wiring": ("ordinary", "farskip", "attn_only", "parallel", "ladder"),
    "case": ("llama", "qwen3_moe", "deepseek_v3"),
    "chunks": (1, 2, 3),
    "size": ((2, 2, 1), (2, 2, 2), (4, 2, 2)),
    "batch": ((2, 7, "idle_rank"), (3, 5, "free")),
    "recompute": (0, 2),
    "layers": ("all", "last:2"),
}
"""`size`: world, tp, ep; `batch`: sequences, their length and how they are routed: a choice of experts that is forced
repeats after each share, so that shares have to be equal."""


def pairwise_settings() -> list[Any]:
    """Settings that together hold every pair of values of two dimensions."""
    found = []
    for point in pairwise(DIMENSIONS):
        (world, tp, ep), (sequences, length, routing) = point.pop("size"), point.pop("batch")
        point |= {"world": world, "tp": tp, "ep": ep, "sequences": sequences, "length": length, "routing": routing}
        found.append(Setting(sequence_parallel=True, **point))
    return found


FOUR: dict[str, Any] = {"world": 4, "tp": 4, "sequences": 1, "changes": {"num_key_value_heads": 4}}
CORNERS = [
    Setting(case="llama-biased-tied", chunks=2),
    Setting(case="qwen3_moe", ep=4, chunks=2, length=3, **FOUR),  # one rank has no token
    Setting(case="qwen3_moe", length=3, **FOUR),
    Setting(case="llama", chunks=3, length=5, **FOUR),  # chunks without a token on some ranks, and on all
    Setting(case="qwen2_moe", wiring="farskip", ep=2, chunks=2),
    Setting(case="llama4_text", ep=2),
    Setting(case="gpt_oss", wiring="farskip"),
    Setting(case="instella_moe", wiring="farskip", ep=2),
    Setting(case="olmoe", ep=2, chunks=2),
    Setting(case="deepseek_v3", wiring="farskip", ep=2, chunks=2, kernels="reference"),
    Setting(case="qwen3_moe", wiring="ladder", ep=4, chunks=2, length=3, kernels="reference", **FOUR),
]
GRID = [*pairwise_settings(), *(replace(corner, sequence_parallel=True) for corner in CORNERS)]


@pytest.mark.parametrize("setting", GRID, ids=str)
def test_serial_equals_overlapped_and_k_ranks_equal_one(setting: Any, rank_pool: "RankPool") -> None:
    rank_pool.run(tensor.run_grid_point, setting.world, setting)


@pytest.mark.parametrize(("case", "wiring", "ep"), [("llama", "ladder", 1), ("deepseek_v3", "farskip", 2)])
def test_generation_gives_the_tokens_of_one_rank(case: str, wiring: str, ep: int, rank_pool: "RankPool") -> None:
    """With a cache a step has one token of each sequence; with one sequence, one of two ranks has none."""
    settings = [
        Setting(case=case, wiring=wiring, ep=ep, sequences=each, length=4, sequence_parallel=True) for each in (1, 3)
    ]
    rank_pool.run(tensor.generation_agrees, 2, settings)


@pytest.mark.parametrize(("case", "ep"), [("llama", 1), ("deepseek_v3", 2)])
def test_selective_recomputation_changes_no_bit(case: str, ep: int, rank_pool: "RankPool") -> None:
    rank_pool.run(tensor.selective_recomputation_changes_no_bit, 2, case, ep, **SHARED_TOKENS)


@pytest.mark.parametrize(("kind", "case", "ep"), [("bf16", "qwen3_moe", 2), ("autocast", "llama", 1)])
def test_low_precision(kind: str, case: str, ep: int, rank_pool: "RankPool") -> None:
    rank_pool.run(tensor.low_precision, 2, kind, case, ep, **SHARED_TOKENS)


@pytest.mark.parametrize("frozen", ["embed_tokens", r"embed_tokens|layers\.[01]", "self_attn|layernorm"])
def test_frozen_parts_keep_nobody_waiting(frozen: str, rank_pool: "RankPool") -> None:
    rank_pool.run(tensor.frozen_parts, 2, frozen, "qwen3", **SHARED_TOKENS)


def test_the_schedule_can_be_chosen_by_measured_times(rank_pool: "RankPool") -> None:
    seen = rank_pool.run(tensor.schedule_by_measured_times, 2, "deepseek_v3", "farskip", 2, SHARED_TOKENS)
    assert seen[0] == seen[1]
    assert {"gather_attention", "shared_norm", "scatter_mlp", "dispatch"} <= set(seen[0])
    assert not any(name.startswith("reduce_") for name in seen[0])


# -- switched afterwards ----------------------------------------------------------------------------------------------


def switched_on_and_off() -> str:
    setting, mesh, ids = Setting(case="deepseek_v3", wiring="farskip", ep=2), build_mesh(2, tp=2), token_ids(2, 5)
    apart, together = (
        run_backward(parallelize(tensor.base_model(setting), mesh, **more), ids, use_cache=False)
        for more in ({"chunks": 2}, SHARED_TOKENS)
    )
    model = parallelize(tensor.base_model(setting), mesh, chunks=2)
    recompute_stages(model)
    set_sequence_parallel(model, chunks=2)
    changed = run_backward(model, ids, use_cache=False)
    set_sequence_parallel(model, False)
    back = run_backward(model, ids, use_cache=False)
    for found, expected in ((changed, together), (back, apart)):
        assert_equal_bits({"logits": found[0], **found[1]}, {"logits": expected[0], **expected[1]})
    with pytest.raises(ValueError) as caught:
        set_sequence_parallel(model, dist.get_rank() == 0)
    return str(caught.value)


def test_it_can_be_switched_on_and_off(rank_pool: "RankPool") -> None:
    said = rank_pool.run(switched_on_and_off, 2)
    assert said == ["parallelize: rank 1 has sequence_parallel False, rank 0 True; give all ranks the same"] * 2


def test_a_model_that_is_not_cut_has_nothing_to_switch() -> None:
    for model in (tensor.base_model(Setting()), build(CASES["llama"])):
        with pytest.raises(
            ValueError, match="the model is not cut; call parallelize with a mesh of tp=2 or more first"
        ):
            set_sequence_parallel(model)
