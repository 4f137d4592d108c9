"""Load balancing attached to real models: it reads the routers' logits, and moves the biases that the routers use."""

from typing import TYPE_CHECKING, Any

import pytest
import torch

from farskip.executor import Executor
from farskip.models.attach import attach, attachment_of, layers_of
from farskip.models.balancing import DroppedRows, balance_model
from farskip.models.family import family_of_model
from farskip.models.parallelize import parallelize
from farskip.models.surgery import rewire, wiring_of
from farskip.models.testing_models import (
    FAMILIES,
    NUM_EXPERTS,
    TOP_K,
    gradients,
    next_token_loss,
    run_backward,
    tiny_model,
    token_ids,
)
from farskip.parallel.data_parallel import DataParallel
from farskip.parallel.dispatcher import AllToAllDispatcher
from farskip.parallel.mesh import build_mesh
from farskip.parallel.testing_links import FakeLink
from farskip.pending import Pending
from farskip.testing import assert_close, assert_equal_bits
from farskip.training_protocols import SingleProcess

if TYPE_CHECKING:
    from farskip.testing import RankPool


def alone(tensor: torch.Tensor) -> Pending:
    """The sum over the ranks of a world of one."""
    return Pending(tensor, None)


def test_off_is_no_balancer() -> None:
    model = rewire(tiny_model("qwen3_moe"), "ordinary")
    assert balance_model(model, aux_coefficient=0.0, bias_rate=0.0, launch_sum=alone) is None
    attachment = attachment_of(model)
    assert attachment is not None and attachment.executor.routing_hook is None


