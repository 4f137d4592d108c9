"""Selective recomputation: activations are thrown away and computed again, stage by stage, and no exchange is repeated.

Recomputed are the attention core (where its implementation keeps the scores), the dense MLP, the shared expert and the
routed experts: each keeps its input and runs again when backward reaches it. What is between them (projections, norms,
router, the rows that travelled) is kept. Each recomputation lies inside one stage, so schedule, streams and bits are
those of a run without it. Full recomputation is another thing: there a whole segment runs again, exchanges included
(`farskip.models.attach`).

Legend: B batch, S sequence, D hidden, R rows.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from farskip.models.attach import attachment_of
from farskip.models.attention_seam import core_recomputed
from farskip.stage import Routing, Seam


class RecomputedSubBlocks:
    """The sub-blocks of a layer, four of whose stages keep only their inputs. Implements `farskip.stage.SubBlocks`.

    Args:
        inner: the sub-blocks themselves; has the layer of transformers as `layer`.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.blocks = inner.blocks

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # not set yet, as while this is copied
            raise AttributeError(name)
        return getattr(self.inner, name)

    def attention(self, normed_BSD: torch.Tensor, seam: Seam, arguments: Mapping[str, Any]) -> torch.Tensor:
        """See `SubBlocks.attention`."""
        with core_recomputed(self.inner.layer.self_attn):
            return self.inner.attention(normed_BSD, seam, arguments)

    def mlp(self, normed_BSD: torch.Tensor) -> torch.Tensor:
        """See `SubBlocks.mlp`."""
        return _again(self.inner.mlp, normed_BSD)

    def shared(self, normed_BSD: torch.Tensor) -> torch.Tensor:
        """See `SubBlocks.shared`."""
        return _again(self.inner.shared, normed_BSD)

    def routed(self, normed_BSD: torch.Tensor, routing: Routing) -> torch.Tensor:
        """See `SubBlocks.routed`."""
        return _again(self.inner.routed, normed_BSD, routing)

    def expert_rows(self, rows_RD: torch.Tensor, expert_R: torch.Tensor) -> torch.Tensor:
        """See `SubBlocks.expert_rows`."""
        return _again(self.inner.expert_rows, rows_RD, expert_R)


def recompute_stages(model: Any) -> None:
    """Switch selective recomputation on for a model that farskip is attached to. Twice is once.

    Raises:
        ValueError: farskip is not attached to the model.
    """
    attachment = attachment_of(model)
    if attachment is None:
        raise ValueError("recompute_stages: farskip is not attached to this model; call rewire or parallelize first")
    attachment.recomputes_stages = True
    attachment.executor.sub_blocks = recomputed(attachment.executor.sub_blocks)


def recomputed(sub_blocks: Sequence[Any]) -> tuple[Any, ...]:
    """The same sub-blocks, each wrapped once."""
    return tuple(
        block if isinstance(block, RecomputedSubBlocks) else RecomputedSubBlocks(block) for block in sub_blocks
    )


def _again(compute: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
    """Run now, keep the inputs, and run again in backward."""
    if not torch.is_grad_enabled():
        return compute(*arguments)
    return checkpoint(compute, *arguments, use_reentrant=False)
