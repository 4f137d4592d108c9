"""With a fixed capacity the host never waits for the device between the embedding and the last gradient."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from farskip.balance import LaunchSum
from farskip.executor import Executor
from farskip.models.attach import attach, attachment_of, layers_of
from farskip.models.balancing import balance_model
from farskip.models.family import family_of_model
from farskip.models.parallelize import parallelize
from farskip.models.surgery import rewire, wiring_of
from farskip.models.testing_models import FAMILIES, NUM_EXPERTS, next_token_loss, tiny_model, token_ids
from farskip.parallel.data_parallel import DataParallel
from farskip.parallel.dispatcher import AllToAllDispatcher
from farskip.parallel.mesh import build_mesh
from farskip.parallel.testing_links import FakeLink
from farskip.testing import no_host_waits
from farskip.training_protocols import SingleProcess

if TYPE_CHECKING:
    from farskip.testing import RankPool

WIRINGS = ("ordinary", "farskip", "ladder")


def without_waits(method: Callable[..., Any]) -> Callable[..., Any]:
    def called(*arguments: Any, **keywords: Any) -> Any:
        with no_host_waits():
            return method(*arguments, **keywords)

    return called


def balanced_step(model: Any, launch_sum: LaunchSum, *, recompute: bool) -> None:
    """A training step whose layers, gradients included, must not make the host wait. transformers' masks may."""
    attachment = attachment_of(model)
    assert attachment is not None
    balancer = balance_model(model, aux_coefficient=0.5, bias_rate=0.0, launch_sum=launch_sum)
    assert balancer is not None
    balancer.set_scale(0.5)
    if recompute:
        model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=lambda *_: None)
        attachment.checkpoint_layers = 2
    executor: Any = attachment.executor
    executor.run_segment = without_waits(executor.run_segment)
    ids_BS = token_ids(2, 6)
    loss = next_token_loss(model(ids_BS, use_cache=False).logits, ids_BS)
    with no_host_waits():
        loss.backward()
    assert balancer.update()["balance/max_load"] >= 1.0


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_on_one_rank(family: str, wiring: str, recompute: bool) -> None:
    """As `farskip.rewire` leaves a model, and with rows that travel."""
    model = rewire(tiny_model(family), wiring)
    balanced_step(model, SingleProcess(model).launch_sum_over_processes, recompute=recompute)
    known = family_of_model(model)
    dispatcher = AllToAllDispatcher(FakeLink(), NUM_EXPERTS, capacity=3)
    blocks = [known.sub_blocks(layer) for layer in layers_of(model)]
    attach(model, Executor(blocks, wiring_of(model), dispatcher=dispatcher))
    balanced_step(model, SingleProcess(model).launch_sum_over_processes, recompute=recompute)


def steps_on_ranks(wirings: tuple[str, ...], chunks: int) -> None:
    mesh = build_mesh(2)
    for wiring in wirings:
        model = parallelize(rewire(tiny_model("deepseek_v3"), wiring), mesh, chunks=chunks, capacity=3)
        ranks = DataParallel(mesh, dict(model.named_parameters()))
        balanced_step(model, ranks.launch_sum_over_processes, recompute=True)


@pytest.mark.parametrize("chunks", [1, 2])
def test_on_ranks(chunks: int, rank_pool: "RankPool") -> None:
    rank_pool.run(steps_on_ranks, 2, ("ordinary", "farskip"), chunks)
