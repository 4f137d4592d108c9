"""Gradients summed under backward: the bits of sums behind it, on their way when they should be, in one order."""

import gc
import itertools
import warnings
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

from farskip.parallel import gradient_sums
from farskip.parallel.gradient_sums import GradientSums
from farskip.wait_meter import WaitMeter

if TYPE_CHECKING:
    from farskip.testing import RankPool

WIDTH = 8


def model_of_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)))


def bucket_per_layer() -> Any:
    return patch.object(gradient_sums, "_BUCKET_BYTES", 4 * WIDTH * (WIDTH + 1))


def loss_of(model: nn.Module, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * seed + dist.get_rank())
    return model(torch.randn(3, WIDTH, generator=generator)).square().sum()


@contextmanager
def late_sums(arrived: Iterable[bool] = itertools.repeat(False)) -> Iterator[list[torch.Tensor]]:
    """All-reduces of floats that hold NaN until they are waited for, and say that they have arrived as told. Gives
    those under way."""
    all_reduce, under_way, answers = dist.all_reduce, [], iter(arrived)

    class Late:
        def __init__(self, tensor: torch.Tensor, work: Any) -> None:
            work.wait()
            self._tensor, self._sum = tensor, tensor.clone()
            tensor.fill_(float("nan"))
            under_way.append(tensor)

        def is_completed(self) -> bool:
            return next(answers)

        def wait(self) -> None:
            self._tensor.copy_(self._sum)
            under_way[:] = [tensor for tensor in under_way if tensor is not self._tensor]

    def start(tensor: torch.Tensor, *arguments: Any, **settings: Any) -> Any:
        work = all_reduce(tensor, *arguments, **settings)
        return Late(tensor, work) if tensor.is_floating_point() and settings.get("async_op") else work

    with patch.object(dist, "all_reduce", start):
        yield under_way


def summed(early: bool, micro_batches: int, steps: int = 2) -> list[torch.Tensor]:
    """The gradients of some steps."""
    model, found = model_of_layers(), []
    with bucket_per_layer():
        sums = GradientSums(model.parameters(), None, WaitMeter(), early=early)
        for step in range(steps):
            model.zero_grad(set_to_none=True)
            for number in range(micro_batches):
                loss = loss_of(model, step * micro_batches + number)
                if number + 1 == micro_batches:
                    sums.expect()
                loss.backward()
            sums.finish()
            found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return found


def early_equals_late(micro_batches: int) -> None:
    late = summed(False, micro_batches)
    assert len(late) == 16 and all(gradient.isfinite().all() for gradient in late)
    on_this_rank = itertools.cycle([True, dist.get_rank() == 0, False])
    for arrived in (itertools.repeat(False), itertools.repeat(True), on_this_rank):
        with late_sums(arrived):
            early = summed(True, micro_batches)
        assert all(torch.equal(one, other) for one, other in zip(early, late, strict=True))
    model = model_of_layers()  # and both are the sums of what each rank has
    for number in range(micro_batches):
        loss_of(model, number).backward()
    for parameter, gradient in zip(model.parameters(), late[:8], strict=True):
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad)
        torch.testing.assert_close(gradient, parameter.grad)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("world", [2, 4])
def test_early_sums_have_the_bits_of_late_ones(world: int, micro_batches: int, rank_pool: "RankPool") -> None:
    rank_pool.run(early_equals_late, world, micro_batches)


def under_way_by_layer() -> list[int]:
    """How many sums are under way when the gradient of each layer's input is there, last layer first."""
    model, seen = model_of_layers(), []
    with bucket_per_layer(), late_sums() as under_way:
        sums = GradientSums(model.parameters(), None, WaitMeter())
        x_BD = torch.ones(1, WIDTH, requires_grad=True)
        for layer in model:
            x_BD = layer(x_BD)
            x_BD.register_hook(lambda gradient: seen.append(len(under_way)))
        sums.expect()
        x_BD.sum().backward()
        seen.append(len(under_way))
        sums.finish()
    return seen


def test_the_sums_of_a_layer_are_under_way_while_the_next_ones_gradient_is_computed(rank_pool: "RankPool") -> None:
    for seen in rank_pool.run(under_way_by_layer, 2):
        assert seen[0] == 0 and seen[-1] == 4
        assert seen == sorted(seen) and seen[3] >= 2, "a layer may finish its own parameters after it has gone on"


