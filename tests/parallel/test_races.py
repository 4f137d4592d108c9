"""Races: whole models over links whose buffers are NaN until waited for, which are late by chosen and random delays,
and which keep nothing alive. What is read too early, or freed too early, shows in the bits."""

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist

from farskip.async_autograd import InFlight
from farskip.executor import Executor
from farskip.models.attach import attach, attachment_of, layers_of
from farskip.models.family import family_of_model
from farskip.models.parallelize import parallelize
from farskip.models.surgery import rewire, wiring_of
from farskip.models.testing_models import (
    forced_routing,
    gradients,
    next_token_loss,
    run_backward,
    tiny_model,
    token_ids,
)
from farskip.parallel.collectives import AllToAll
from farskip.parallel.dispatcher import AllToAllDispatcher
from farskip.parallel.mesh import EP_AXIS, build_mesh
from farskip.parallel.testing_links import FakeLink, LateLink, at_wait, random_delay
from farskip.testing import assert_equal_bits, poison_empty

if TYPE_CHECKING:
    from farskip.testing import RankPool

WIRINGS = ("ordinary", "farskip", "attn_only", "parallel", "ladder")


def model_over(link: FakeLink, family: str, wiring: str, mode: str, *, recompute: int = 0, chunks: int = 1) -> Any:
    """A model on one rank whose rows still travel, over a fake link to itself."""
    model = rewire(tiny_model(family), wiring)
    known = family_of_model(model)
    executor = Executor(
        [known.sub_blocks(layer) for layer in layers_of(model)],
        wiring_of(model),
        dispatcher=AllToAllDispatcher(link, 8, chunks),
        mode=mode,
    )
    attachment = attach(model, executor)
    if recompute:
        model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=lambda *_: None)
        attachment.checkpoint_layers = recompute
    return model


def run(link: FakeLink, *arguments: Any, **keywords: Any) -> dict[str, torch.Tensor]:
    """Logits and all gradients of one step, after a look at the link."""
    model = model_over(link, *arguments, **keywords)
    with poison_empty():
        logits, found = run_backward(model, token_ids(2, 6), use_cache=False)
    assert not link.lost, "what was sent was freed while it was under way"
    assert not link.in_flight, "something is still under way at the end of the step"
    assert link.num_exchanges
    for name, tensor in {"logits": logits, **found}.items():
        assert tensor.isfinite().all(), f"{name} is not finite: a buffer was read before it was filled"
    return {"logits": logits, **found}


@pytest.mark.parametrize("recompute", [0, 2], ids=["kept", "recomputed"])
@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_the_slowest_link_changes_no_bit(family: str, wiring: str, recompute: int) -> None:
    serial = run(FakeLink(at_wait), family, wiring, "serial", recompute=recompute)
    overlapped = run(FakeLink(at_wait), family, wiring, "overlapped", recompute=recompute)
    assert_equal_bits(overlapped, serial)


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("wiring", WIRINGS)
def test_random_delays_change_no_bit(wiring: str, chunks: int) -> None:
    expected = run(FakeLink(at_wait), "deepseek_v3", wiring, "overlapped", chunks=chunks)
    for seed in range(3):
        delayed = run(FakeLink(random_delay(seed)), "deepseek_v3", wiring, "overlapped", chunks=chunks)
        assert_equal_bits(delayed, expected)


@pytest.mark.parametrize("wiring", WIRINGS)
def test_a_fast_link_changes_no_bit(wiring: str) -> None:
    """Everything arrives at the next call: nobody may count on a buffer still being empty."""
    expected = run(FakeLink(at_wait), "deepseek_v3", wiring, "overlapped")
    assert_equal_bits(run(FakeLink(lambda: 0), "deepseek_v3", wiring, "overlapped"), expected)


@pytest.mark.parametrize("wiring", ["ordinary", "farskip", "ladder"])
def test_two_micro_batches_and_evaluation_in_between(wiring: str) -> None:
    link = FakeLink(random_delay(0))
    model = model_over(link, "deepseek_v3", wiring, "overlapped")
    found = []
    for _ in range(2):
        model.zero_grad()
        for seed in (1, 2):
            ids = token_ids(2, 6, seed=seed)
            next_token_loss(model(ids, use_cache=False).logits, ids).backward()
            with torch.no_grad():
                model(token_ids(1, 3))
        found.append(gradients(model))
    assert_equal_bits(found[1], found[0])
    assert not link.lost and not link.in_flight


