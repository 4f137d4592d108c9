"""Load balancing: the closed form of the auxiliary loss, k ranks equal one, recomputation counts once, bias update."""

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist

from farskip.balance import LaunchSum, RouterBalance
from farskip.models.attach import attachment_of
from farskip.models.parallelize import parallelize
from farskip.models.surgery import rewire
from farskip.models.testing_models import gradients, next_token_loss, tiny_model, token_ids
from farskip.parallel.data_parallel import DataParallel
from farskip.parallel.mesh import build_mesh
from farskip.parallel.testing_links import poison
from farskip.pending import Pending
from farskip.stage import Routing
from farskip.testing import assert_close, assert_equal_bits

if TYPE_CHECKING:
    from farskip.testing import RankPool

EXPERTS, TOP_K, COEFFICIENT = 5, 2, 0.3


def of_one_rank(tensor: torch.Tensor) -> Pending:
    """The sum over one rank."""
    return Pending(tensor, None)


def balance(**changes: Any) -> RouterBalance:
    arguments = {
        "num_experts": EXPERTS,
        "aux_coefficient": COEFFICIENT,
        "bias_rate": 0.0,
        "biases": {},
        "score": "softmax",
        "launch_sum": of_one_rank,
    }
    return RouterBalance(**{**arguments, **changes})


def routing_of(logits_TE: torch.Tensor) -> Routing:
    weights_TK, experts_TK = logits_TE.softmax(-1).topk(TOP_K)
    return Routing(logits_TE=logits_TE, weights_TK=weights_TK, experts_TK=experts_TK)


def closed_form(logits_TE: torch.Tensor, experts_TK: torch.Tensor, score: str) -> torch.Tensor:
    """E * coefficient / (K * T^2) * sum_e f_e * sum_t P_te, with loops, in fp64."""
    scores_TE = logits_TE.softmax(-1) if score == "softmax" else logits_TE.sigmoid()
    probabilities_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
    tokens = logits_TE.shape[0]
    total = torch.zeros((), dtype=torch.float64)
    for expert in range(EXPERTS):
        chosen = sum(int(expert in row) for row in experts_TK.tolist())
        total = total + chosen * probabilities_TE[:, expert].sum()
    return EXPERTS * COEFFICIENT / (TOP_K * tokens**2) * total


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_loss_and_its_gradient_are_the_closed_form(score: str, scale: float) -> None:
    """Tolerance: the loss is formed in fp32, as router maths is."""
    logits_TE = torch.randn(11, EXPERTS, dtype=torch.float64, requires_grad=True)
    hook = balance(score=score)
    hook.set_scale(scale)
    routed = hook(0, routing_of(logits_TE), False)
    (routed.weights_TK * 0.0).sum().backward()
    expected = scale * closed_form(logits_TE, routed.experts_TK, score)
    (gradient,) = torch.autograd.grad(expected, logits_TE)
    assert logits_TE.grad is not None
    assert_close(logits_TE.grad, gradient, rel_norm=1e-6)
    assert hook.update()["balance/aux_loss"] == pytest.approx(float(expected.detach()), rel=1e-6)


def test_perfect_balance_costs_the_coefficient() -> None:
    experts_TK = torch.tensor([[expert, (expert + 1) % EXPERTS] for expert in range(EXPERTS)])
    routing = Routing(
        logits_TE=torch.zeros(5, EXPERTS), weights_TK=torch.ones(5, 2, requires_grad=True), experts_TK=experts_TK
    )
    hook = balance()
    hook(0, routing, False)
    metrics = hook.update()
    assert metrics["balance/aux_loss"] == pytest.approx(COEFFICIENT)
    assert metrics["balance/max_load"] == pytest.approx(1.0)


def test_the_weights_pass_through_in_bits_with_their_own_gradient() -> None:
    logits_TE = torch.randn(7, EXPERTS)
    weights_TK = torch.rand(7, TOP_K, requires_grad=True)
    routing = Routing(logits_TE=logits_TE, weights_TK=weights_TK, experts_TK=logits_TE.topk(TOP_K)[1])
    routed = balance()(0, routing, False)
    assert_equal_bits(routed.weights_TK, weights_TK)
    upstream = torch.randn(7, TOP_K)
    (routed.weights_TK * upstream).sum().backward()
    assert weights_TK.grad is not None
    assert_equal_bits(weights_TK.grad, upstream)


def test_evaluation_is_not_counted() -> None:
    hook, routing = balance(), routing_of(torch.randn(7, EXPERTS))
    with torch.no_grad():
        assert hook(0, routing, False) is routing
    assert hook.update() == {}


def test_the_counts_of_all_ranks_are_on_their_way_until_backward() -> None:
    """Forward waits for nothing, a recomputation sends nothing, and the bits are those of counts that are there."""
    log: list[str] = []

    class Late:
        def __init__(self, buffer: torch.Tensor) -> None:
            self.buffer, self.arrives = buffer, buffer.clone()
            poison(buffer)
            log.append("launch")

        def wait(self) -> object:
            log.append("wait")
            return self.buffer.copy_(self.arrives)

    found = []
    for launch_sum in (of_one_rank, lambda tensor: Pending(tensor, Late(tensor))):
        logits_TE = torch.randn(9, EXPERTS, generator=torch.Generator().manual_seed(0)).requires_grad_()
        hook = balance(launch_sum=launch_sum)
        hook.set_scale(0.3)
        routed = hook(0, routing_of(logits_TE), False)
        assert log in ([], ["launch"])
        hook(0, routing_of(logits_TE), True)
        assert log in ([], ["launch"])
        (routed.weights_TK * 0.0).sum().backward()
        assert log in ([], ["launch", "wait"])
        assert logits_TE.grad is not None
        shown = hook.update()
        found.append({"gradient": logits_TE.grad, "shown": torch.tensor(shown["balance/aux_loss"])})
    assert log == ["launch", "wait"] * 3, "the loads and the loss are summed at the end of a step"
    assert_equal_bits(found[1], found[0])