def most_at_once() -> int:
    """Of sums that `finish` starts."""
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(9)))
    all_reduce, num, most = dist.all_reduce, 0, 0

    class Counted:
        def __init__(self, work: Any) -> None:
            nonlocal num, most
            self._work = work
            num += 1
            most = max(num, most)

        def wait(self) -> None:
            nonlocal num
            self._work.wait()
            num -= 1

    with bucket_per_layer():
        sums = GradientSums(model.parameters(), None, WaitMeter(), early=False)
    with patch.object(dist, "all_reduce", lambda *a, **k: Counted(all_reduce(*a, **k))):
        loss_of(model, 0).backward()
        sums.finish()
    assert num == 0
    return most


def test_sums_behind_backward_do_not_hold_all_gradients_twice(rank_pool: "RankPool") -> None:
    assert rank_pool.run(most_at_once, 2) == [4, 4]


def most_under_backward() -> None:
    """Of sums that arrive before the next one is launched, one at a time holds a copy of its gradients."""
    model, seen = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(9))), []
    with bucket_per_layer(), late_sums(itertools.repeat(True)) as under_way:
        sums = GradientSums(model.parameters(), None, WaitMeter())
        sums.expect()
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda gradient: seen.append(len(under_way)))
        loss_of(model, 0).backward()
        sums.finish()
    assert max(seen) == 1 and not under_way


def test_sums_that_have_arrived_are_put_in_place_under_backward(rank_pool: "RankPool") -> None:
    rank_pool.run(most_under_backward, 2)


def other_order_on_every_rank() -> None:
    """Two branches whose backwards run in one order here and in the other there."""
    torch.manual_seed(0)
    branches = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
    x_BD = torch.ones(1, WIDTH)
    order = list(branches) if dist.get_rank() else list(reversed(branches))
    with patch.object(gradient_sums, "_BUCKET_BYTES", 1):
        sums = GradientSums(branches.parameters(), None, WaitMeter())
        total = torch.zeros(())
        for branch in order:
            total = total + (branch(x_BD) * (1.0 if branch is branches[0] else 10.0)).sum()
        sums.expect()
        total.backward()
        sums.finish()
    for branch, expected in zip(branches, (2.0, 20.0), strict=True):
        assert branch.weight.grad is not None
        assert torch.equal(branch.weight.grad, torch.full((WIDTH, WIDTH), expected)), "another branch's sum"


def test_ranks_whose_backwards_differ_in_order_sum_the_same_buckets(rank_pool: "RankPool") -> None:
    rank_pool.run(other_order_on_every_rank, 2)


def beside_what_is_in_flight() -> None:
    """A sum is there although an exchange of the same ranks, launched before it, is not."""
    parameter = nn.Parameter(torch.zeros(2))
    groups = []
    all_reduce = dist.all_reduce

    def start(tensor: torch.Tensor, *arguments: Any, **settings: Any) -> Any:
        groups.append(settings["group"])
        return all_reduce(tensor, *arguments, **settings)

    with patch.object(dist, "all_reduce", start):
        sums = GradientSums([parameter], None, WaitMeter())
        assert len(groups) == 1, "ranks connect when it is made, not in the middle of a backward"
        parameter.sum().backward()
        sums.finish()
    assert len(groups) == 2 and all(group not in (None, dist.group.WORLD) for group in groups), (
        "NCCL runs a group in order"
    )
    assert dist.get_process_group_ranks(groups[0]) == list(range(dist.get_world_size()))


def test_sums_have_a_process_group_of_their_own(rank_pool: "RankPool") -> None:
    rank_pool.run(beside_what_is_in_flight, 2)


def one_backward_too_many() -> None:
    model = model_of_layers()
    sums = GradientSums(model.parameters(), None, WaitMeter())
    sums.expect()
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match="changed while its sum over ranks was under way"):
        loss_of(model, 1).backward()
    with pytest.raises(RuntimeError, match="changed after it was sent"):
        sums.finish()


def test_a_backward_after_the_last_one_is_refused(rank_pool: "RankPool") -> None:
    rank_pool.run(one_backward_too_many, 2)


