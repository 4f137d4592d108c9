"""Dispatch of a family that weighs its experts' inputs: the weight meets the row before it leaves, once."""

import itertools
from dataclasses import replace

import pytest
import torch

from farskip.parallel.dispatcher import AllToAllDispatcher
from farskip.parallel.testing_links import FakeLink
from farskip.rows_gradient import RowsGradient
from farskip.stage import Routing, WeightOn

TOKENS, EXPERTS, WIDTH = 7, 4, 3


def routing() -> Routing:
    weights_TK = torch.rand(TOKENS, 2, dtype=torch.float64).requires_grad_()
    experts_TK = torch.rand(TOKENS, EXPERTS).argsort(1)[:, :2]
    return Routing(logits_TE=torch.zeros(TOKENS, EXPERTS), weights_TK=weights_TK, experts_TK=experts_TK)


def expert(rows_RD: torch.Tensor, expert_R: torch.Tensor) -> torch.Tensor:
    """Not linear, so that a weight on the input is not one on the output."""
    return torch.sin(rows_RD * (expert_R + 1).unsqueeze(1))


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("weight_on", WeightOn)
def test_values_and_gradients(weight_on: WeightOn, chunks: int) -> None:
    torch.manual_seed(0)
    dispatcher = AllToAllDispatcher(FakeLink(), EXPERTS, chunks)
    tokens_TD = torch.randn(TOKENS, WIDTH, dtype=torch.float64).requires_grad_()
    route, upstream = replace(routing(), weight_on=weight_on), torch.randn(TOKENS, WIDTH, dtype=torch.float64)
    prepared = dispatcher.prepare(tokens_TD.unsqueeze(0), route)
    rows = [expert(rows, plan.expert_R) for rows, plan in prepared]
    ours = dispatcher.merge(rows, route, [plan for _, plan in prepared])
    expected = torch.zeros_like(tokens_TD)
    for choice in range(2):
        weight_T1, expert_T = route.weights_TK[:, choice : choice + 1], route.experts_TK[:, choice]
        if weight_on is WeightOn.INPUT:
            expected = expected + expert(tokens_TD * weight_T1, expert_T)
        else:
            expected = expected + expert(tokens_TD, expert_T) * weight_T1
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    inputs = (tokens_TD, route.weights_TK)
    theirs = torch.autograd.grad(expected, inputs, upstream, retain_graph=True)
    for mine, reference in zip(torch.autograd.grad(ours, inputs, upstream), theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weight_on", WeightOn)
def test_under_autocast_rows_travel_in_its_dtype(weight_on: WeightOn) -> None:
    """Rounded once, in front of the wire as behind it; a weight on the input is multiplied with it before."""
    torch.manual_seed(0)
    tokens_TD = torch.randn(TOKENS, WIDTH).requires_grad_()
    route = replace(routing(), weight_on=weight_on)
    route = replace(route, weights_TK=route.weights_TK.float())
    dispatcher = AllToAllDispatcher(FakeLink(), EXPERTS)
    [(exact_RD, _)] = dispatcher.prepare(tokens_TD.unsqueeze(0), route)
    with torch.autocast("cpu", torch.bfloat16):
        [(rows_RD, _)] = dispatcher.prepare(tokens_TD.unsqueeze(0), route)
    assert rows_RD.dtype == torch.bfloat16 and exact_RD.dtype == torch.float32
    assert torch.equal(rows_RD, exact_RD.bfloat16())
    rows_RD.float().sum().backward()
    assert tokens_TD.grad is not None and tokens_TD.grad.dtype == torch.float32


@pytest.mark.parametrize("chunks", [1, 2])
def test_the_gradient_of_one_piece_goes_beside_autograd(chunks: int) -> None:
    """In the dtype of the rows. A weight on the input is multiplied, and cast, behind the copy."""
    for weight_on, autocast in itertools.product(WeightOn, (False, True)):
        gradient, dispatcher = RowsGradient(), AllToAllDispatcher(FakeLink(), EXPERTS, chunks)
        tokens_TD = torch.randn(TOKENS, WIDTH).requires_grad_()
        route = replace(routing(), weight_on=weight_on)
        route = replace(route, weights_TK=route.weights_TK.float())
        seen: list[torch.Tensor] = []
        made_TD = tokens_TD * 1
        made_TD.register_hook(seen.append)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            prepared = dispatcher.prepare(made_TD.unsqueeze(0), route, gradient)
        sum((rows_RD.float() * torch.arange(WIDTH)).sum() for rows_RD, _ in prepared).backward()
        (arrived,) = seen
        taken = gradient.take(arrived)
        if chunks > 1:
            assert taken is None and arrived.isfinite().all()
            continue
        assert arrived.isnan().all() and arrived.dtype == torch.float32 and taken is not None
        rows_RD, dst_TK = taken
        cast = autocast and weight_on is WeightOn.OUTPUT
        assert rows_RD.dtype == (torch.bfloat16 if cast else torch.float32)
        assert torch.equal(dst_TK, prepared[0][1].dispatch.dst)