# -- on ranks ---------------------------------------------------------------------------------------------------------


def late_on_ranks(wiring: str, routing: str) -> None:
    results = []
    for mode in ("serial", "overlapped"):
        mesh = build_mesh(dist.get_world_size())
        model = parallelize(
            rewire(tiny_model("deepseek_v3"), wiring), mesh, mode, link=LateLink(mesh.get_group(EP_AXIS))
        )
        attachment = attachment_of(model)
        assert attachment is not None
        attachment.executor.routing_hook = forced_routing(routing, 12)
        with poison_empty():
            logits, found = run_backward(model, token_ids(2, 6, seed=dist.get_rank()), use_cache=False)
        results.append({"logits": logits, **found})
    assert all(tensor.isfinite().all() for tensor in results[1].values())
    assert_equal_bits(results[1], results[0])


@pytest.mark.parametrize("routing", ["free", "idle_rank"])
@pytest.mark.parametrize("wiring", ["farskip", "ladder"])
def test_a_late_link_between_ranks(wiring: str, routing: str, rank_pool: "RankPool") -> None:
    rank_pool.run(late_on_ranks, 2, wiring, routing)


# -- the links themselves can catch something -------------------------------------------------------------------------


def test_the_fake_link_shows_what_is_read_too_early() -> None:
    link = FakeLink(at_wait)
    exchange = AllToAll(link=link, input_splits=(2,), output_splits=(2,))
    pending = exchange.launch(torch.ones(2, 3))
    assert pending.unfilled.isnan().all()
    assert torch.equal(pending.wait(), torch.ones(2, 3))


def test_the_fake_link_shows_what_is_freed_too_early() -> None:
    link = FakeLink(at_wait)
    output = torch.empty(2, 3)
    work = link.all_to_all(output, torch.ones(2, 3), (2,), (2,))  # nobody keeps what is sent
    work.wait()
    assert link.lost == 1 and output.isnan().all()


@pytest.mark.parametrize("delay", [at_wait, lambda: 0], ids=["waited_for", "early"])
def test_the_fake_link_shows_a_buffer_that_is_freed_too_early(delay: Any) -> None:
    """Of an all-reduce, which sends and receives in one, and of an exchange."""
    link, sent = FakeLink(delay), torch.ones(2, 3)
    works = [link.all_reduce(torch.ones(2, 3)), link.all_to_all(torch.empty(2, 3), sent, (2,), (2,))]
    link.tick()
    for work in works:
        work.wait()
    assert link.lost == 2 and not link.in_flight
    kept = torch.ones(2, 3)
    link.all_reduce(kept).wait()
    assert link.lost == 2 and torch.equal(kept, torch.ones(2, 3))


def test_the_fake_link_sends_what_is_there_when_it_delivers() -> None:
    """So that writing into a tensor under way is seen."""
    link, sent, output = FakeLink(at_wait), torch.ones(2, 3), torch.empty(2, 3)
    work = link.all_to_all(output, sent, (2,), (2,))
    sent.zero_()
    work.wait()
    assert torch.equal(output, torch.zeros(2, 3))


@pytest.mark.parametrize("delay", [0, 1, 2])
def test_the_fake_link_delivers_when_it_is_told_to(delay: int) -> None:
    link, sent, output = FakeLink(lambda: delay), torch.ones(2, 3), torch.empty(2, 3)
    link.all_to_all(output, sent, (2,), (2,))
    for _ in range(delay + 1):
        assert output.isnan().all()
        link.tick()
    assert torch.equal(output, sent)


def test_a_model_that_uses_the_unfilled_buffer_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InFlight, "wait", lambda self, unfilled: unfilled)
    with pytest.raises(AssertionError, match=r"under way|not finite"):
        run(FakeLink(at_wait), "deepseek_v3", "farskip", "overlapped")
