"""Load balancing attached to a model: its executor's routing hook, with the family's score function and biases."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from farskip.balance import LaunchSum, RouterBalance
from farskip.models.attach import attachment_of, layers_of
from farskip.models.family import family_of_model
from farskip.parallel.dispatcher import AllToAllDispatcher
from farskip.training_protocols import Balancer


def balance_model(
    model: Any, *, aux_coefficient: float, bias_rate: float, launch_sum: LaunchSum
) -> RouterBalance | None:
    """Attach load balancing to a rewired or parallel model.

    Args:
        model: a model that farskip is attached to.
        aux_coefficient: weight of the auxiliary loss; 0: off.
        bias_rate: step of the bias update; 0: off.
        launch_sum: starts summing a tensor over all ranks, in place.

    Returns:
        The balancer; None when both are off.

    Raises:
        ValueError: a weight or step below 0, a bias update for routers without a bias, or a model without experts.
    """
    for key, value in (("aux_coefficient", aux_coefficient), ("bias_rate", bias_rate)):
        if not 0 <= value < math.inf:
            raise ValueError(f"balance.{key}={value} makes no sense; use 0 or more")
    if not aux_coefficient and not bias_rate:
        return None
    family, attachment = family_of_model(model), attachment_of(model)
    assert attachment is not None, "balance_model comes after rewire or parallelize"
    blocks = [family.sub_blocks(layer) for layer in layers_of(model)]
    routed = {layer: block for layer, block in enumerate(blocks) if block.experts is not None}
    biases = {layer: block.selection_bias for layer, block in routed.items()}
    num_experts = max((int(block.gate.num_experts) for block in routed.values()), default=0)
    if not num_experts:
        raise ValueError("balance: the model has no routed experts; set balance.aux_coefficient and bias_rate to 0")
    balance = RouterBalance(
        num_experts=num_experts,
        aux_coefficient=aux_coefficient,
        bias_rate=bias_rate,
        biases={layer: bias for layer, bias in biases.items() if bias is not None},
        score=family.score,
        launch_sum=launch_sum,
    )
    attachment.executor.routing_hook = balance
    return balance


class DroppedRows:
    """Reports what a dispatcher with a capacity drops, besides what a balancer reports. Itself a `Balancer`.

    Args:
        dispatcher: the one with the capacity.
        balancer: the router's balancer, if there is one.
        sum_over_ranks: sums a tensor over all ranks.
        device: where such a tensor has to lie.
    """

    def __init__(
        self,
        dispatcher: AllToAllDispatcher,
        balancer: Balancer | None,
        sum_over_ranks: Callable[[torch.Tensor], torch.Tensor],
        *,
        device: str | torch.device = "cpu",
    ) -> None:
        self._device = device
        self._dispatcher = dispatcher
        self._balancer = balancer
        self._sum = sum_over_ranks

    def set_scale(self, scale: float) -> None:
        """See `Balancer.set_scale`."""
        if self._balancer is not None:
            self._balancer.set_scale(scale)

    def update(self) -> Mapping[str, float]:
        """See `Balancer.update`; adds ``dispatch/dropped_share``, dropped rows over all rows. A collective."""
        metrics = dict(self._balancer.update()) if self._balancer is not None else {}
        counts = torch.tensor(self._dispatcher.take_dropped(), dtype=torch.float64, device=self._device)
        dropped, total = self._sum(counts).tolist()
        metrics["dispatch/dropped_share"] = dropped / total if total else 0.0
        return metrics