def test_a_recomputation_counts_nothing_again() -> None:
    counts = []
    for recomputing in (False, True):
        hook, generator = balance(), torch.Generator().manual_seed(0)
        hook(0, routing_of(torch.randn(7, EXPERTS, generator=generator)), False)
        if recomputing:  # other tokens, so that they would show
            hook(0, routing_of(torch.randn(7, EXPERTS, generator=generator)), True)
        counts.append(hook.update())
    assert counts[0] == counts[1]


def test_the_bias_rises_where_tokens_are_missing() -> None:
    bias = torch.zeros(EXPERTS)
    hook = balance(aux_coefficient=0.0, bias_rate=0.01, biases={3: bias})
    experts_TK = torch.tensor([[0, 1], [0, 1], [0, 2], [0, 3], [0, 2]])  # loads 5 2 2 1 0, mean 2
    hook(3, Routing(logits_TE=torch.zeros(5, EXPERTS), weights_TK=torch.ones(5, 2), experts_TK=experts_TK), False)
    metrics = hook.update()
    assert torch.allclose(bias, torch.tensor([-0.01, 0.0, 0.0, 0.01, 0.01]))
    assert metrics == {"balance/max_load": 2.5}
    hook.update()
    assert torch.allclose(bias, torch.tensor([-0.01, 0.0, 0.0, 0.01, 0.01])), "a step without tokens moves nothing"


def test_a_bias_update_without_a_bias_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"bias_rate=0\.1: the routers of this model have no selection bias; set it to 0"
    ):
        balance(bias_rate=0.1)


# -- on models --------------------------------------------------------------------------------------------------------


def attached(model: Any, launch_sum: LaunchSum, **changes: Any) -> RouterBalance:
    biases = {layer: model.model.layers[layer].mlp.gate.e_score_correction_bias for layer in (1, 2, 3)}
    hook = balance(num_experts=8, score="sigmoid", bias_rate=0.01, biases=biases, launch_sum=launch_sum, **changes)
    attachment = attachment_of(model)
    assert attachment is not None
    attachment.executor.routing_hook = hook
    return hook


def step(model: Any, hook: RouterBalance, ids: torch.Tensor, num_targets: int) -> None:
    for part in ids.split(2):  # accumulation: micro-batches of two sequences
        hook.set_scale(2 / ids.shape[0])
        next_token_loss(model(part, use_cache=False).logits, part, num_targets).backward()


@pytest.mark.parametrize("checkpoint_layers", [1, 2, 4])
def test_the_gradient_is_injected_once_under_recomputation(checkpoint_layers: int) -> None:
    found = []
    for recompute in (False, True):
        model = rewire(tiny_model("deepseek_v3"), "farskip")
        hook = attached(model, of_one_rank)
        if recompute:
            model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=lambda *_: None)
            attachment_of(model).checkpoint_layers = checkpoint_layers  # type: ignore[union-attr]
        step(model, hook, token_ids(4, 6), 20)
        found.append((gradients(model), hook.update()))
    assert_close(found[1][0], found[0][0], rel_norm=1e-4)  # DESIGN.md 4
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-5)


def one_step_on_ranks(ep: int, mode: str) -> None:
    """Two sequences per rank; the auxiliary loss of a micro-batch is that of the batch of all ranks together."""
    rank, world = dist.get_rank(), dist.get_world_size()
    ids = token_ids(2 * world, 6)
    mesh = build_mesh(ep)
    model = parallelize(rewire(tiny_model("deepseek_v3"), "farskip"), mesh, mode)
    attachment = attachment_of(model)
    assert attachment is not None
    data_parallel = DataParallel(mesh, dict(model.named_parameters()), sharded=attachment.sharded_experts)
    hook = attached(model, data_parallel.launch_sum_over_processes)
    mine = ids[2 * rank :][:2]
    next_token_loss(model(mine, use_cache=False).logits, mine, 5 * len(ids)).backward()
    data_parallel.reduce_gradients()
    ours, metrics = gradients(model), hook.update()
    one = rewire(tiny_model("deepseek_v3"), "farskip")
    alone = attached(one, of_one_rank)
    next_token_loss(one(ids, use_cache=False).logits, ids, 5 * len(ids)).backward()
    expected = {
        name: gradient.chunk(ep)[rank % ep] if name in attachment.sharded_experts else gradient
        for name, gradient in gradients(one).items()
    }
    assert_close(ours, expected, rel_norm=1e-4)  # DESIGN.md 4
    theirs = alone.update()
    assert metrics == pytest.approx(theirs, rel=1e-5)
    assert_equal_bits(dict(model.named_buffers()), dict(one.named_buffers()))


@pytest.mark.parametrize("mode", ["serial", "overlapped"])
@pytest.mark.parametrize(("world", "ep"), [(2, 1), (2, 2), (4, 2)])
def test_k_ranks_balance_as_one(world: int, ep: int, mode: str, rank_pool: "RankPool") -> None:
    rank_pool.run(one_step_on_ranks, world, ep, mode)
