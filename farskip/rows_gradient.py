"""The gradient of tokens that were copied to rows, handed on unsummed to whoever sums it in one pass with other work.

A router's choice copies each token to K rows. Autograd alone would sum the rows' gradients per token where the copy
was made, write that out, and have it read again by the sum of all gradients of the normed stream and by the norm's
backward. Here the node of the copy hands on a placeholder and lays the rows' gradient aside, and the node that made the
tokens picks it up: two nodes that are tied together as launch and wait are (`farskip.async_autograd.InFlight`).

    forward    normed stream  ->  copy  ->  rows
    backward   take           <-  placeholder  <-  gradient of the rows, laid aside

Legend: T tokens, K experts per token, D hidden, R rows.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable


class RowsGradient:
    """The gradient of the rows that were copied from one tensor, on its way around autograd.

    Between the tensor and the copy there may be views, and nothing else: `take` refuses a placeholder to which anything
    was added, because that would be lost.
    """

    __slots__ = ("_laid_aside",)

    def __init__(self) -> None:
        self._laid_aside: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def copied(
        self, copy: Callable[[torch.Tensor], torch.Tensor], tokens_TD: torch.Tensor, dst_TK: torch.Tensor
    ) -> torch.Tensor:
        """`copy(tokens_TD)`, whose gradient is laid aside.

        Args:
            copy: makes rows [R, D] of tokens, in their dtype or a narrower one.
            tokens_TD: a view of the tensor whose gradient takes the rows' up.
            dst_TK: int32 row of each (token, choice); -1 where it has none.
        """
        return _Copy.apply(tokens_TD, dst_TK, copy, self)

    def take(self, arrived: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The gradient of the rows [R, D], in their dtype, and where they stand [T, K]; None if what arrived is the
        gradient itself.

        Args:
            arrived: what autograd brought as the gradient of the tensor.

        Raises:
            RuntimeError: something was added to the placeholder.
        """
        if self._laid_aside is None:
            return None
        placeholder, rows_RD, dst_TK = self._laid_aside
        self._laid_aside = None
        if arrived.data_ptr() != placeholder.data_ptr():
            raise RuntimeError(
                "the alias of a normed stream that is copied to expert rows has another reader, whose gradient would "
                "be lost: read the alias that is made for it"
            )
        for beside in (rows_RD, dst_TK):  # autograd orders the streams of the two nodes, but does not know these
            if beside.is_cuda:
                beside.record_stream(torch.cuda.current_stream(beside.device))
        return rows_RD, dst_TK

    def _lay_aside(self, placeholder: torch.Tensor, rows_RD: torch.Tensor, dst_TK: torch.Tensor) -> None:
        assert self._laid_aside is None, "rows were copied from a tensor twice, or their gradient was never taken"
        self._laid_aside = placeholder, rows_RD, dst_TK


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tokens_TD: torch.Tensor,
        dst_TK: torch.Tensor,
        copy: Callable[[torch.Tensor], torch.Tensor],
        gradient: RowsGradient,
    ) -> torch.Tensor:
        ctx.gradient, ctx.shape, ctx.dtype = gradient, tokens_TD.shape, tokens_TD.dtype
        ctx.save_for_backward(dst_TK)
        return copy(tokens_TD.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, rows_RD: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (dst_TK,) = ctx.saved_tensors
        # One number for all: it takes no memory, and NaN shows up at once should anybody read it.
        placeholder = rows_RD.new_full((), float("nan"), dtype=ctx.dtype).expand(ctx.shape)
        ctx.gradient._lay_aside(placeholder, rows_RD.contiguous(), dst_TK)
        return placeholder, None, None, None
