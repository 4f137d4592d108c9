"""One packed batch of token sequences: the contract between the data pipeline and everything that computes a loss.

Legend: B sequences per batch, S positions per sequence.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

IGNORED_LABEL = -100
"""Label of a position that is not trained on: the last token of a document, a user's turn, padding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Packed token sequences, already shifted, whose attention does not cross documents.

    Attributes:
        input_ids_BS: int64 token ids.
        labels_BS: int64; ``labels_BS[b, s]`` is the token that position ``s`` has to predict, or ``IGNORED_LABEL``.
        position_ids_BS: int64; restarts at 0 where a document starts. Document boundaries are exactly these zeros.
    """

    input_ids_BS: "torch.Tensor"
    labels_BS: "torch.Tensor"
    position_ids_BS: "torch.Tensor"

    def num_labels(self) -> int:
        """Number of positions that are trained on. Note: synchronizes the host on an accelerator."""
        return int((self.labels_BS != IGNORED_LABEL).sum())

    def to(self, device: "torch.device | str") -> "Batch":
        """The same batch on another device."""
        return Batch(
            input_ids_BS=self.input_ids_BS.to(device, non_blocking=True),
            labels_BS=self.labels_BS.to(device, non_blocking=True),
            position_ids_BS=self.position_ids_BS.to(device, non_blocking=True),
        )
