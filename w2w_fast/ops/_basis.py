"""The stored basis V ``[d, m]``, and the two contractions with it that ops are defined by.

Stored as floats, as int8, or as uint8 ``[d, ceil(m / 2)]`` of two 4-bit numbers a byte (the even
column in the low half, minus 8); integers count in units of their row's ``row_scale``. A basis of
fewer bits is widened block by block, so that coefficients and sums stay in float32 and no float32
copy of the basis (4 GB at SD1.5 size) ever exists.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import InputError

_BLOCK_NUMBERS = 1 << 22  # 16 MB of float32: in cache on a CPU, large enough a GEMM on a GPU
INTEGERS = (torch.int8, torch.uint8)


def check(op: str, basis: Tensor, m: int, row_scale: Tensor | None) -> None:
    """InputError unless basis stores ``[d, m]`` and integers come with ``row_scale [d]``."""
    if not isinstance(basis, Tensor) or not (basis.is_floating_point() or basis.dtype in INTEGERS):
        got = basis.dtype if isinstance(basis, Tensor) else type(basis).__name__
        raise InputError(f"{op}: basis: wanted floats, int8 or uint8, got {got}")
    columns = -(-m // 2) if basis.dtype == torch.uint8 else m
    if basis.ndim != 2 or basis.shape[1] != columns:
        raise InputError(
            f"{op}: basis: wanted [d, m] with m = {m}"
            + (f", two a byte: [d, {columns}]" if basis.dtype == torch.uint8 else "")
            + f", got {list(basis.shape)}"
        )
    if (basis.dtype in INTEGERS) != (row_scale is not None):
        wanted = "[d], the scale of a row of integers" if row_scale is None else "None for floats"
        raise InputError(f"{op}: row_scale: wanted {wanted} (basis is {basis.dtype})")


def widened(rows: Tensor, m: int, dtype: torch.dtype) -> Tensor:
    """Stored rows -> their numbers ``[rows, m]`` in ``dtype``, integers without their scale."""
    if rows.dtype != torch.uint8:
        return rows.to(dtype)
    pairs = torch.stack((rows & 15, rows >> 4), -1).flatten(1)
    return pairs[:, :m].to(dtype) - 8


def blocks(basis: Tensor, m: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """(rows, those rows of the basis in ``dtype``)."""
    d = basis.shape[0]
    step = d if basis.dtype == dtype else max(1, _BLOCK_NUMBERS // max(m, 1))
    for start in range(0, d, max(step, 1)):
        rows = slice(start, min(start + step, d))
        yield rows, widened(basis[rows], m, dtype)


def expand(c: Tensor, basis: Tensor) -> Tensor:
    """c ``[k, m]`` -> c V^T ``[k, d]`` in c's dtype."""
    parts = [c @ block.mT for _, block in blocks(basis, c.shape[1], c.dtype)]
    return torch.cat(parts, dim=1) if parts else c.new_zeros(c.shape[0], 0)


def contract(z: Tensor, basis: Tensor, m: int) -> Tensor:
    """z ``[k, d]`` -> z V ``[k, m]`` in z's dtype."""
    total = z.new_zeros(z.shape[0], m)
    for rows, block in blocks(basis, m, z.dtype):
        total = total.addmm(z[:, rows], block)
    return total


def quantized(basis: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """A basis of floats -> (int8, or uint8 of two 4-bit numbers; row_scale ``[d]`` float32).

    8 bits: a row's largest number is 127. 4 bits: the scale, among shares of that, of the least
    squared error; a clipped tail costs less than 15 coarse steps.
    """
    top = (1 << (bits - 1)) - 1
    shares = [1.0] if bits == 8 else [1 - 0.05 * i for i in range(13)]
    stored, scales = [], []
    for _, block in blocks(basis, basis.shape[1], torch.float32):
        largest = block.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        best = torch.full_like(largest, torch.inf)
        scale, numbers = largest, torch.zeros_like(block)
        for share in shares:
            trial = share * largest / top
            steps = (block / trial).round_().clamp_(-top - 1, top)
            error = (steps * trial - block).square_().sum(1, keepdim=True)
            better = error < best
            best, scale = torch.where(better, error, best), torch.where(better, trial, scale)
            numbers = torch.where(better, steps, numbers)
        stored.append(numbers.to(torch.int8))
        scales.append(scale[:, 0])
    integers = torch.cat(stored) if stored else basis.to(torch.int8)
    row_scale = torch.cat(scales) if scales else basis.new_zeros(0, dtype=torch.float32)
    if bits == 8:
        return integers, row_scale
    pairs = torch.nn.functional.pad(integers + 8, (0, basis.shape[1] % 2)).to(torch.uint8)
    return pairs[:, ::2] | pairs[:, 1::2] << 4, row_scale


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any is, else float32: 16-bit numbers are stored, never summed."""
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def no_gradient(op: str, **constants: Tensor | None) -> None:
    """InputError where a gradient is asked of a constant of the space."""
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in constants.values()
    ):
        raise InputError(f"{op}: {', '.join(constants)} are constants: detach() them first")
