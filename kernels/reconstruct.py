"""``w = mean + (std * row_scale) * (c V^T)`` in one pass over the stored basis."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import _basis
from ._basis import dot, load_basis, rounded


@triton.jit
def reconstruct_kernel(
    p_c, p_basis, p_mean, p_std, p_row_scale, p_out,
    k, d, m, stride_c, stride_basis, stride_out,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK_D rows of the basis, all of m. Neighbours share rows, for other k."""
    pid, blocks_k = tl.program_id(0), tl.cdiv(k, BLOCK_K)
    b_ks = (pid % blocks_k).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
    b_rows = (pid // blocks_k).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    p_cs = p_c + b_ks[None, :] * stride_c  # [1, BLOCK_K]

    if BLOCK_K == 1:
        b_acc = tl.zeros([BLOCK_D, BLOCK_M], tl.float32)
        for start in range(0, m, BLOCK_M):
            b_v = load_basis(p_basis, stride_basis, b_rows, d, start, m, BLOCK_M)
            b_cols = start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
            b_c = tl.load(p_c + b_cols, b_cols < m, other=0.0)  # [BLOCK_M]
            b_acc += b_v.to(tl.float32) * b_c[None, :]
        b_w = tl.sum(b_acc, 1)[:, None]  # [BLOCK_D, 1]
    else:
        b_w = tl.zeros([BLOCK_D, BLOCK_K], tl.float32)
        for start in range(0, m, BLOCK_M):
            b_v = load_basis(p_basis, stride_basis, b_rows, d, start, m, BLOCK_M)
            b_cols = start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
            mask = (b_cols < m)[:, None] & (b_ks < k)[None, :]
            b_c = tl.load(p_cs + b_cols[:, None], mask, other=0.0)  # [BLOCK_M, BLOCK_K]
            b_w = dot(b_v, b_c, b_w)

    inside = b_rows < d
    b_gain = tl.load(p_std + b_rows, inside)  # [BLOCK_D]
    if p_row_scale is not None:
        b_gain *= tl.load(p_row_scale + b_rows, inside)
    b_w *= b_gain[:, None]
    if p_mean is not None:
        b_w += tl.load(p_mean + b_rows, inside)[:, None]
    p_outs = p_out + b_ks[None, :] * stride_out + b_rows[:, None]  # [BLOCK_D, BLOCK_K]
    mask = inside[:, None] & (b_ks < k)[None, :]
    tl.store(p_outs, rounded(b_w, p_out.dtype.element_ty), mask)


def reconstruct(
    c: Tensor,
    basis: Tensor,
    mean: Tensor | None,
    std: Tensor,
    row_scale: Tensor | None,
    out: Tensor,
) -> None:
    """c ``[k, m]``, stored basis, mean, std, row_scale ``[d]`` -> out ``[k, d]``.

    As ``ops/_native.py`` says of every backend. Sums in float32, rounds once.
    """
    shape = _basis.basis_shape(c.shape[0], basis, c.shape[1])
    block = _basis.blocks(shape)
    grid = (triton.cdiv(shape.d, block.d) * triton.cdiv(shape.k, block.k),)
    with _basis.on(out):
        reconstruct_kernel[grid](
            c, basis, mean, std, row_scale, out,
            shape.k, shape.d, shape.m, c.stride(0), basis.stride(0), out.stride(0),
            block.k, block.d, block.m, num_warps=block.warps, num_stages=block.stages,
        )  # fmt: skip
