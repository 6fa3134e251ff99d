"""Seeded inputs that the cases share. Large ones are windows on a pool: drawing 2 GB takes long."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from w2w_fast import Layout

from ..bench import Case, Setting, Work

SD15 = Layout.sd15()
BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4}
_POOL = (1 << 24) - 3  # odd, so that no two rows of a basis hold the same numbers


def layout(quick: bool) -> Layout:
    """SD1.5's, or its first modules."""
    return Layout(SD15.modules[:4], SD15.rank, SD15.alpha) if quick else SD15


def normal(
    *shape: int, seed: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)


@dataclass(frozen=True)
class Stored:
    """A space as it is stored: basis ``[d, m]``, or uint8 ``[d, m / 2]`` of two numbers a byte."""

    basis: Tensor
    mean: Tensor
    std: Tensor
    row_scale: Tensor | None
    m: int

    @property
    def bytes(self) -> int:
        """What one pass over the space reads."""
        rest = (self.mean, self.std, self.row_scale)
        return sum(t.numel() * t.itemsize for t in (self.basis, *rest) if t is not None)

    def exact(self, rows: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
        """Those rows or columns of the basis in float64, the scale of a row left out."""
        part = self.basis if rows is None else self.basis[rows]
        if part.dtype != torch.uint8:
            return (part if columns is None else part[:, columns]).double()
        if columns is None:
            columns = torch.arange(self.m, device=part.device)
        return (part[:, columns // 2] >> (columns % 2 * 4).to(torch.uint8) & 15).double() - 8


@lru_cache(maxsize=1)
def space(d: int, m: int, kind: str, device: str) -> Stored:
    """The space of one size and kind of basis (m even); only the last one asked for is kept."""
    generator = torch.Generator().manual_seed(1)
    row_scale = None
    if kind in ("float32", "bfloat16"):
        pool = torch.randn(_POOL, generator=generator).to(getattr(torch, kind))
        basis = torch.empty(d, m, dtype=pool.dtype, device=device)
    else:
        low, high, dtype = (-127, 128, torch.int8) if kind == "int8" else (0, 256, torch.uint8)
        pool = torch.randint(low, high, (_POOL,), generator=generator).to(dtype)
        basis = torch.empty(d, m if kind == "int8" else m // 2, dtype=dtype, device=device)
        row_scale = (0.5 + torch.rand(d, generator=generator)) / (127 if kind == "int8" else 8)
        row_scale = row_scale.to(device)
    pool, flat = pool.to(device), basis.view(-1)
    for start in range(0, flat.numel(), _POOL):
        part = flat[start : start + _POOL]
        part.copy_(pool[: part.numel()])
    mean = normal(d, seed=2, device=device)
    std = normal(d, seed=3, device=device).abs() + 0.1
    std[::97] = 0  # coordinates that never moved
    return Stored(basis, mean, std, row_scale, m)


def basis_cases(
    op: str,
    build: Callable[[Setting, int, int, str, int], Work],
    setting: Setting,
    sizes: list[tuple[int, int, str, int]],
) -> list[Case]:
    """Cases of an op that reads the basis once, of sizes (d, m, kind, k)."""
    return [
        Case(
            op,
            f"m={m} {kind} k={k}",
            partial(build, setting, d, m, kind, k),
            {"d": d, "m": m, "basis": kind, "k": k},
            bytes=d * m * BITS[kind] // 8 + 4 * d * (2 + ("int" in kind) + k) + 4 * k * m,
            flops=2 * k * d * m,
            floor="read",
        )
        for d, m, kind, k in sizes
    ]


def some(size: int, most: int, device: str) -> Tensor:
    """The rows or columns that a check looks at: all, or so many with both ends among them."""
    n = min(size, most)
    return torch.linspace(0, size - 1, n, dtype=torch.float64).round().long().to(device)


def modules(quick: bool, dtype: torch.dtype, device: str) -> list[Tensor]:
    """The weights of the adapted modules of an SD1.5 UNet, scaled as a fresh Linear's."""
    return [
        normal(m.out_features, m.in_features, seed=i, device=device).mul_(m.in_features**-0.5)
        .to(dtype)
        for i, m in enumerate(layout(quick).modules)
    ]  # fmt: skip


def adapters(lay: Layout, k: int, seed: int, device: str = "cpu") -> Tensor:
    """w ``[k, d]`` float32 whose effect on a module is about .4 of the base's."""
    w = normal(k, lay.size, seed=seed)
    for module, (A, B) in zip(lay.modules, lay.slices(), strict=True):
        w[:, A] *= module.in_features**-0.5
        w[:, B] *= 0.4 / lay.scale
    return w.to(device)
