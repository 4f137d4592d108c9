"""Load balancing of routers: an auxiliary loss, and the bias update that needs no loss.

Auxiliary loss, per layer, over all T tokens of all ranks in the micro-batch, with f_e the number of times expert e was
chosen and P_te the router's probabilities:

    loss = E * coefficient / (K * T^2) * sum_e f_e * sum_t P_te

f is counted over all ranks and is a constant; so the gradient on k ranks is that on one rank with the whole batch. It
is injected by an identity node on the routing weights, so that it also works inside a recomputed segment. The counts of
all ranks enter backward only, so their sum is launched in forward and waited for there.

Bias update, after each optimizer step, where the router has a selection bias:

    bias_e += rate * sign(mean_e'(f_e') - f_e)

Legend: T tokens, E experts, K chosen experts per token.

Source: Switch Transformer (arXiv 2101.03961) section 2.2; auxiliary-loss-free balancing (arXiv 2408.15664).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from farskip.pending import Pending
from farskip.stage import Routing

LaunchSum = Callable[[torch.Tensor], Pending]


class RouterBalance:
    """The routing hook of an executor (`Executor.routing_hook`) and the balancer of a training loop.

    Args:
        num_experts: E.
        aux_coefficient: weight of the auxiliary loss; 0 switches it off.
        bias_rate: step of the bias update; 0 switches it off.
        biases: the selection bias [E] of each router that has one, by layer.
        score: the router's score function, ``softmax`` or ``sigmoid``.
        launch_sum: starts summing a tensor over all ranks that share the batch, in place; a collective.

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
        launch_sum: LaunchSum,
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
        self._launch_sum = launch_sum
        self._scale = 1.0
        self._counts: dict[int, torch.Tensor] = {}
        self._losses: list[_LossPart] = []

    def set_scale(self, scale: float) -> None:
        """The share of the coming micro-batch in the step; all shares of a step add up to 1."""
        self._scale = scale

    def __call__(self, layer: int, routing: Routing, recomputing: bool) -> Routing:
        """See `farskip.executor.RoutingHook`. Launches a collective when the auxiliary loss is on, once per forward
        pass: what a recomputation makes is not what backward runs through."""
        if not torch.is_grad_enabled():
            return routing
        local_E = _counts(routing.experts_TK, self._num_experts)
        if not recomputing:
            self._counts[layer] = self._counts.get(layer, torch.zeros_like(local_E)) + local_E
        if not self._aux_coefficient:
            return routing
        mass_E, part = self._probability_mass(routing), None
        if not recomputing:
            part = _LossPart(
                counts=self._launch_sum(local_E.double()),
                mass_E=mass_E.detach(),
                top_k=routing.experts_TK.shape[1],
                coefficient=self._num_experts * self._aux_coefficient,
                scale=self._scale,
            )
            self._losses.append(part)
        return replace(routing, weights_TK=_AddLoss.apply(routing.weights_TK, mass_E, part))

    def update(self) -> dict[str, float]:
        """After an optimizer step: move the biases. Returns what is to be logged. A collective.

        Returns:
            ``balance/max_load``: the busiest expert's tokens over the mean, the worst layer's; 1 is perfect.
            ``balance/aux_loss`` where the auxiliary loss is on.
        """
        metrics: dict[str, float] = {}
        if self._counts:
            layers = sorted(self._counts)
            counts_LE = self._launch_sum(torch.stack([self._counts[layer] for layer in layers]).double()).wait()
            mean_L1 = counts_LE.mean(dim=1, keepdim=True)
            metrics["balance/max_load"] = float((counts_LE / mean_L1.clamp(min=1)).max())
            if self._bias_rate:
                for row, layer in enumerate(layers):
                    if layer in self._biases:
                        step_E = self._bias_rate * torch.sign(mean_L1[row] - counts_LE[row])
                        self._biases[layer].add_(step_E.to(self._biases[layer].dtype))
        if self._losses:
            losses = torch.stack([part.value() for part in self._losses])
            metrics["balance/aux_loss"] = float(self._launch_sum(losses.sum().double()).wait())
        self._counts, self._losses = {}, []
        return metrics

    def _probability_mass(self, routing: Routing) -> torch.Tensor:
        """Sum over this rank's tokens of each expert's probability, [E]."""
        assert routing.logits_TE is not None, "this router balances its experts itself"
        logits_TE = routing.logits_TE.float()
        if self._score == "softmax":
            probabilities_TE = logits_TE.softmax(dim=-1)
        else:
            scores_TE = logits_TE.sigmoid()
            probabilities_TE = scores_TE / (scores_TE.sum(dim=-1, keepdim=True) + 1e-20)
        return probabilities_TE.sum(dim=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class _LossPart:
    """This rank's part of the auxiliary loss of a layer and micro-batch; the parts of all ranks add up to the whole.

    The counts are on their way from all ranks. Forward needs none of them; backward and the log wait for them.
    """

    counts: Pending
    mass_E: torch.Tensor
    top_k: int
    coefficient: float
    scale: float

    def factor_E(self) -> torch.Tensor:
        """The gradient of the unscaled loss with respect to the mass of probability."""
        counts_E = self.counts.wait()
        num_tokens = counts_E.sum() / self.top_k
        return ((self.coefficient / (self.top_k * num_tokens.square())) * counts_E).float()

    def value(self) -> torch.Tensor:
        """The loss."""
        return (self.factor_E() * self.mass_E).sum() * self.scale


def _counts(experts_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """How often each expert was chosen, int64 [E]. Not by bincount, for whose size on CUDA the host waits."""
    chosen_R = experts_TK.reshape(-1).long()
    return chosen_R.new_zeros(num_experts).scatter_add_(0, chosen_R, torch.ones_like(chosen_R))


class _AddLoss(torch.autograd.Function):
    """The identity on a tensor that the main loss depends on; in backward also the gradient of an added loss."""

    @staticmethod
    def forward(ctx: Any, carrier: torch.Tensor, mass_E: torch.Tensor, part: _LossPart | None) -> torch.Tensor:
        ctx.part = part
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        assert ctx.part is not None, "backward runs through a recomputation"
        return gradient, ctx.part.factor_E() * ctx.part.scale, None
