# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""SwiGLU in Triton.

Decides: the number of live rows is read on the device, so nobody waits for it; programs behind it only write zeros. The
backward walks over whole rows, because the weight's gradient is a sum over the row. Cuts are comparisons, not minima: a
minimum would swallow a NaN.

Legend: R rows, I expert's intermediate size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from farskip.triton_kernels.common_triton import INTERPRETING, on_device, sigmoid, to_storage
from farskip.triton_kernels.swiglu_reference import SwigluRule


@triton.jit
def _load_halves(h_ptr, row, start, live, num_cols, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Gate and up of a block, in fp32. Interleaved columns are loaded as they lie and split in registers."""
    col = start + tl.arange(0, BLOCK)
    mask = live[:, None] & (col < num_cols)[None, :]
    if INTERLEAVED:
        pair = start * 2 + tl.arange(0, 2 * BLOCK)
        at = row[:, None] * num_cols * 2 + pair[None, :]
        both = tl.load(h_ptr + at, mask=live[:, None] & (pair < 2 * num_cols)[None, :], other=0.0).to(tl.float32)
        gate, up = tl.split(tl.reshape(both, [ROWS, BLOCK, 2]))
    else:
        at = row[:, None] * num_cols * 2 + col[None, :]
        gate = tl.load(h_ptr + at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(h_ptr + at + num_cols, mask=mask, other=0.0).to(tl.float32)
    return gate, up


@triton.jit
def swiglu_kernel(
    h_ptr,
    weights_ptr,
    num_live_ptr,
    out_ptr,
    num_rows,
    num_cols,
    limit,
    alpha,
    up_offset,
    INTERLEAVED: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    HAS_NUM_LIVE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of ROWS rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(1) * BLOCK
    col = start + tl.arange(0, BLOCK)
    live = row < num_rows
    stored = live[:, None] & (col < num_cols)[None, :]
    if HAS_NUM_LIVE:
        live = live & (row < tl.load(num_live_ptr))
    gate, up = _load_halves(h_ptr, row, start, live, num_cols, INTERLEAVED, ROWS, BLOCK)
    if HAS_LIMIT:
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    out = gate * sigmoid(alpha * gate) * (up + up_offset)
    if HAS_WEIGHTS:
        out = out * tl.load(weights_ptr + row, mask=live, other=0.0).to(tl.float32)[:, None]
    tl.store(out_ptr + row[:, None] * num_cols + col[None, :], to_storage(out, out_ptr.dtype.element_ty), mask=stored)


@triton.jit
def swiglu_backward_kernel(
    grad_ptr,
    h_ptr,
    weights_ptr,
    num_live_ptr,
    grad_h_ptr,
    grad_weights_ptr,
    num_rows,
    num_cols,
    limit,
    alpha,
    up_offset,
    INTERLEAVED: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    HAS_NUM_LIVE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All of ROWS rows, block by block."""
    dtype: tl.constexpr = grad_h_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    live = inside
    if HAS_NUM_LIVE:
        live = live & (row < tl.load(num_live_ptr))
    weight = tl.full([ROWS], 1.0, tl.float32)
    if HAS_WEIGHTS:
        weight = tl.load(weights_ptr + row, mask=live, other=0.0).to(tl.float32)
    dots = tl.zeros([ROWS], tl.float32)
    for start in range(0, num_cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        at = row[:, None] * num_cols + col[None, :]
        mask = live[:, None] & (col < num_cols)[None, :]
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        raw_gate, raw_up = _load_halves(h_ptr, row, start, live, num_cols, INTERLEAVED, ROWS, BLOCK)
        gate, up = raw_gate, raw_up
        if HAS_LIMIT:
            gate = tl.where(gate > limit, limit, gate)
            up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
        sig = sigmoid(alpha * gate)
        swish = gate * sig
        up = up + up_offset
        if HAS_WEIGHTS:
            dots += tl.sum(grad * swish * up, axis=1)
        grad = grad * weight[:, None]
        grad_gate = grad * up * sig * (1.0 + alpha * gate * (1.0 - sig))
        grad_up = grad * swish
        if HAS_LIMIT:
            grad_gate = tl.where(raw_gate <= limit, grad_gate, 0.0)
            grad_up = tl.where(tl.abs(raw_up) <= limit, grad_up, 0.0)
        if INTERLEAVED:
            pair = start * 2 + tl.arange(0, 2 * BLOCK)
            both = to_storage(tl.reshape(tl.join(grad_gate, grad_up), [ROWS, 2 * BLOCK]), dtype)
            pair_at = row[:, None] * num_cols * 2 + pair[None, :]
            tl.store(grad_h_ptr + pair_at, both, mask=inside[:, None] & (pair < 2 * num_cols)[None, :])
        else:
            half_at = row[:, None] * num_cols * 2 + col[None, :]
            stored = inside[:, None] & (col < num_cols)[None, :]
            tl.store(grad_h_ptr + half_at, to_storage(grad_gate, dtype), mask=stored)
            tl.store(grad_h_ptr + half_at + num_cols, to_storage(grad_up, dtype), mask=stored)
    if HAS_WEIGHTS:
        tl.store(grad_weights_ptr + row, to_storage(dots, grad_weights_ptr.dtype.element_ty), mask=inside)


def _blocks(num_rows: int, num_cols: int) -> tuple[int, int, int]:
    """Rows, columns and warps of a block; a long row takes several blocks, short rows share one."""
    block = max(16, min(2048, triton.next_power_of_2(num_cols)))
    elements = 2**15 if INTERPRETING else 2048
    rows = min(max(1, elements // block), triton.next_power_of_2(max(1, num_rows)))
    return rows, block, 4


def _settings(rule: SwigluRule) -> tuple[float, float, float]:
    return (0.0 if rule.limit is None else rule.limit), rule.alpha, rule.up_offset


def swiglu_triton(h: Tensor, weights: Tensor | None, num_rows: Tensor | None, rule: SwigluRule) -> Tensor:
    """See `swiglu_reference`. All tensors contiguous."""
    rows, cols = h.shape[0], h.shape[1] // 2
    out = h.new_empty(rows, cols)
    block_rows, block, num_warps = _blocks(rows, cols)
    if rows:
        with on_device(h):
            swiglu_kernel[(triton.cdiv(rows, block_rows), triton.cdiv(cols, block))](
                h,
                weights,
                num_rows,
                out,
                rows,
                cols,
                *_settings(rule),
                INTERLEAVED=rule.interleaved,
                HAS_WEIGHTS=weights is not None,
                HAS_LIMIT=rule.limit is not None,
                HAS_NUM_LIVE=num_rows is not None,
                ROWS=block_rows,
                BLOCK=block,
                num_warps=num_warps,
            )
    return out


def swiglu_backward_triton(
    grad: Tensor, h: Tensor, weights: Tensor | None, num_rows: Tensor | None, rule: SwigluRule
) -> tuple[Tensor, Tensor]:
    """See `swiglu_backward_reference`. All tensors contiguous."""
    rows, cols = h.shape[0], h.shape[1] // 2
    grad_h = torch.empty_like(h)
    grad_weights = h.new_empty(0) if weights is None else torch.empty_like(weights)
    block_rows, block, num_warps = _blocks(rows, cols)
    if rows:
        with on_device(h):
            swiglu_backward_kernel[(triton.cdiv(rows, block_rows),)](
                grad,
                h,
                weights,
                num_rows,
                grad_h,
                grad_weights,
                rows,
                cols,
                *_settings(rule),
                INTERLEAVED=rule.interleaved,
                HAS_WEIGHTS=weights is not None,
                HAS_LIMIT=rule.limit is not None,
                HAS_NUM_LIVE=num_rows is not None,
                ROWS=block_rows,
                BLOCK=block,
                num_warps=num_warps,
            )
    return grad_h, grad_weights
