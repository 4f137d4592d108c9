"""Joins, taps and sums of gradients: what is launched when, what is undefined until it was waited for, which order."""

from typing import Any

import pytest
import torch

from farskip.parallel.tensor_parallel import TensorParallelRanks
from farskip.parallel.testing_links import FakeLink, at_wait
from farskip.reduction_autograd import GradientSum, enter, fill, join, sum_over_ranks, tap
from farskip.testing import assert_equal_bits


class Log:
    """Launches and waits in backward, in order."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, do: str, backward: bool) -> Any:
        assert backward
        self.seen.append(do)
        return lambda: None


def summed(link: FakeLink, num_taps: int, *, blocking: bool = False, log: Log | None = None) -> GradientSum:
    return GradientSum(TensorParallelRanks(link), num_taps, blocking=blocking, notify=log)


def test_a_join_is_undefined_until_it_is_filled() -> None:
    x, partial = torch.ones(3, requires_grad=True), torch.full((3,), 2.0, requires_grad=True)
    joined = join(x * 1.0, partial * 1.0, None)
    fill(joined, x, torch.full((3,), 5.0))
    assert torch.equal(joined, torch.full((3,), 6.0))
    joined.sum().backward()
    assert x.grad is not None and partial.grad is not None
    assert torch.equal(x.grad, torch.ones(3)) and torch.equal(partial.grad, torch.ones(3))


@pytest.mark.parametrize("blocking", [False, True])
def test_the_last_tap_launches_and_the_join_waits(blocking: bool) -> None:
    link, log = FakeLink(at_wait), Log()
    x = torch.ones(3, requires_grad=True)
    gradients = summed(link, 2, blocking=blocking, log=log)
    joined = join(x * 1.0, x * 0.0, gradients)
    fill(joined, x, torch.zeros(3))
    first, second = (tap(joined, gradients, number) for number in (0, 1))
    seen: list[tuple[str, int]] = []
    first.register_hook(lambda gradient: seen.append(("first", len(link.in_flight))))
    second.register_hook(lambda gradient: seen.append(("second", len(link.in_flight))))
    (first * 2.0 + second * 3.0 + joined * 4.0).sum().backward()
    assert seen == [("second", 0), ("first", 0)], "nothing is launched before the last tap"
    assert log.seen == ["launch", "wait"] and link.num_exchanges == 1 and not link.in_flight
    assert x.grad is not None and torch.equal(x.grad, torch.full((3,), 9.0)) and not link.lost


def test_what_was_created_after_the_join_runs_under_the_all_reduce() -> None:
    """The heart of it: three sub-blocks in ladder, the second beside the first. In backward the all-reduce of the third
    one's input gradient is in flight while the second runs; the first reads what was waited for."""
    link, x = FakeLink(at_wait), torch.ones(3, requires_grad=True)
    in_flight: dict[str, int] = {}

    def block(name: str, stream: torch.Tensor) -> torch.Tensor:
        output = stream * 2.0
        output.register_hook(lambda gradient: in_flight.__setitem__(name, len(link.in_flight)))
        return output

    at_entry, at_middle = summed(link, 2), summed(link, 1)
    entered = enter(x * 1.0, at_entry)
    one = block("one", tap(entered, at_entry, 0))
    middle = join(entered, one, at_middle)
    two = block("two", tap(entered, at_entry, 1))
    last = join(middle, two, None)
    fill(middle, entered, one.detach())
    three = block("three", tap(middle, at_middle, 0))
    end = join(last, three, None)
    fill(last, middle, two.detach())
    fill(end, last, three.detach())
    end.sum().backward()
    assert in_flight == {"three": 0, "two": 1, "one": 0}
    # end = x + 2 x + 2 x + 2 (x + 2 x) = 11 x
    assert torch.equal(end, torch.full((3,), 11.0))
    assert x.grad is not None and torch.equal(x.grad, torch.full((3,), 11.0)) and not link.lost


def test_gradients_of_taps_are_added_in_the_order_of_the_taps() -> None:
    parts = [torch.tensor([1e8]), torch.tensor([-1e8]), torch.tensor([1.0])]
    expected = (parts[0] + parts[1]) + parts[2]
    for order in ((0, 1, 2), (2, 1, 0), (2, 0, 1), (1, 2, 0)):
        gradients = summed(FakeLink(at_wait), 3)
        for number in order:
            gradients.arrive(number, parts[number].clone())
        total = gradients.take()
        assert total is not None
        assert_equal_bits(total, expected)


def test_a_tap_without_a_gradient_counts() -> None:
    link = FakeLink(at_wait)
    gradients = summed(link, 2)
    gradients.arrive(1, None)
    gradients.arrive(0, torch.ones(2))
    total = gradients.take()
    assert total is not None and torch.equal(total, torch.ones(2)) and link.num_exchanges == 1
    gradients.arrive(0, None)
    gradients.arrive(1, None)
    assert gradients.take() is None and link.num_exchanges == 1 and not link.lost


def test_a_tap_that_autograd_never_reached_keeps_nobody_waiting() -> None:
    link = FakeLink(at_wait)
    gradients = summed(link, 2)
    gradients.arrive(0, torch.ones(2))
    assert link.num_exchanges == 0
    total = gradients.take()
    assert total is not None and torch.equal(total, torch.ones(2)) and not link.in_flight and not link.lost


def test_a_sum_can_be_used_again() -> None:
    """Backward through a kept graph."""
    x = torch.ones(2, requires_grad=True)
    gradients = summed(FakeLink(at_wait), 1)
    entered = enter(x * 1.0, gradients)
    loss = (tap(entered, gradients, 0) * 3.0).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert x.grad is not None and torch.equal(x.grad, torch.full((2,), 6.0))


def test_without_gradients_there_is_nothing_between() -> None:
    x, gradients = torch.ones(2), summed(FakeLink(at_wait), 1)
    assert tap(x, gradients, 0) is x and enter(x, gradients) is x
    with torch.no_grad():
        assert tap(x.requires_grad_(), gradients, 0) is x


def test_a_sum_inside_a_sub_block_is_waited_for_where_it_stands() -> None:
    """In both directions; what it sums is not changed in place, because others may read it."""
    link, x = FakeLink(at_wait), torch.tensor([1.0, 2.0], requires_grad=True)
    squares, upstream = x * x, torch.tensor([3.0, 5.0])
    summed_squares = sum_over_ranks(squares, TensorParallelRanks(link))
    assert torch.equal(summed_squares, torch.tensor([1.0, 4.0])) and not link.in_flight
    assert summed_squares.data_ptr() != squares.data_ptr()
    summed_squares.backward(upstream)
    assert torch.equal(upstream, torch.tensor([3.0, 5.0])) and link.num_exchanges == 2 and not link.in_flight
    assert x.grad is not None and torch.equal(x.grad, torch.tensor([6.0, 20.0])) and not link.lost
