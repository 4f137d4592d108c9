"""Grouped matmul as a plain loop over experts: the specification of `grouped_mm`, in any dtype, fp64 too.

Segment e holds the rows from offsets[e - 1] to offsets[e]; its product is out = a @ b[e]. Rows behind the last segment
belong to nobody: they are not read, and are zero in every result. The loop asks the device for the offsets.

Legend: R rows, E experts, D and N the matrices' sizes.
"""

from collections.abc import Iterator

import torch
from torch import Tensor


def segments(offsets_E: Tensor) -> Iterator[tuple[int, int, int]]:
    """Expert, first row and end of every segment that is not empty."""
    start = 0
    for expert, end in enumerate(offsets_E.tolist()):
        if end > start:
            yield expert, start, end
        start = end


def grouped_mm_reference(a_RD: Tensor, b_EDN: Tensor, offsets_E: Tensor) -> Tensor:
    """[R, N]: the rows of each segment times that segment's matrix."""
    out_RN = a_RD.new_zeros(len(a_RD), b_EDN.shape[2])
    for expert, start, end in segments(offsets_E):
        torch.mm(a_RD[start:end], b_EDN[expert], out=out_RN[start:end])
    return out_RN


def grouped_outer_reference(a_RD: Tensor, grad_RN: Tensor, offsets_E: Tensor) -> Tensor:
    """[E, D, N]: gradient of the matrices; zero for an empty segment."""
    grad_EDN = a_RD.new_zeros(len(offsets_E), a_RD.shape[1], grad_RN.shape[1])
    for expert, start, end in segments(offsets_E):
        torch.mm(a_RD[start:end].T, grad_RN[start:end], out=grad_EDN[expert])
    return grad_EDN
