"""What the Triton kernels share: blocks of a stored basis, dots in float32, block sizes.

Names: p_ is a pointer, b_ a block in registers with its shape beside it, BLOCK_ a constant of the
compiled kernel. Offsets along d are 64-bit: d * m passes 2^31. Nothing is tuned at run time: block
sizes are pure functions of the shape, so that equal calls run equal code and give equal bits.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# The interpreter (TRITON_INTERPRET=1) keeps bfloat16 as bare bits: it can neither multiply them
# nor round to them. It does both in float32 below; nothing else differs from the GPU.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
BITS = {torch.float32: 32, torch.bfloat16: 16, torch.int8: 8, torch.uint8: 4}
_PROGRAMS = 1024  # of a contraction: about two waves on the largest GPUs, few partial sums


# --- in kernels ---------------------------------------------------------------------------------


@triton.jit
def load_basis(p_basis, stride, b_rows, d, start, m, BLOCK_M: tl.constexpr):
    """Rows b_rows, columns start.. of the stored basis -> [BLOCK_D, BLOCK_M] float32 or bfloat16.

    Outside of d and m it holds finite numbers. Integers of 8 and 4 bits are exact in bfloat16,
    and get there faster than to float32.
    """
    p_rows = p_basis + b_rows[:, None] * stride  # [BLOCK_D, 1]
    if p_basis.dtype.element_ty == tl.uint8:
        b_cols = start // 2 + tl.arange(0, BLOCK_M // 2)  # [BLOCK_M / 2]
        mask = (b_rows < d)[:, None] & (b_cols < (m + 1) // 2)[None, :]
        b_bytes = tl.load(p_rows + b_cols[None, :], mask, other=0)  # [BLOCK_D, BLOCK_M / 2]
        b_low, b_high = (b_bytes & 15).to(tl.int8) - 8, (b_bytes >> 4).to(tl.int8) - 8
        b_stored = tl.interleave(b_low, b_high)  # [BLOCK_D, BLOCK_M]
    else:
        b_cols = start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        mask = (b_rows < d)[:, None] & (b_cols < m)[None, :]
        b_stored = tl.load(p_rows + b_cols[None, :], mask, other=0)  # [BLOCK_D, BLOCK_M]
    if b_stored.dtype == tl.int8:
        if INTERPRETED:
            b_stored = b_stored.to(tl.float32)
        b_stored = b_stored.to(tl.bfloat16)
    return b_stored


@triton.jit
def leading(b_x, dtype: tl.constexpr):
    """The leading bits of a float32 block, as many as dtype holds; infinities and NaN whole."""
    if dtype == tl.bfloat16:
        return (b_x.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return b_x.to(dtype).to(tl.float32)


@triton.jit
def terms(b_x, dtype: tl.constexpr):
    """A float32 block as the sum of three of dtype: all 24 bits in bfloat16 or float16."""
    b_high = leading(b_x, dtype)
    # Nothing is left of what the first term cannot hold: inf - inf would be NaN.
    b_rest = tl.where(tl.abs(b_high) < float("inf"), b_x - b_high, 0.0)
    b_mid = leading(b_rest, dtype)
    return b_high.to(dtype), b_mid.to(dtype), (b_rest - b_mid).to(dtype)


@triton.jit
def dot_stored(b_x, b_y, b_acc):
    """b_acc + b_x b_y for one dtype: float32 without TF32, 16 bits on the tensor cores."""
    if INTERPRETED:
        b_x, b_y = b_x.to(tl.float32), b_y.to(tl.float32)
    return tl.dot(b_x, b_y, b_acc, input_precision="ieee")


@triton.jit
def dot(b_x, b_y, b_acc):
    """b_acc + b_x b_y in float32's accuracy, on the tensor cores where either side has 16 bits.

    A float32 side meets a 16-bit one as three 16-bit terms, whose products are exact. An infinity
    in the 16-bit side then gives NaN.
    """
    if b_x.dtype == b_y.dtype:
        b_acc = dot_stored(b_x, b_y, b_acc)
    elif b_x.dtype == tl.float32:
        b_high, b_mid, b_low = terms(b_x, b_y.dtype)
        b_acc = dot_stored(b_high, b_y, b_acc)
        b_acc = dot_stored(b_mid, b_y, b_acc)
        b_acc = dot_stored(b_low, b_y, b_acc)
    elif b_y.dtype == tl.float32:
        b_high, b_mid, b_low = terms(b_y, b_x.dtype)
        b_acc = dot_stored(b_x, b_high, b_acc)
        b_acc = dot_stored(b_x, b_mid, b_acc)
        b_acc = dot_stored(b_x, b_low, b_acc)
    else:
        b_acc = dot_stored(b_x.to(tl.float32), b_y.to(tl.float32), b_acc)
    return b_acc


@triton.jit
def rounded(b_x, dtype: tl.constexpr):
    """A float32 block in dtype, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        b_bits = b_x.to(tl.uint32, bitcast=True)
        b_up = (b_bits + 0x7FFF + ((b_bits >> 16) & 1)) & 0xFFFF0000
        b_x = tl.where(b_x == b_x, b_up.to(tl.float32, bitcast=True), b_x)
    return b_x.to(dtype)


