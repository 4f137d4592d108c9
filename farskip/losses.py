"""Token losses that never hold the logits of a whole batch: cross entropy and the machinery shared with distillation.

Decides: how a loss over a large vocabulary is cut into chunks of positions. Each chunk's logits are computed once,
turned into the chunk's loss and at once into the gradient of the hidden states and of the head, and dropped before the
next chunk starts. Backward then only scales the stored gradients, so the head is never computed a second time and the
memory for logits is one chunk's, forward and backward. The price is one extra buffer as large as the head's weight
while the step runs.

Refuses: to average. Every loss here is a sum; whoever knows how many positions the whole step has (all ranks, all
accumulated micro-batches) divides.

Legend: T positions, C positions of one chunk, D hidden size, V vocabulary, M values per position (value 0 is what is
trained on).
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from farskip.batch import IGNORED_LABEL

Head = Callable[[Tensor], Tensor]
"""Hidden states [C, D] to logits [C, V]."""

ChunkValues = Callable[[Tensor, slice], Tensor]
"""Logits [C, V] and the rows they belong to -> values [C, M], column 0 differentiable in the logits."""


def token_cross_entropy(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    """Negative log-likelihood of each label, in fp32 (fp64 logits stay fp64).

    Args:
        logits_TV: [T, V], any float dtype.
        labels_T: int64 [T]; positions with ``IGNORED_LABEL`` get the value 0.

    Returns:
        [T], differentiable in the logits.
    """
    log_q_TV = torch.log_softmax(upcast(logits_TV), dim=-1)
    is_labeled_T = labels_T != IGNORED_LABEL
    safe_labels_T = torch.where(is_labeled_T, labels_T, 0)
    picked_T = log_q_TV.gather(-1, safe_labels_T[:, None]).squeeze(-1)
    return torch.where(is_labeled_T, -picked_T, torch.zeros_like(picked_T))


def upcast(logits_TV: Tensor) -> Tensor:
    """The logits in the precision that softmax maths is done in: fp32, or fp64 where they already are."""
    return logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))


def chunked_cross_entropy(
    hidden_TD: Tensor, labels_T: Tensor, head: Head, *, chunk_tokens: int
) -> tuple[Tensor, Tensor]:
    """Cross entropy of a language-model head, summed over the labeled positions.

    Args:
        hidden_TD: hidden states after the final norm.
        labels_T: int64, ``IGNORED_LABEL`` where a position is not trained on.
        head: maps [C, D] to logits [C, V]; its parameters get their gradients, tied to the embedding or not.
        chunk_tokens: positions per chunk, at least 1.

    Returns:
        The sum (0-d fp64, differentiable in the hidden states and the head's parameters) and the values per position
        ([T, 1], detached).
    """

    def values(logits_CV: Tensor, rows: slice) -> Tensor:
        return token_cross_entropy(logits_CV, labels_T[rows])[:, None]

    return chunked_loss(hidden_TD, head, values, chunk_tokens=chunk_tokens)


def chunked_loss(
    hidden_TD: Tensor, head: Head, chunk_values: ChunkValues, *, chunk_tokens: int
) -> tuple[Tensor, Tensor]:
    """Sum of ``chunk_values``' column 0 over all positions, computed chunk by chunk.

    The head's parameters are found in the autograd graph of its first chunk. With gradients off, or nothing that needs
    one, only values are computed.

    Args:
        hidden_TD: hidden states after the final norm.
        head: maps [C, D] to logits [C, V]. It is called once per chunk and must build its graph inside the call.
        chunk_values: the loss of one chunk.
        chunk_tokens: positions per chunk, at least 1.

    Returns:
        The sum (0-d fp64) and all values ([T, M], detached).

    Raises:
        ValueError: on a chunk size below 1 or hidden states that are not [T, D].

    Note: the gradient is first order only: it is computed here, not in backward.
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}, it must be at least 1")
    if hidden_TD.ndim != 2:
        raise ValueError(f"hidden states have shape {tuple(hidden_TD.shape)}, expected [positions, hidden size]")
    hidden_grad_TD = torch.zeros_like(hidden_TD) if torch.is_grad_enabled() and hidden_TD.requires_grad else None
    parameters: list[Tensor] = []
    parameter_grads: list[Tensor] = []
    value_chunks: list[Tensor] = []
    for rows in _chunks(hidden_TD.shape[0], chunk_tokens):
        hidden_CD = hidden_TD.detach()[rows].requires_grad_(hidden_grad_TD is not None)
        values_CM = chunk_values(head(hidden_CD), rows)
        if values_CM.requires_grad:
            if not value_chunks:
                parameters = [leaf for leaf in _leaves(values_CM) if leaf is not hidden_CD]
                # Sums over chunks in at least fp32: bf16 weights would lose the small chunks.
                parameter_grads = [upcast(torch.zeros_like(parameter)) for parameter in parameters]
            targets = [*([hidden_CD] if hidden_grad_TD is not None else []), *parameters]
            # The backward of an autocast forward runs outside autocast.
            with torch.autocast(hidden_TD.device.type, enabled=False):
                gradients = list(torch.autograd.grad(values_CM[:, 0].sum(), targets))
            if hidden_grad_TD is not None:
                hidden_grad_TD[rows] = gradients.pop(0)
            for total, gradient in zip(parameter_grads, gradients, strict=True):
                total += gradient
        value_chunks.append(values_CM.detach())
    values_TM = torch.cat(value_chunks)
    total_loss = values_TM[:, 0].sum(dtype=torch.float64)
    inputs = [*([hidden_TD] if hidden_grad_TD is not None else []), *parameters]
    if not inputs:
        return total_loss, values_TM
    stored = [*([hidden_grad_TD] if hidden_grad_TD is not None else []), *parameter_grads]
    attached = _AttachGradients.apply(total_loss, stored, *inputs)
    assert isinstance(attached, Tensor), "one output"
    return attached, values_TM


def _chunks(num_positions: int, chunk_tokens: int) -> Iterator[slice]:
    # No position is one empty chunk: the head then gets gradients that are zero, on this rank as on the others.
    for start in range(0, max(num_positions, 1), chunk_tokens):
        yield slice(start, min(start + chunk_tokens, num_positions))


def _leaves(output: Tensor) -> list[Tensor]:
    """The tensors at which gradients of ``output`` end, each once, in a fixed order."""
    found: dict[int, Tensor] = {}
    seen: set[torch.autograd.graph.Node] = set()
    stack = [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor) and leaf.is_leaf:
            found.setdefault(id(leaf), leaf)
        stack.extend(parent for parent, _ in node.next_functions)
    return list(found.values())


class _AttachGradients(torch.autograd.Function):
    """A loss whose gradients are already known: backward scales them by the incoming gradient."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, loss: Tensor, gradients: list[Tensor], *inputs: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [tensor.dtype for tensor in inputs]  # type: ignore[attr-defined]
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad_outputs[0]
        stored: tuple[Tensor, ...] = ctx.saved_tensors  # type: ignore[attr-defined]
        dtypes: list[torch.dtype] = ctx.dtypes  # type: ignore[attr-defined]
        scaled = [(gradient * scale).to(dtype) for gradient, dtype in zip(stored, dtypes, strict=True)]
        return None, None, *scaled
