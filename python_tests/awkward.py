"""Inputs that kernels get wrong: odd sizes, strides, repeated rows, poisoned neighbours."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

DEVICE = "cpu"
"""Where tensors are made; the backend under test sets it."""


def contiguous(t: Tensor) -> Tensor:
    return t.contiguous()


def transposed(t: Tensor) -> Tensor:
    """The same numbers, last two dimensions swapped in memory."""
    return t.mT.contiguous().mT if t.ndim > 1 else t.contiguous()


def sliced(t: Tensor) -> Tensor:
    """The same numbers, every second entry of a larger tensor whose other entries are poison."""
    poison = torch.nan if t.is_floating_point() else 99
    sizes = [2 * size + 1 for size in t.shape]
    big = torch.full(sizes, poison, dtype=t.dtype, device=t.device)
    view = big[tuple(slice(1, 2 * size + 1, 2) for size in t.shape)]
    return view.copy_(t)


def expanded(t: Tensor) -> Tensor:
    """The first row repeated with stride 0 (other numbers than t)."""
    return t[:1].expand_as(t) if t.ndim and len(t) else t


VIEWS: list[Callable[[Tensor], Tensor]] = [contiguous, transposed, sliced, expanded]


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def stored(d: int, m: int, bits: int, seed: int = 0) -> tuple[Tensor, Tensor | None, Tensor]:
    """(a basis stored in ``bits``, row_scale or None, the numbers they stand for in float64)."""
    if bits >= 16:
        dtype = {64: torch.float64, 32: torch.float32, 16: torch.bfloat16}[bits]
        basis = normal(d, m, seed=seed, dtype=dtype)
        return basis, None, basis.double()
    generator = torch.Generator().manual_seed(seed)
    top = 1 << (bits - 1)
    numbers = torch.randint(-top, top, (d, m), generator=generator, dtype=torch.int8).to(DEVICE)
    row_scale = normal(d, seed=seed + 1).abs() / top
    basis, exact = numbers, numbers.double() * row_scale.double()[:, None]
    if bits == 4:
        # The unused half of the last byte holds 15: nothing may come of it.
        nibbles = torch.full((d, m + m % 2), 15, dtype=torch.uint8, device=DEVICE)
        nibbles[:, :m] = (numbers + 8).to(torch.uint8)
        basis = nibbles[:, ::2] | nibbles[:, 1::2] << 4
    return basis, row_scale, exact


def space(d: int, m: int, bits: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, dict, Tensor]:
    """(basis, mean, std, {"row_scale": ...}, the basis's numbers in float64); every third std 0."""
    basis, row_scale, exact = stored(d, m, bits, seed)
    # No number outweighs the sum it is in.
    std = normal(d, seed=seed + 2).abs() + 0.1
    std[::3] = 0
    return basis, normal(d, seed=seed + 3), std, {"row_scale": row_scale}, exact
