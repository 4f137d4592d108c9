"""Does backward reach what an attention core was given? Asked of cores that are not torch's own.

Some flash kernels are made for inference: they return a tensor without a backward, or take the attention sinks and give
them no gradient. Training would go on, and treat what is lost as a constant.
"""

from collections.abc import Mapping

import torch
from torch.autograd.graph import Node, get_gradient_edge


def refuse_lost_gradients(
    name: str, output: torch.Tensor, inputs: Mapping[str, torch.Tensor | None], *, needed: tuple[str, ...]
) -> None:
    """Look at the graph between an attention core's inputs and its output.

    Args:
        name: of the attention implementation.
        output: what the core returned.
        inputs: all tensors with a gradient that it was given, by name: the look ends at them.
        needed: names of those that the output has to depend on.

    Raises:
        RuntimeError: it does not depend on one of them that wants a gradient.
    """
    wanting = {each: tensor for each, tensor in inputs.items() if tensor is not None and tensor.requires_grad}
    nodes = {each: get_gradient_edge(tensor).node for each, tensor in wanting.items()}
    reached = _reached(output, set(nodes.values()))
    for each in needed:
        if each in nodes and nodes[each] not in reached:
            raise RuntimeError(
                f"attention implementation {name!r} computes no gradient of its {each}: train with eager, or "
                "freeze what it depends on"
            )


def _reached(output: torch.Tensor, ends: set[Node]) -> set[Node]:
    """The nodes from which the output was computed, up to these ends."""
    reached: set[Node] = set()
    waiting = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in reached:
            continue
        reached.add(node)
        if node not in ends:
            waiting += [before for before, _ in node.next_functions]
    return reached
