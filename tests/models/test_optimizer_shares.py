"""Training steps of models with a divided update: the bits of the undivided one, for a share of its state."""

from typing import TYPE_CHECKING, Any

import pytest
import torch

from farskip.models.attach import attachment_of
from farskip.models.parallelize import parallelize
from farskip.models.surgery import rewire
from farskip.models.testing_families import CASES, build
from farskip.models.testing_models import next_token_loss, token_ids
from farskip.optimizer import build_optimizer
from farskip.parallel.data_parallel import DataParallel
from farskip.parallel.mesh import build_mesh
from farskip.testing import assert_equal_bits
from farskip.training_config import OptimizerConfig

if TYPE_CHECKING:
    from farskip.testing import RankPool


def trained(case: str, ep: int, tp: int, divided: bool) -> tuple[Any, int]:
    """A model after three steps of two micro-batches each, and this rank's elements of optimizer state."""
    mesh = build_mesh(ep, tp=tp)
    model = parallelize(rewire(build(CASES[case]), "farskip"), mesh)
    attachment = attachment_of(model)
    assert attachment is not None
    ranks = DataParallel(
        mesh,
        dict(model.named_parameters()),
        sharded=attachment.sharded_experts,
        layout=attachment.tensor_layout,
        shard_optimizer=divided,
    )
    optimizer = build_optimizer(model, OptimizerConfig(), ranks.shares)
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (1 + step)
        for number in range(2):
            ids = token_ids(2, 7, seed=100 * step + 10 * number + ranks.data_rank)
            loss = next_token_loss(model(ids, use_cache=False).logits, ids, 24 * ranks.data_size)
            if number == 1:
                ranks.expect_last_backward()
            loss.backward()
        ranks.reduce_gradients()
        assert float(ranks.clip_gradients(0.1)) > 0.1, "the clip has to bite"
        optimizer.step()
        optimizer.zero_grad()
    state = [value for held in optimizer.state.values() for value in held.values() if value.dim()]
    return model, sum(value.numel() for value in state)


def divided_equals_undivided(case: str, ep: int, tp: int) -> tuple[float, int]:
    """The share of the state that this rank keeps, and how much all ranks keep."""
    (divided, num_divided), (undivided, num) = (trained(case, ep, tp, divided) for divided in (True, False))
    assert_equal_bits(dict(divided.state_dict()), dict(undivided.state_dict()))
    untrained = parallelize(build(CASES[case]), build_mesh(ep, tp=tp)).state_dict()
    assert not torch.equal(divided.lm_head.weight, untrained["lm_head.weight"])
    return num_divided / num, num_divided


@pytest.mark.parametrize(
    ("case", "world", "ep", "tp", "share"),
    [
        ("llama", 2, 1, 1, 1 / 2),
        ("llama", 4, 1, 2, None),
        ("deepseek_v3", 2, 2, 1, None),
        ("qwen3_moe", 4, 2, 1, None),
    ],
)
def test_steps_have_the_bits_of_an_undivided_optimizer(
    case: str, world: int, ep: int, tp: int, share: float | None, rank_pool: "RankPool"
) -> None:
    found = rank_pool.run(divided_equals_undivided, world, case, ep, tp)
    for mine, _ in found:
        assert mine < 0.9
        if share is not None:
            assert mine == pytest.approx(share, rel=0.02)  # the vocabulary of 97 has no half
    # Together the ranks keep every element once, which is AdamW's two numbers per parameter of the whole model.
    num_parameters = sum(parameter.numel() for parameter in build(CASES[case]).parameters())
    assert sum(num for _, num in found) == 2 * num_parameters
