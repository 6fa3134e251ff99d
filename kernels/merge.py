"""``W' = W + scale * (B A)`` for a list of modules in one launch, from pristine weights.

A table in device memory tells each program its module: where the tensors lie, as distances from
those of the first module, so that new tensors in the same layout (the next identity's A and B,
views of one flat adapter) find their table already there.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _basis
from ._basis import rounded

_ROWS, _COLUMNS = 64, 64


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


@lru_cache(maxsize=64)
def _table(key: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[Tensor, int]:
    """(rows of a module's 4 distances, out, in, first tile, 0; the number of tiles)."""
    table, tiles = [], 0
    for *distances, n_out, n_in in key:
        table.append([*distances, n_out, n_in, tiles, 0])
        tiles += triton.cdiv(n_out, _ROWS) * triton.cdiv(n_in, _COLUMNS)
    return torch.tensor(table, dtype=torch.int64, device=device), tiles


def merge(
    outs: Sequence[Tensor],
    weights: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scale: float,
) -> None:
    """weights ``[out, in]``, A ``[r, in]``, B ``[out, r]``, one of each a module -> outs.

    All contiguous; outs and weights of one dtype, A and B of one, the same r: floats of 16 or 32
    bits. Sums in float32, rounds once. outs are not weights: these stay pristine. The first call
    with a layout copies a small table to the device: make it before capturing a CUDA graph.
    InputError for what does not fit.
    """
    lists = {"outs": outs, "weights": weights, "A": A, "B": B}
    for name, tensors in lists.items():
        _basis.require(
            "merge", name, len(tensors) == len(weights), f"{len(weights)} tensors", len(tensors)
        )
    if not weights:
        return
    r = A[0].shape[0]
    for i, (out, weight, a, b) in enumerate(zip(outs, weights, A, B, strict=True)):
        n_out, n_in = weight.shape
        for name, t, like, shape in (
            ("outs", out, weights[0], (n_out, n_in)),
            ("weights", weight, weights[0], (n_out, n_in)),
            ("A", a, A[0], (r, n_in)),
            ("B", b, A[0], (n_out, r)),
        ):
            good = t.shape == shape and t.dtype == like.dtype and t.is_contiguous()
            good = good and t.dtype in _basis.FLOATS and t.device == weights[0].device
            wanted = f"contiguous {list(shape)} of {like.dtype} on {weights[0].device}"
            got = f"{list(t.shape)} of {t.dtype} on {t.device}, strides {t.stride()}"
            _basis.require("merge", f"{name}[{i}]", good, wanted, got)
        same = out.data_ptr() == weight.data_ptr() and weight.numel() and not weight.is_meta
        _basis.require("merge", f"outs[{i}]", not same, "other memory than weight's", "the same")

    firsts = [tensors[0].data_ptr() for tensors in lists.values()]
    key = tuple(
        (*(t.data_ptr() - first for t, first in zip(module, firsts, strict=True)), *module[1].shape)
        for module in zip(*lists.values(), strict=True)
    )
    table, tiles = _table(key, weights[0].device)
    if not tiles:
        return
    aligned = all(
        weight.shape[1] % 8 == 0 and out.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0
        for out, weight in zip(outs, weights, strict=True)
    )
    with _basis.on(weights[0]):
        merge_kernel[(tiles,)](
            outs[0], weights[0], A[0], B[0], table, len(weights), float(scale),
            r, aligned, triton.next_power_of_2(len(weights)), _ROWS, _COLUMNS, num_warps=8,
        )  # fmt: skip
