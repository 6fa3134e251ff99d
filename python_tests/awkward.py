"""Inputs that kernels get wrong: odd sizes, strides, repeated rows, poisoned neighbours."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def contiguous(t: Tensor) -> Tensor:
    return t.contiguous()


def transposed(t: Tensor) -> Tensor:
    """The same numbers, last two dimensions swapped in memory."""
    return t.mT.contiguous().mT if t.ndim > 1 else t.contiguous()


def sliced(t: Tensor) -> Tensor:
    """The same numbers, every second entry of a larger tensor whose other entries are NaN."""
    big = torch.full([2 * size + 1 for size in t.shape], torch.nan, dtype=t.dtype)
    view = big[tuple(slice(1, 2 * size + 1, 2) for size in t.shape)]
    return view.copy_(t)


def expanded(t: Tensor) -> Tensor:
    """The first row repeated with stride 0 (other numbers than t)."""
    return t[:1].expand_as(t) if t.ndim and len(t) else t


VIEWS: list[Callable[[Tensor], Tensor]] = [contiguous, transposed, sliced, expanded]


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
