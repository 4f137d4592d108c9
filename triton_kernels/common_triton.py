# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""What all kernels share: rounding to the storage dtype, accurate exp, the norm of a row, the combine of a row.

Decides how a value is rounded and in which order a row is reduced. Fused and separate ops call the same functions here
with the same block size and number of warps, so they agree in bits.

Three rules that hold in every kernel of this folder:
* load, then widen to fp32 at once: the interpreter keeps bf16 as raw bits and computes nonsense on them, silently;
* store through `to_storage`: the interpreter truncates fp32 to bf16 where a GPU rounds to nearest even;
* row offsets are int64: T * K * H passes 2**31 at ordinary sizes.

A kernel that holds a row whole has its length as a constant, NUM_COLS: of the block's columns beyond it (an eighth of
8192 at DeepSeek-V3's 7168) the compiler then knows that they are not there, and they take neither registers nor
instructions. Passed as a number, the backward of `release_both` did not fit in registers with fp32 streams.

Legend: T tokens, K experts per token, R rows (of all experts together), H hidden size, E experts.
"""

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def _probe():
    pass


# What @triton.jit made of a function tells for certain how this process runs kernels; the environment variable could
# have been changed since triton read it.
INTERPRETING: bool = not isinstance(_probe, triton.JITFunction)
INTERPRET = tl.constexpr(INTERPRETING)


@triton.jit
def to_storage(x, dtype: tl.constexpr):
    """Round fp32 to the storage dtype, to nearest even, on a GPU and in the interpreter alike."""
    if INTERPRET:
        if dtype == tl.bfloat16:
            bits = x.to(tl.uint32, bitcast=True)
            rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
            x = tl.where(x == x, rounded, x)  # adding to a NaN's bits could carry it over into a number
    return x.to(dtype)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """The fp32 value that reading back a stored `x` would give: one rounding point of the bracketing."""
    return to_storage(x, dtype).to(tl.float32)


@triton.jit
def exp(x):
    """exp in fp32. `tl.exp` is off by several units in the last place, which could reorder near ties."""
    if INTERPRET:
        return tl.exp(x)
    return libdevice.exp(x)


@triton.jit
def sigmoid(x):
    """Logistic function in fp32."""
    return 1.0 / (1.0 + exp(-x))


@triton.jit
def norm_row(z, gain, num_cols, eps, UNIT_OFFSET: tl.constexpr, dtype: tl.constexpr):
    """RMSNorm of rows held whole in registers; columns beyond `num_cols` must be zero.

    Without UNIT_OFFSET the normalized value is rounded to the storage dtype before the gain (Llama and its kin); with
    it everything stays fp32 and the gain is 1 + weight (Gemma).

    Returns: the normalized rows in fp32, not yet rounded, and 1/rms.
    """
    rstd = tl.rsqrt(tl.sum(z * z, axis=0) / num_cols + eps)
    if UNIT_OFFSET:
        return z * rstd * (1.0 + gain), rstd
    return rounded(z * rstd, dtype) * gain, rstd


@triton.jit
def norm_row_backward(z, gain, grad, rstd, num_cols, UNIT_OFFSET: tl.constexpr, dtype: tl.constexpr):
    """Gradient of `norm_row`: that of `z`, and this row's share of the gradient of the weight, both in fp32."""
    unit = z * rstd
    if UNIT_OFFSET:
        scaled = grad * (1.0 + gain)
        grad_gain = grad * unit
    else:
        scaled = grad * gain
        grad_gain = grad * rounded(unit, dtype)
    mean = tl.sum(scaled * unit, axis=0) / num_cols
    return rstd * (scaled - unit * mean), grad_gain


@triton.jit
def combine_rows(
    rows_ptr, dst_ptr, weights_ptr, token, live, col, mask, num_cols, K: tl.constexpr, HAS_WEIGHTS: tl.constexpr, like
):
    """Weighted sum of a token's expert rows, in fp32, k from 0 to K - 1; a slot without a row (-1) counts as zero.

    `token` is one token (`live` None) or a column of them, `col` the columns, `like` a tensor of the result's shape.
    The multiply-add is spelled out as one operation: left to the compiler it might be fused in one kernel and not in
    another, and fused and separate ops would differ in the last bit.
    """
    total = tl.zeros_like(like)
    for k in tl.static_range(K):
        if live is None:
            row = tl.load(dst_ptr + token * K + k).to(tl.int64)
        else:
            row = tl.load(dst_ptr + token * K + k, mask=live, other=-1).to(tl.int64)
        # A block compared, not a scalar: `mask & scalar` is no mask to the interpreter of Triton 3.9
        present = tl.zeros_like(col) + row >= 0
        value = tl.load(rows_ptr + row * num_cols + col, mask=mask & present, other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            weight = tl.load(weights_ptr + token * K + k, mask=row >= 0, other=0.0).to(tl.float32)
            total = tl.fma(value, tl.zeros_like(like) + weight, total)
        else:
            total += value
    return total


@triton.jit
def columns(rows_ptr, stream_ptr, BLOCK: tl.constexpr):
    """Columns of a kernel that holds a row of the stream whole and reads rows that may be narrower.

    Left alone, narrow rows would be read more columns at a time, and the whole row laid out by that: another order of
    its reduction, hence other bits than in the kernels that read no rows.
    """
    col = tl.arange(0, BLOCK)
    if rows_ptr.dtype.element_ty.primitive_bitwidth < stream_ptr.dtype.element_ty.primitive_bitwidth:
        col = tl.max_contiguous(col, 128 // stream_ptr.dtype.element_ty.primitive_bitwidth)
    return col


@triton.jit
def zero_padding_rows(
    rows_ptr, src_ptr, first_row, num_rows, num_cols, ROWS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr
):
    """Write zeros to those of ROWS * STEPS rows that hold no token; all others are left alone."""
    for step in range(STEPS):
        row = (first_row + step * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        empty = (row < num_rows) & (tl.load(src_ptr + row, mask=row < num_rows, other=0) < 0)
        if tl.max(empty.to(tl.int32), axis=0) > 0:
            for start in range(0, num_cols, BLOCK):
                col = start + tl.arange(0, BLOCK)
                at = row[:, None] * num_cols + col[None, :]
                zero = tl.zeros([ROWS, BLOCK], tl.float32).to(rows_ptr.dtype.element_ty)
                tl.store(rows_ptr + at, zero, mask=empty[:, None] & (col < num_cols)[None, :])


def row_config(num_cols: int) -> tuple[int, int]:
    """Block size and number of warps of every kernel that holds a row of `num_cols` elements whole.

    A function of the row length alone: the order of a row's reduction follows from it, and that must not depend on
    which op runs.

    Raises:
        ValueError: The row does not fit in one program.
    """
    if num_cols > 32768:
        raise ValueError(
            f"hidden size {num_cols} is above 32768, the largest row one program holds; use backend='reference'"
        )
    block = max(16, triton.next_power_of_2(num_cols))
    return block, min(16, max(1, block // 1024))


def copy_config(num_rows: int, num_cols: int) -> tuple[int, int, int]:
    """Rows and columns per block, and number of warps, of a kernel that walks over rows in blocks.

    One long row per program on a GPU; short rows together; in the interpreter, which pays per operation, many rows.
    """
    block = max(16, min(8192, triton.next_power_of_2(num_cols)))
    elements = 2**16 if INTERPRETING else 2048
    rows = min(max(1, elements // block), triton.next_power_of_2(max(1, num_rows)))
    return rows, block, min(8, max(1, rows * block // 1024))


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the tensor's device current: Triton launches on the current one, whichever the tensors live on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