@pytest.mark.parametrize("wiring", ["ordinary", "farskip"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_auxiliary_loss_reaches_every_router_and_is_linear(family: str, wiring: str) -> None:
    """Twice the coefficient is twice the change of each router's gradient; other weights of the last layer get none."""
    ids_BS = token_ids(2, 12)

    def gradients(coefficient: float) -> dict[str, torch.Tensor]:
        model = rewire(tiny_model(family), wiring)
        balance_model(model, aux_coefficient=coefficient, bias_rate=0.0, launch_sum=alone)
        return run_backward(model, ids_BS)[1]

    plain, once, twice = gradients(0.0), gradients(1.0), gradients(2.0)
    gates = [name for name in plain if name.endswith("mlp.gate.weight")]
    assert len(gates) == 3  # the first of four layers is dense
    for name in gates:
        change = once[name] - plain[name]
        assert change.abs().max() > 1e-3 * plain[name].abs().max()
        torch.testing.assert_close(twice[name] - plain[name], 2 * change, rtol=1e-3, atol=1e-5)
    last = max(name for name in plain if "experts.down_proj" in name and "shared" not in name)
    torch.testing.assert_close(once[last], plain[last], rtol=1e-5, atol=1e-6)


def test_the_bias_update_moves_the_routers_own_buffers_against_the_load() -> None:
    model = rewire(tiny_model("deepseek_v3"), "farskip")
    balancer = balance_model(model, aux_coefficient=0.0, bias_rate=0.5, launch_sum=alone)
    assert balancer is not None
    before = {name: b.clone() for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")}
    run_backward(model, token_ids(2, 12))
    counts = {layer: load.clone() for layer, load in balancer._counts.items()}
    shown = balancer.update()
    assert sorted(counts) == [1, 2, 3]
    for layer, load_E in counts.items():
        assert int(load_E.sum()) == 2 * 12 * TOP_K
        name = f"model.layers.{layer}.mlp.gate.e_score_correction_bias"
        moved_E = dict(model.named_buffers())[name] - before[name]
        expected_E = 0.5 * torch.sign(load_E.double().mean() - load_E)
        torch.testing.assert_close(moved_E.double(), expected_E.double(), rtol=1e-5, atol=1e-6)
    busiest = max(float(load.max()) * NUM_EXPERTS / (2 * 12 * TOP_K) for load in counts.values())
    assert shown["balance/max_load"] == pytest.approx(busiest)


def test_evaluation_is_not_counted() -> None:
    model = rewire(tiny_model("deepseek_v3"), "farskip")
    balancer = balance_model(model, aux_coefficient=0.0, bias_rate=0.5, launch_sum=alone)
    assert balancer is not None
    with torch.no_grad():
        model(token_ids(2, 12))
    assert balancer.update() == {}


def test_a_bias_update_needs_a_bias() -> None:
    model = rewire(tiny_model("qwen3_moe"), "farskip")
    with pytest.raises(ValueError, match=r"bias_rate=0\.1: the routers of this model have no selection bias"):
        balance_model(model, aux_coefficient=0.0, bias_rate=0.1, launch_sum=alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_experts(family: str) -> None:
    dense = {"qwen3_moe": {"mlp_only_layers": [0, 1, 2, 3]}, "deepseek_v3": {"first_k_dense_replace": 4}}[family]
    model = rewire(tiny_model(family, **dense), "farskip")
    with pytest.raises(ValueError, match="the model has no routed experts"):
        balance_model(model, aux_coefficient=0.1, bias_rate=0.0, launch_sum=alone)


@pytest.mark.parametrize("capacity", [1, 3, 1000])
def test_what_a_capacity_drops_is_reported(capacity: int) -> None:
    """Counted by hand from the routers' choices; evaluation does not count, and other metrics stay."""
    model = rewire(tiny_model("deepseek_v3"), "farskip")
    family = family_of_model(model)
    dispatcher = AllToAllDispatcher(FakeLink(), NUM_EXPERTS, capacity=capacity)
    executor = Executor(
        [family.sub_blocks(layer) for layer in layers_of(model)], wiring_of(model), dispatcher=dispatcher
    )
    attach(model, executor)
    balancer = balance_model(model, aux_coefficient=0.0, bias_rate=0.5, launch_sum=alone)
    assert balancer is not None
    sum_alone = SingleProcess(model).sum_over_processes
    report = DroppedRows(dispatcher, balancer, sum_alone)
    report.set_scale(1.0)
    with torch.no_grad():
        model(token_ids(2, 12))
    run_backward(model, token_ids(2, 12), use_cache=False)
    loads = list(balancer._counts.values())
    dropped = sum(int((load_E - capacity).clamp(min=0).sum()) for load_E in loads)
    metrics = report.update()
    assert metrics["dispatch/dropped_share"] == pytest.approx(dropped / (3 * 2 * 12 * TOP_K))
    assert (dropped > 0) == (capacity < 1000)
    assert "balance/max_load" in metrics
    assert DroppedRows(dispatcher, None, sum_alone).update() == {"dispatch/dropped_share": 0.0}


def balanced_step(tp: int, ep: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, float]]:
    """Gate gradients, biases and metrics of one step with both kinds of balancing, on four sequences."""
    model, ids = rewire(tiny_model("deepseek_v3"), "ladder"), token_ids(4, 8)
    ranks: Any = SingleProcess(model)
    if tp > 1:
        mesh = build_mesh(ep, tp=tp)
        attachment = attachment_of(parallelize(model, mesh))
        assert attachment is not None
        parameters, layout = dict(model.named_parameters()), attachment.tensor_layout
        ranks = DataParallel(mesh, parameters, sharded=attachment.sharded_experts, layout=layout)
    balancer = balance_model(model, aux_coefficient=0.5, bias_rate=0.01, launch_sum=ranks.launch_sum_over_processes)
    assert balancer is not None
    balancer.set_scale(1.0)
    next_token_loss(model(ids, use_cache=False).logits, ids).backward()
    ranks.reduce_gradients()
    gates = {name: gradient for name, gradient in gradients(model).items() if name.endswith("gate.weight")}
    metrics = balancer.update()
    return gates, {name: b for name, b in model.named_buffers() if name.endswith("correction_bias")}, metrics


@pytest.mark.parametrize("ep", [1, 2])
def test_ranks_that_share_tensors_balance_as_one(ep: int, rank_pool: "RankPool") -> None:
    """Each routes its share of the same tokens: counts are those of all shares, and biases stay equal."""
    gates, biases, metrics = balanced_step(1, 1)
    for found_gates, found_biases, found_metrics in rank_pool.run(balanced_step, 2, 2, ep):
        assert_close(found_gates, gates, rel_norm=1e-4)
        assert_equal_bits(found_biases, biases)
        assert found_metrics == pytest.approx(metrics)
