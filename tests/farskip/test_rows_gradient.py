"""The gradient of copied rows on its way around autograd: what arrives where, and what is refused."""

from typing import Any

import pytest
import torch

from farskip.rows_gradient import RowsGradient

DST_TK = torch.tensor([[0, 2], [1, -1]], dtype=torch.int32)


def copy(tokens_TD: torch.Tensor) -> torch.Tensor:
    """Token 0 to rows 0 and 2, token 1 to row 1."""
    return tokens_TD[torch.tensor([0, 1, 0])]


class Made(torch.autograd.Function):
    """Makes a tensor; in backward notes what it gets."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, gradient: RowsGradient, seen: list[Any]) -> torch.Tensor:
        ctx.gradient, ctx.seen = gradient, seen
        return x * 1

    @staticmethod
    def backward(ctx: Any, arrived: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        ctx.seen += [arrived, ctx.gradient.take(arrived)]
        return torch.zeros_like(arrived), None, None


def test_rows_arrive_unsummed_behind_a_placeholder() -> None:
    """Through views; the placeholder has one number, and that is none."""
    gradient, seen = RowsGradient(), list[Any]()
    made = Made.apply(torch.ones(1, 2, 3, requires_grad=True), gradient, seen)
    rows = gradient.copied(copy, made.view(1, 2, 3).reshape(-1, 3), DST_TK)
    assert rows.shape == (3, 3)
    weights = torch.arange(9.0).view(3, 3)
    (rows * weights).sum().backward()
    arrived, taken = seen
    assert arrived.shape == (1, 2, 3) and arrived.isnan().all()
    assert arrived.untyped_storage().nbytes() == arrived.element_size()
    assert torch.equal(taken[0], weights) and torch.equal(taken[1], DST_TK)
    assert gradient.take(arrived) is None, "taken is taken"


def test_rows_are_contiguous() -> None:
    """A kernel reads them; the gradient of a sum has strides of zero."""
    gradient, seen = RowsGradient(), list[Any]()
    made = Made.apply(torch.ones(2, 3, requires_grad=True), gradient, seen)
    gradient.copied(copy, made, DST_TK).sum().backward()
    assert seen[1][0].is_contiguous()


def test_a_gradient_of_its_own_is_no_placeholder() -> None:
    gradient, seen = RowsGradient(), list[Any]()
    Made.apply(torch.ones(2, 3, requires_grad=True), gradient, seen).sum().backward()
    assert seen[1] is None


def test_a_second_reader_is_refused() -> None:
    gradient, seen = RowsGradient(), list[Any]()
    made = Made.apply(torch.ones(2, 3, requires_grad=True), gradient, seen)
    with pytest.raises(RuntimeError, match="has another reader, whose gradient would be lost"):
        (gradient.copied(copy, made, DST_TK).sum() + made.sum()).backward()


def test_two_copies_of_one_tensor_are_refused() -> None:
    gradient, seen = RowsGradient(), list[Any]()
    made = Made.apply(torch.ones(2, 3, requires_grad=True), gradient, seen)
    with pytest.raises(AssertionError, match="copied from a tensor twice"):
        (gradient.copied(copy, made, DST_TK) + gradient.copied(copy, made, DST_TK)).sum().backward()


def test_nothing_is_laid_aside_where_no_gradient_is_wanted() -> None:
    gradient = RowsGradient()
    rows = gradient.copied(copy, torch.ones(2, 3), DST_TK)
    assert not rows.requires_grad and gradient.take(rows) is None
