"""The two contractions with the basis V ``[d, m]`` that reconstruct and project share.

A 16-bit basis is widened block by block, so that coefficients and sums stay in float32 and no
float32 copy of the basis (4 GB at SD1.5 size) ever exists.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_BLOCK_NUMBERS = 1 << 22  # 16 MB of float32: in cache on a CPU, large enough a GEMM on a GPU


def blocks(basis: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """(rows, those rows of the basis in ``dtype``)."""
    d, m = basis.shape
    step = d if basis.dtype == dtype else max(1, _BLOCK_NUMBERS // max(m, 1))
    for start in range(0, d, max(step, 1)):
        rows = slice(start, min(start + step, d))
        yield rows, basis[rows].to(dtype)


def expand(c: Tensor, basis: Tensor) -> Tensor:
    """c ``[k, m]`` -> c V^T ``[k, d]`` in c's dtype."""
    parts = [c @ block.mT for _, block in blocks(basis, c.dtype)]
    return torch.cat(parts, dim=1) if parts else c.new_zeros(c.shape[0], 0)


def contract(z: Tensor, basis: Tensor) -> Tensor:
    """z ``[k, d]`` -> z V ``[k, m]`` in z's dtype."""
    total = z.new_zeros(z.shape[0], basis.shape[1])
    for rows, block in blocks(basis, z.dtype):
        total = total.addmm(z[:, rows], block)
    return total


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any is, else float32: 16-bit numbers are stored, never summed."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
