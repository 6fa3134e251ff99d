"""The contraction ``c = z V`` of project and of reconstruct's backward, in one kernel.

    project:   z = ((w - mean) / std) * row_scale       a coordinate of std 0 adds nothing
    backward:  z = dL/dw * std * row_scale

Each program sums some rows of d into float32 parts; a second kernel adds the parts in one order.
No atomics: equal inputs give equal bits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import _basis
from ._basis import dot, load_basis, sum_parts_kernel


@triton.jit
def project_kernel(
    p_source, p_basis, p_mean, p_std, p_row_scale, p_parts,
    k, d, m, rows, stride_source, stride_basis,
    DIVIDE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """A program: ``rows`` rows of d for BLOCK_M columns -> parts [part, k, m]."""
    pid, blocks_k, blocks_m = tl.program_id(0), tl.cdiv(k, BLOCK_K), tl.cdiv(m, BLOCK_M)
    part = (pid // blocks_k // blocks_m).to(tl.int64)
    start = (pid // blocks_k) % blocks_m * BLOCK_M
    b_ks = (pid % blocks_k).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]

    if BLOCK_K == 1:
        b_acc = tl.zeros([BLOCK_D, BLOCK_M], tl.float32)
    else:
        b_acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for first in range(0, rows, BLOCK_D):
        b_rows = part * rows + first + tl.arange(0, BLOCK_D)  # [BLOCK_D]
        inside = b_rows < d
        mask = inside[:, None] & (b_ks < k)[None, :]
        p_sources = p_source + b_ks[None, :] * stride_source + b_rows[:, None]
        b_z = tl.load(p_sources, mask, other=0.0).to(tl.float32)  # [BLOCK_D, BLOCK_K]
        b_std = tl.load(p_std + b_rows, inside, other=1.0)[:, None]  # [BLOCK_D, 1]
        if DIVIDE:
            # x / inf is 0 for every finite x, and NaN or inf in a fixed coordinate shows as NaN.
            b_std = tl.where(b_std == 0.0, float("inf"), b_std)
            if p_mean is not None:
                b_z -= tl.load(p_mean + b_rows, inside, other=0.0)[:, None]
            b_z = tl.div_rn(b_z, tl.broadcast_to(b_std, b_z.shape))
        else:
            b_z *= b_std
        if p_row_scale is not None:
            b_z *= tl.load(p_row_scale + b_rows, inside, other=0.0)[:, None]
        b_v = load_basis(p_basis, stride_basis, b_rows, d, start, m, BLOCK_M)  # [BLOCK_D, BLOCK_M]
        if BLOCK_K == 1:
            b_acc += b_v.to(tl.float32) * b_z
        else:
            b_acc = dot(tl.trans(b_v), b_z, b_acc)
    b_c = tl.sum(b_acc, 0)[:, None] if BLOCK_K == 1 else b_acc  # [BLOCK_M, BLOCK_K]

    b_cols = start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    p_cs = p_parts + (part * k + b_ks[None, :]) * m + b_cols[:, None]  # [BLOCK_M, BLOCK_K]
    tl.store(p_cs, b_c, (b_cols < m)[:, None] & (b_ks < k)[None, :])


def project(
    source: Tensor,
    basis: Tensor,
    mean: Tensor | None,
    std: Tensor,
    row_scale: Tensor | None,
    divide: bool,
    out: Tensor,
) -> None:
    """source ``[k, d]``, stored basis, mean, std, row_scale ``[d]`` -> out ``[k, m]`` float32.

    As ``ops/_native.py`` says of every backend. source is w (divide) or dL/dw.
    """
    shape = _basis.basis_shape(source.shape[0], basis, out.shape[1])
    if not shape.d:
        out.zero_()
        return
    block = _basis.blocks(shape, sums_over_d=True)
    parts, rows = _basis.splits(shape, block)
    sums = out if parts == 1 else out.new_empty(parts, shape.k, shape.m)
    grid = (parts * triton.cdiv(shape.m, block.m) * triton.cdiv(shape.k, block.k),)
    with _basis.on(out):
        project_kernel[grid](
            source, basis, mean, std, row_scale, sums,
            shape.k, shape.d, shape.m, rows, source.stride(0), basis.stride(0), divide,
            block.k, block.d, block.m, num_warps=block.warps, num_stages=block.stages,
        )  # fmt: skip
        if parts > 1:
            n = out.numel()
            sum_parts_kernel[(triton.cdiv(n, 64),)](sums, out, parts, n, 32, 64, num_warps=4)
