"""The two-stream kernels under the executor: sums of the residual stream, formed together with the norms behind them.

Implements `farskip.stage.StreamKernels` with the ops of `farskip.triton_kernels`, which round at the same points and
return the same bits, fused or separate. Decided per norm and forward pass, from the module as it then is: a norm that
`farskip.models.norm_rule` does not know, or that has a hook, is called, as it would be without kernels, and so is one
whose weight has another dtype than the stream.

Under autocast the stream is fp32 and outputs of sub-blocks are bf16: they are widened where they join the stream, in
front of any sum (`farskip.residual`); then r + s is not rounded to bf16 in between, as it is without kernels.

Legend: B batch, S sequence, D hidden.
"""

from collections.abc import Sequence
from typing import Any

import torch

from farskip.models.hf_layer import HFSubBlocks
from farskip.models.norm_rule import NormRule, norm_rule, why_called
from farskip.rows_gradient import RowsGradient
from farskip.stage import Norm, RoutedRows
from farskip.triton_kernels.add_rms_norm import add_rms_norm
from farskip.triton_kernels.backend import choose_backend
from farskip.triton_kernels.dispatch_map import DispatchMap
from farskip.triton_kernels.release_attention import release_attention
from farskip.triton_kernels.release_both import release_both
from farskip.triton_kernels.release_router import release_router
from farskip.triton_kernels.release_router_by_use import release_router_by_use


def stream_backend(setting: str, tensor: torch.Tensor) -> str | None:
    """What norms and sums run on for a stream like this tensor; None is transformers' own code."""
    if setting == "off" or (setting == "auto" and (not tensor.is_cuda or tensor.dtype == torch.float64)):
        return None
    return choose_backend(None if setting == "auto" else setting, tensor)


def why_norm_is_called(block: HFSubBlocks, name: str, stream: torch.Tensor) -> str | None:
    """Why a norm of a layer has to be called, as it is now; None if an op may do its work together with a sum's."""
    if name not in block.bare_norms:
        return "its family does more there"
    norm = block.norms[name]
    if (why := why_called(norm)) is None and norm.weight.dtype != stream.dtype:
        return f"its weight is {norm.weight.dtype}, the stream {stream.dtype}"
    return why


class HFStreamKernels:
    """The ops over the norms of a transformers model's layers. Implements `farskip.stage.StreamKernels`.

    Args:
        sub_blocks: one entry per layer.
        setting: see `farskip.models.kernels`.
    """

    def __init__(self, sub_blocks: Sequence[HFSubBlocks], setting: str) -> None:
        self._sub_blocks = tuple(sub_blocks)
        self._setting = setting

    def run_on(self, stream_BSD: torch.Tensor) -> bool:
        """See `StreamKernels.run_on`."""
        return stream_backend(self._setting, stream_BSD) is not None

    def fusible(self, start: int, stop: int, stream_BSD: torch.Tensor) -> frozenset[Norm]:
        """See `StreamKernels.fusible`."""
        return frozenset(
            Norm(layer, name)
            for layer in range(start, stop)
            for name in self._sub_blocks[layer].norms
            if why_norm_is_called(self._sub_blocks[layer], name, stream_BSD) is None
        )

    def add_norm(
        self, norms: tuple[Norm], x_BSD: torch.Tensor, a_BSD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `StreamKernels.add_norm`."""
        (rule,) = self._rules(norms)
        return add_rms_norm(x_BSD, a_BSD, rule.weight, rule.eps, **self._how(rule, x_BSD))

    def release_attention(
        self, norms: tuple[Norm], x_BSD: torch.Tensor, a_BSD: torch.Tensor, s_BSD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `StreamKernels.release_attention`."""
        (rule,) = self._rules(norms)
        return release_attention(x_BSD, a_BSD, s_BSD, rule.weight, rule.eps, **self._how(rule, x_BSD))

    def release_router(
        self, norms: tuple[Norm], y_BSD: torch.Tensor, r: torch.Tensor | RoutedRows, s_BSD: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `StreamKernels.release_router`."""
        (rule,), (routed, summed) = self._rules(norms), _routed(r)
        return release_router(y_BSD, s_BSD, routed, rule.weight, rule.eps, **summed, **self._how(rule, y_BSD))

    def release_router_by_use(
        self,
        norms: tuple[Norm],
        num_uses: int,
        gradient: RowsGradient,
        y_BSD: torch.Tensor,
        r: torch.Tensor | RoutedRows,
        s_BSD: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """See `StreamKernels.release_router_by_use`."""
        (rule,), (routed, summed) = self._rules(norms), _routed(r)
        how = self._how(rule, y_BSD)
        return release_router_by_use(
            y_BSD, s_BSD, routed, rule.weight, rule.eps, num_uses, gradient.take, **summed, **how
        )

    def release_both(
        self,
        norms: tuple[Norm, Norm],
        x_BSD: torch.Tensor,
        a_BSD: torch.Tensor,
        r: torch.Tensor | RoutedRows,
        s_BSD: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `StreamKernels.release_both`. The op takes one eps: where there are two, the two updates run instead."""
        of_n, of_x = self._rules(norms)
        if (of_n.eps, of_n.unit_offset) != (of_x.eps, of_x.unit_offset):
            y_BSD, normed_n_BSD = self.release_attention(norms[:1], x_BSD, a_BSD, s_BSD)
            x_BSD, normed_x_BSD = self.release_router(norms[1:], y_BSD, r, s_BSD)
            return x_BSD, normed_n_BSD, normed_x_BSD
        (routed, summed), how = _routed(r), self._how(of_n, x_BSD)
        return release_both(x_BSD, a_BSD, s_BSD, routed, of_n.weight, of_x.weight, of_n.eps, **summed, **how)

    def _rules(self, norms: Sequence[Norm]) -> list[NormRule]:
        return [norm_rule(self._sub_blocks[norm.layer].norms[norm.name]) for norm in norms]

    def _how(self, rule: NormRule, stream_BSD: torch.Tensor) -> dict[str, Any]:
        return {"unit_offset": rule.unit_offset, "backend": stream_backend(self._setting, stream_BSD)}


def _routed(r: torch.Tensor | RoutedRows) -> tuple[torch.Tensor, dict[str, Any]]:
    """What an op takes as the routed output, and how it is summed."""
    if not isinstance(r, RoutedRows):
        return r, {}
    assert isinstance(r.dispatch, DispatchMap), "the dispatcher's map is not one of our kernels'"
    return r.rows_RD, {"dispatch": r.dispatch, "combine_weights": r.weights_TK}
