"""Dense sub-blocks that sleep: the parts of all ranks add up, and time passes where it should."""

import time

import pytest
import torch

from farskip.stage import Routing
from farskip.timed_dense_blocks import DenseSleepTimes, SleepingDenseBlocks

NO_SLEEP = DenseSleepTimes(attention=0.0, mlp=0.0)


def same(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query, key, value = tensors
    return query, key, value


@pytest.mark.parametrize("size", [2, 3])
def test_the_parts_of_all_ranks_add_up(size: int) -> None:
    normed = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(0))
    whole = SleepingDenseBlocks(6, NO_SLEEP, rank=0, size=1, seed=3)
    parts = [SleepingDenseBlocks(6, NO_SLEEP, rank=rank, size=size, seed=3) for rank in range(size)]
    for expected, found in (
        (whole.attention(normed, same, {}), [part.attention(normed, same, {}) for part in parts]),
        (whole.mlp(normed), [part.mlp(normed) for part in parts]),
    ):
        assert torch.equal(sum(found[1:], found[0]), expected)
        assert not torch.equal(found[0], expected)


def test_sleeps_take_their_time_in_both_directions() -> None:
    blocks = SleepingDenseBlocks(4, DenseSleepTimes(attention=20.0, mlp=10.0), rank=0, size=1, seed=0)
    x, at_seam = torch.ones(1, 1, 4, requires_grad=True), []

    def seam(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        at_seam.append(time.perf_counter())
        return same(*tensors)

    start = time.perf_counter()
    output = blocks.attention(blocks.attention_norm(x), seam, {})
    after_attention = time.perf_counter()
    output = blocks.mlp(blocks.mlp_norm(output))
    forward = time.perf_counter()
    output.sum().backward()
    backward = time.perf_counter()
    # sleeps may be longer, never shorter
    assert at_seam[0] - start >= 0.010 and after_attention - at_seam[0] >= 0.010
    assert forward - after_attention >= 0.010 and backward - forward >= 0.060


def test_a_part_of_the_tokens_takes_that_part_of_the_time() -> None:
    blocks = SleepingDenseBlocks(4, DenseSleepTimes(attention=0.0, mlp=200.0, tokens=8), rank=0, size=1, seed=0)
    start = time.perf_counter()
    blocks.mlp(torch.ones(1, 2, 4))
    assert 0.050 <= time.perf_counter() - start < 0.200


def test_there_are_no_experts() -> None:
    blocks, x = SleepingDenseBlocks(4, NO_SLEEP, rank=0, size=1, seed=0), torch.ones(1, 1, 4)
    routing = Routing(logits_TE=x[0], weights_TK=x[0], experts_TK=torch.zeros(1, 1, dtype=torch.int64))
    for call in (
        lambda: blocks.shared(x),
        lambda: blocks.route(x),
        lambda: blocks.routed(x, routing),
        lambda: blocks.expert_rows(x[0], routing.experts_TK[0]),
    ):
        with pytest.raises(NotImplementedError, match="no experts"):
            call()
