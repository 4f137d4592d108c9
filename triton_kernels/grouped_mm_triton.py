# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""What a grouped matmul leaves undone, in Triton: zeros in the rows behind the last segment.

The product itself is torch's: no Triton product has been measured faster.

Legend: R rows, N columns.
"""

import triton
import triton.language as tl
from torch import Tensor

from farskip.triton_kernels.common_triton import copy_config, on_device

TAIL_ROWS = 64
"""Rows that one program looks after."""


@triton.jit
def zero_tail_kernel(
    out_ptr,
    last_offset_ptr,
    num_rows,
    num_cols,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Zero those of ROWS * STEPS rows that lie behind the last segment; leave at once if none does."""
    first = tl.program_id(0).to(tl.int64) * ROWS * STEPS
    end = tl.load(last_offset_ptr)
    if first + ROWS * STEPS <= end:
        return
    zero = tl.zeros([ROWS, BLOCK], tl.float32).to(out_ptr.dtype.element_ty)
    for step in range(STEPS):
        row = first + step * ROWS + tl.arange(0, ROWS)
        mask = (row >= end) & (row < num_rows)
        for start in range(0, num_cols, BLOCK):
            col = start + tl.arange(0, BLOCK)
            at = row[:, None] * num_cols + col[None, :]
            tl.store(out_ptr + at, zero, mask=mask[:, None] & (col < num_cols)[None, :])


def zero_tail_triton(out_RN: Tensor, offsets_E: Tensor) -> None:
    """Zero, in place, the rows behind the last segment. `out_RN` contiguous."""
    num_rows, num_cols = out_RN.shape
    if num_rows == 0:
        return
    rows, block, num_warps = copy_config(num_rows, num_cols)
    steps = max(1, TAIL_ROWS // rows)
    with on_device(out_RN):
        zero_tail_kernel[(triton.cdiv(num_rows, rows * steps),)](
            out_RN, offsets_E[-1:], num_rows, num_cols, ROWS=rows, STEPS=steps, BLOCK=block, num_warps=num_warps
        )
