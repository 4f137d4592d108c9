"""`release_router` under autograd with one alias of its norm per reader, so that its backward is one pass over memory.

Decides: the sum of the readers' gradients belongs to this node, not to autograd, and one of them may come as that of
expert rows that were copied from the alias, not yet summed per token. How they get here is the caller's business: a
placeholder goes through autograd, and `take_rows` fetches them.

Not a custom op, since a function is among its arguments: torch.compile breaks its graph here. `release_router` has the
same bits and does not.

Legend: T tokens, K experts per token, R rows, H hidden size.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from farskip.triton_kernels.add_rms_norm import as_rows
from farskip.triton_kernels.backend import choose_backend
from farskip.triton_kernels.dispatch_map import DispatchMap
from farskip.triton_kernels.release_router import (
    apply_release_router,
    apply_release_router_backward,
    check_routed,
    routed_gradients,
)

TakeRows = Callable[[Tensor], tuple[Tensor, Tensor] | None]
"""Called in backward with what autograd brought as the gradient of the second alias. Returns the gradient of the expert
rows that were copied from that alias, [R, H], and their `DispatchMap.dst`; or None if what was brought is the gradient
itself."""


def release_router_by_use(
    y: Tensor,
    s: Tensor | None,
    routed: Tensor,
    weight: Tensor,
    eps: float,
    num_uses: int,
    take_rows: TakeRows,
    *,
    dispatch: DispatchMap | None = None,
    combine_weights: Tensor | None = None,
    unit_offset: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """`release_router`, whose norm comes as one alias per reader.

    Args:
        y: As for `release_router`, and so is all that is not listed here.
        s: As `y`, or None.
        routed: Expert rows or dense.
        weight: [H].
        eps: Added to the mean square.
        num_uses: 2 for a router and expert rows, 3 with a further reader. Their gradients are added in this order.
        take_rows: See `TakeRows`; not called where autograd brings nothing.
        dispatch: The map that placed the routed rows.
        combine_weights: [T, K].
        unit_offset: Whether the gain is 1 + weight.
        backend: "reference", "triton", or None to choose by device.

    Returns:
        x' and the aliases, all as `y`.

    Raises:
        ValueError: As for `release_router`, or `num_uses` is neither.

    Note:
        The bits are those of `release_router`, of aliases whose gradients are added in order, and of `permute`. Has no
        second derivative.
    """
    if num_uses not in (2, 3):
        raise ValueError(f"num_uses {num_uses} must be 2 (router, rows) or 3 (router, rows, another reader)")
    backend = choose_backend(backend, y)
    check_routed(y, s, routed, dispatch, combine_weights, weight)
    made = _ByUse.apply(
        as_rows(y),
        None if s is None else as_rows(s),
        as_rows(routed),
        None if dispatch is None else dispatch.dst,
        None if dispatch is None else dispatch.src,
        None if combine_weights is None else combine_weights.contiguous(),
        weight.contiguous(),
        eps,
        unit_offset,
        backend,
        num_uses,
        take_rows,
    )
    return tuple(each.view(y.shape) for each in made)


class _ByUse(torch.autograd.Function):
    """The forward op, its norm handed out once per use, and the backward op."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        *of_op, num_uses, ctx.take_rows = inputs
        _y, s, routed, dst, src, combine, weight, _eps, ctx.unit_offset, ctx.backend = of_op
        x, normed, rstd = apply_release_router(*of_op)
        ctx.has_shared, ctx.rows_dtype = s is not None, routed.dtype
        kept = routed if combine is not None and ctx.needs_input_grad[5] else None
        ctx.save_for_backward(x, rstd, weight, kept, dst, src, combine)
        ctx.set_materialize_grads(False)
        return x, *(normed.detach() for _ in range(num_uses))

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_x: Tensor | None, before: Tensor | None, rows: Tensor | None, after: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        x, rstd, weight, kept, dst, src, combine = ctx.saved_tensors
        taken = None if rows is None else ctx.take_rows(rows)
        rows, rows_dst = (rows, None) if taken is None else taken
        grad, grad_weight = grad_x, None
        if before is not None or rows is not None or after is not None:
            grad_x, before, rows, after = (
                None if each is None else each.contiguous() for each in (grad_x, before, rows, after)
            )
            arguments = (grad_x, before, rows, rows_dst, after, x, rstd, weight)
            grad, grad_weight = apply_release_router_backward(*arguments, ctx.unit_offset, ctx.backend)
        grad_routed, grad_combine = routed_gradients(grad, kept, dst, src, combine, ctx.rows_dtype, ctx.backend)
        return grad, grad if ctx.has_shared else None, grad_routed, None, None, grad_combine, grad_weight, *[None] * 5