@triton.jit
def sum_parts_kernel(p_parts, p_out, parts, n, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """out[n] = the sum of parts[parts, n], in one order."""
    b_cols = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    b_acc = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, parts, BLOCK_P):
        b_parts = first + tl.arange(0, BLOCK_P)  # [BLOCK_P]
        mask = (b_parts < parts)[:, None] & (b_cols < n)[None, :]
        offsets = b_parts[:, None].to(tl.int64) * n + b_cols[None, :]  # [BLOCK_P, BLOCK_N]
        b_acc += tl.sum(tl.load(p_parts + offsets, mask, other=0.0), 0)
    tl.store(p_out + b_cols, b_acc, b_cols < n)


# --- around kernels -----------------------------------------------------------------------------


class Shape(NamedTuple):
    """What block sizes are chosen by: k rows against a basis [d, m] stored in ``bits``."""

    k: int
    d: int
    m: int
    bits: int


class Blocks(NamedTuple):
    """Block sizes; with k = 1 a kernel multiplies and adds, from 16 on it runs dots."""

    k: int
    d: int
    m: int
    warps: int
    stages: int


def blocks(shape: Shape, sums_over_d: bool = False) -> Blocks:
    """The blocks of reconstruct, or of project and backward, which sum over d.

    One row keeps BLOCK_D x BLOCK_M sums in registers, 32 or 64 a thread, and loads 16 bytes a
    thread at a time. More rows share one block of the basis through the tensor cores (float32:
    through the ordinary ones, in smaller blocks). All of it fits the registers. The order of sums
    follows the blocks: a row gives equal bits in every batch that has the same ones.
    """
    if shape.k == 1:
        numbers = 8192 if shape.bits == 8 else 4096
        widest = 128 if sums_over_d else 256
        m = min(widest, max(16, triton.next_power_of_2(shape.m)))
        return Blocks(1, min(64, numbers // m), m, warps=4, stages=2)
    k = min(32, max(16, triton.next_power_of_2(shape.k)))
    if shape.bits == 32:
        return Blocks(k, 16 if sums_over_d else 32, 64, warps=4, stages=3)
    return Blocks(k, 64, 128 if (k, shape.bits) == (16, 16) else 64, warps=4, stages=3)


def splits(shape: Shape, block: Blocks) -> tuple[int, int]:
    """(parts that d is summed in, rows of d a part): by d and m alone, never by the GPU or k."""
    wanted = triton.cdiv(_PROGRAMS, max(1, triton.cdiv(shape.m, block.m)))
    rows = max(4, triton.cdiv(triton.cdiv(shape.d, wanted), block.d)) * block.d
    return max(1, triton.cdiv(shape.d, rows)), rows


def basis_shape(k: int, basis: Tensor, m: int) -> Shape:
    """The Shape of a call with a stored basis of m columns."""
    return Shape(k, basis.shape[0], m, BITS[basis.dtype])


def on(t: Tensor) -> AbstractContextManager:
    """Launches go to the current device: make it t's."""
    return torch.cuda.device_of(t)
