"""Load balancing attached to a model: its executor's routing hook, with the family's score function and biases."""

from typing import Any

from farskip.balance import RouterBalance, SumOverRanks
from farskip.models.attach import attachment_of, layers_of
from farskip.models.family import family_of_model


def balance_model(
    model: Any, *, aux_coefficient: float, bias_rate: float, sum_over_ranks: SumOverRanks
) -> RouterBalance | None:
    """Attach load balancing to a rewired or parallel model.

    Args:
        model: a model that farskip is attached to.
        aux_coefficient: weight of the auxiliary loss; 0: off.
        bias_rate: step of the bias update; 0: off.
        sum_over_ranks: sums a tensor over all ranks.

    Returns:
        The balancer; None when both are off.

    Raises:
        ValueError: a bias update for routers without a bias, or a model without experts.
    """
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
        sum_over_ranks=sum_over_ranks,
    )
    attachment.executor.routing_hook = balance
    return balance
