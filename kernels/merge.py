"""``W' = W + scale * (B A)`` for a list of modules in one launch, from pristine weights.

A table in device memory tells each program its module: where the tensors lie, as distances from
those of the first module, so that new tensors in the same layout (the next identity's A and B,
views of one flat adapter) find their table already there.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import _basis
from ._basis import rounded

TILE = 64  # kMergeTile of csrc/merge.h, which the table counts in


@triton.jit
def moved(p_first, distance, ALIGNED: tl.constexpr):
    """The pointer ``distance`` bytes after p_first; 16-byte aligned where the caller knows it."""
    p = (p_first.to(tl.int64) + distance).to(p_first.dtype)
    if ALIGNED:
        p = tl.multiple_of(p, 16)
    return p


@triton.jit
def merge_kernel(
    p_outs, p_weights, p_as, p_bs, p_table, modules, scale,
    R: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_MODULES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """A program: a tile of one module's weight, found by how many modules begin at or before it."""
    pid = tl.program_id(0)
    b_modules = tl.arange(0, BLOCK_MODULES)  # [BLOCK_MODULES]
    b_begins = tl.load(p_table + b_modules * 8 + 6, b_modules < modules, other=1 << 62)
    p_row = p_table + (tl.sum((b_begins <= pid).to(tl.int32)) - 1) * 8
    p_out = moved(p_outs, tl.load(p_row), ALIGNED)
    p_weight = moved(p_weights, tl.load(p_row + 1), ALIGNED)
    p_a = moved(p_as, tl.load(p_row + 2), False)
    p_b = moved(p_bs, tl.load(p_row + 3), False)
    n_out, n_in = tl.load(p_row + 4), tl.load(p_row + 5)
    if ALIGNED:
        n_in = tl.multiple_of(n_in, 8)
    tile, across = pid - tl.load(p_row + 6), tl.cdiv(n_in, BLOCK_I)
    b_ns = tile // across * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    b_is = tile % across * BLOCK_I + tl.arange(0, BLOCK_I)  # [BLOCK_I]
    in_n, in_i = b_ns < n_out, b_is < n_in

    b_sum = tl.zeros([BLOCK_N, BLOCK_I], tl.float32)
    for r in range(R):
        b_a = tl.load(p_a + r * n_in + b_is, in_i, other=0.0).to(tl.float32)  # [BLOCK_I]
        b_b = tl.load(p_b + b_ns * R + r, in_n, other=0.0).to(tl.float32)  # [BLOCK_N]
        b_sum += b_b[:, None] * b_a[None, :]
    offsets = b_ns[:, None] * n_in + b_is[None, :]  # [BLOCK_N, BLOCK_I]
    mask = in_n[:, None] & in_i[None, :]
    b_weight = tl.load(p_weight + offsets, mask, other=0.0).to(tl.float32)
    tl.store(p_out + offsets, rounded(b_weight + scale * b_sum, p_outs.dtype.element_ty), mask)


def merge(
    first: tuple[Tensor, Tensor, Tensor, Tensor],
    table: Tensor,
    tiles: int,
    rank: int,
    scale: float,
    aligned: bool,
) -> None:
    """W' of every module of table, as ``ops/_native.py`` says of every backend.

    first: the first module's (out, weight, A, B); aligned: every weight lies at a multiple of 16
    bytes and has a multiple of 8 columns. Sums in float32, rounds once.
    """
    modules = table.shape[0]
    with _basis.on(first[1]):
        merge_kernel[(tiles,)](
            *first, table, modules, float(scale),
            rank, aligned, triton.next_power_of_2(modules), TILE, TILE, num_warps=8,
        )  # fmt: skip