def double(parameter: torch.Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.mul_(2)


def changed_by(change: str, arrived: bool) -> None:
    """What is done to a gradient behind its launch would be lost under the sum, or be done to the sum."""
    model = model_of_layers()
    weight = model[3].weight
    with bucket_per_layer(), late_sums(itertools.repeat(arrived)):
        change_one(model, weight, change)


def change_one(model: nn.Module, weight: nn.Parameter, change: str) -> None:
    sums = GradientSums(model.parameters(), None, WaitMeter())
    sums.expect()
    if change == "a hook that runs later":
        weight.register_post_accumulate_grad_hook(double)
    loss_of(model, 0).backward()
    assert weight.grad is not None
    if change == "in place":
        weight.grad.add_(1)
    elif change == "replaced":
        weight.grad = weight.grad + 1
    with pytest.raises(RuntimeError, match=r"gradient of shape \[8, 8\] changed after it was sent"):
        sums.finish()
    if change != "a hook that runs later":  # the next step is one like any other
        model.zero_grad()
        sums.expect()
        loss_of(model, 0).backward()
        sums.finish()


@pytest.mark.parametrize("arrived", [False, True])
@pytest.mark.parametrize("change", ["in place", "replaced", "a hook that runs later"])
def test_a_gradient_that_changes_behind_its_launch_is_refused(
    change: str, arrived: bool, rank_pool: "RankPool"
) -> None:
    rank_pool.run(changed_by, 2, change, arrived)


def a_backward_that_fails() -> None:
    model = model_of_layers()
    with bucket_per_layer():
        sums = GradientSums(model.parameters(), None, WaitMeter())
        sums.expect()

    def fail(gradient: torch.Tensor) -> None:
        raise ValueError("out of memory")

    hidden = model[:2](torch.ones(1, WIDTH))
    hidden.register_hook(fail)
    with pytest.raises(ValueError, match="out of memory"):
        model[2:](hidden).sum().backward()
    with pytest.raises(RuntimeError, match="were not waited for, which probably failed: reduce_gradients first"):
        sums.expect()
    sums.finish()
    model.zero_grad()
    sums.expect()
    loss_of(model, 0).backward()
    sums.finish()


def test_after_a_backward_that_failed_it_says_what_to_do(rank_pool: "RankPool") -> None:
    rank_pool.run(a_backward_that_fails, 2)


def parameters_that_are_frozen_later() -> None:
    model = model_of_layers()
    sums = GradientSums(model.parameters(), None, WaitMeter())
    for frozen in (False, True, False):
        model[0].requires_grad_(not frozen)
        model.zero_grad(set_to_none=True)
        loss = loss_of(model, 0)
        sums.expect()
        loss.backward()
        own = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        sums.finish()
        for before, parameter in zip(own, model.parameters(), strict=True):
            assert (parameter.grad is None) == (not parameter.requires_grad)
            assert parameter.grad is None or not torch.equal(parameter.grad, before)


def test_parameters_may_be_frozen_and_thawed_between_steps(rank_pool: "RankPool") -> None:
    rank_pool.run(parameters_that_are_frozen_later, 2)


def a_parameter_that_is_not_used() -> list[str]:
    """What is said in three steps in which the first bucket to be sent is never complete."""
    model, said = model_of_layers(), []
    with bucket_per_layer():
        sums = GradientSums([*model.parameters(), nn.Parameter(torch.zeros(5))], None, WaitMeter())
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            loss = loss_of(model, 0)
            sums.expect()
            loss.backward()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                sums.finish()
            said += [str(each.message) for each in caught]
    return said


def test_overlap_that_a_parameter_without_gradient_defeats_is_said_once(rank_pool: "RankPool") -> None:
    (message,), others = rank_pool.run(a_parameter_that_is_not_used, 2)
    assert "no sum of gradients could start under backward" in message and "shape [5]" in message
    assert others == []


def hooks_of_the_dead() -> None:
    model = model_of_layers()
    sums = GradientSums(model.parameters(), None, WaitMeter())
    sums.expect()
    gone = weakref.ref(sums)
    del sums
    gc.collect()
    assert gone() is None, "the model's parameters keep it"
    loss_of(model, 0).backward()


def test_parameters_do_not_keep_it_alive(rank_pool: "RankPool") -> None:
    rank_pool.run(hooks_of_the_dead, 2)
