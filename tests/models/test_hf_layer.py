"""A layer taken apart: which blocks it has, and experts that get no row."""

from typing import Any

import pytest
import torch

from farskip.models.family import family_of_model
from farskip.models.testing_models import tiny_model
from farskip.wiring import DENSE, MOE, MOE_SHARED


def blocks_of(family: str, layer: int) -> Any:
    model = tiny_model(family)
    return family_of_model(model).sub_blocks(model.model.layers[layer])


@pytest.mark.parametrize(
    ("family", "layer", "blocks"),
    [("qwen3_moe", 0, DENSE), ("qwen3_moe", 1, MOE), ("deepseek_v3", 0, DENSE), ("deepseek_v3", 1, MOE_SHARED)],
)
def test_blocks(family: str, layer: int, blocks: tuple[str, ...]) -> None:
    assert blocks_of(family, layer).blocks == blocks


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_experts_without_a_row_keep_the_graph_whole(family: str) -> None:
    """Else this rank would launch fewer exchanges in backward than the others, and they would wait for ever."""
    sub_blocks = blocks_of(family, 1)
    rows = torch.zeros(0, 32, requires_grad=True)
    output = sub_blocks.expert_rows(rows * 1.0, torch.zeros(0, dtype=torch.int64))
    assert output.shape == (0, 32)
    output.sum().backward()
    assert rows.grad is not None and rows.grad.shape == (0, 32)
    for name, parameter in sub_blocks.experts.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), f"{name}: zero, not none"


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_rows_go_through_the_expert_they_are_for(family: str) -> None:
    sub_blocks = blocks_of(family, 1)
    rows, expert = torch.randn(9, 32), torch.tensor([7, 0, 3, 3, 0, 1, 2, 7, 7])
    together = sub_blocks.expert_rows(rows, expert)
    for position in range(9):
        alone = sub_blocks.expert_rows(rows[position : position + 1], expert[position : position + 1])
        torch.testing.assert_close(together[position : position + 1], alone, rtol=1e-4, atol=1e-4)
