"""Load balancing of routers: an auxiliary loss, and the bias update that needs no loss.

Auxiliary loss, per layer, over all T tokens of all ranks in the micro-batch, with f_e the number of times expert e was
chosen and P_te the router's probabilities:

    loss = E * coefficient / (K * T^2) * sum_e f_e * sum_t P_te

f is counted over all ranks and is a constant; so the gradient on k ranks is that on one rank with the whole batch. It
is injected by an identity node on the routing weights, so that it also works inside a recomputed segment.

Bias update, after each optimizer step, where the router has a selection bias:

    bias_e += rate * sign(mean_e'(f_e') - f_e)

Legend: T tokens, E experts, K chosen experts per token.

Source: Switch Transformer (arXiv 2101.03961) section 2.2; auxiliary-loss-free balancing (arXiv 2408.15664).
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from farskip.stage import Routing

SumOverRanks = Callable[[torch.Tensor], torch.Tensor]


class RouterBalance:
    """The routing hook of an executor (`Executor.routing_hook`) and the balancer of a training loop.

    Args:
        num_experts: E.
        aux_coefficient: weight of the auxiliary loss; 0 switches it off.
        bias_rate: step of the bias update; 0 switches it off.
        biases: the selection bias [E] of each router that has one, by layer.
        score: the router's score function, ``softmax`` or ``sigmoid``.
        sum_over_ranks: sums a tensor over all ranks that share the batch; a collective.

    Raises:
        ValueError: a bias update was asked for and no router has a bias.
    """

    def __init__(
        self,
        *,
        num_experts: int,
        aux_coefficient: float,
        bias_rate: float,
        biases: Mapping[int, torch.Tensor],
        score: str,
        sum_over_ranks: SumOverRanks,
    ) -> None:
        if bias_rate and not biases:
            raise ValueError(
                f"balance.bias_rate={bias_rate}: the routers of this model have no selection bias; set it to 0"
            )
        self._num_experts = num_experts
        self._aux_coefficient = aux_coefficient
        self._bias_rate = bias_rate
        self._biases = biases
        self._score = score
        self._sum = sum_over_ranks
        self._scale = 1.0
        self._counts: dict[int, torch.Tensor] = {}
        self._losses: list[torch.Tensor] = []

    def set_scale(self, scale: float) -> None:
        """The share of the coming micro-batch in the step; all shares of a step add up to 1."""
        self._scale = scale

    def __call__(self, layer: int, routing: Routing, recomputing: bool) -> Routing:
        """See `farskip.executor.RoutingHook`. A collective when the auxiliary loss is on."""
        if not torch.is_grad_enabled():
            return routing
        local_E = torch.bincount(routing.experts_TK.reshape(-1), minlength=self._num_experts)
        if not recomputing:
            self._counts[layer] = self._counts.get(layer, torch.zeros_like(local_E)) + local_E
        if not self._aux_coefficient:
            return routing
        loss = self._aux_loss(routing, self._sum(local_E.double()))
        if not recomputing:
            self._losses.append(loss.detach() * self._scale)
        weights_TK = _AddLoss.apply(routing.weights_TK, loss * self._scale)
        return replace(routing, weights_TK=weights_TK)

    def update(self) -> dict[str, float]:
        """After an optimizer step: move the biases. Returns what is to be logged. A collective.

        Returns:
            ``balance/max_load``: the busiest expert's tokens over the mean, the worst layer's; 1 is perfect.
            ``balance/aux_loss`` where the auxiliary loss is on.
        """
        metrics: dict[str, float] = {}
        if self._counts:
            layers = sorted(self._counts)
            counts_LE = self._sum(torch.stack([self._counts[layer] for layer in layers]).double())
            mean_L1 = counts_LE.mean(dim=1, keepdim=True)
            metrics["balance/max_load"] = float((counts_LE / mean_L1.clamp(min=1)).max())
            if self._bias_rate:
                for row, layer in enumerate(layers):
                    if layer in self._biases:
                        step_E = self._bias_rate * torch.sign(mean_L1[row] - counts_LE[row])
                        self._biases[layer].add_(step_E.to(self._biases[layer].dtype))
        if self._losses:
            metrics["balance/aux_loss"] = float(self._sum(torch.stack(self._losses).sum().double()))
        self._counts, self._losses = {}, []
        return metrics

    def _aux_loss(self, routing: Routing, counts_E: torch.Tensor) -> torch.Tensor:
        """This rank's part of the loss; the parts of all ranks add up to the whole."""
        assert routing.logits_TE is not None, "this router balances its experts itself"
        logits_TE = routing.logits_TE.float()
        if self._score == "softmax":
            probabilities_TE = logits_TE.softmax(dim=-1)
        else:
            scores_TE = logits_TE.sigmoid()
            probabilities_TE = scores_TE / (scores_TE.sum(dim=-1, keepdim=True) + 1e-20)
        top_k = routing.experts_TK.shape[1]
        num_tokens = counts_E.sum() / top_k
        factor_E = (self._num_experts * self._aux_coefficient / (top_k * num_tokens.square())) * counts_E
        return (factor_E.float() * probabilities_TE.sum(dim=0)).sum()


class _AddLoss(torch.autograd.Function):
    """The identity on a tensor that the main loss depends on; in backward also the gradient of an added loss."""

    @staticmethod
    def forward(ctx: Any, carrier: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(torch.ones_like(loss))
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (one,) = ctx.saved_tensors
        return gradient, one
