"""``w' = w + amount * delta``: a step of flattened adapters, its delta computed beforehand."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import _basis
from ._basis import rounded

_BLOCK = 2048


@triton.jit
def edit_kernel(
    p_w, p_delta, p_amount, amount, p_out, d, stride_w, stride_out, BLOCK: tl.constexpr
):
    """A program: BLOCK parameters of one adapter. Neighbours share delta, not the adapter."""
    blocks = tl.cdiv(d, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    b_ds = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    if p_amount is not None:
        amount = tl.load(p_amount + row).to(tl.float32)
    b_w = tl.load(p_w + row * stride_w + b_ds, b_ds < d).to(tl.float32)
    b_w += amount * tl.load(p_delta + b_ds, b_ds < d).to(tl.float32)
    tl.store(p_out + row * stride_out + b_ds, rounded(b_w, p_out.dtype.element_ty), b_ds < d)


def edit(w: Tensor, delta: Tensor, amount: float | Tensor, out: Tensor) -> None:
    """w ``[k, d]``, delta ``[d]``, amount a number or ``[k]`` -> out ``[k, d]``, which may be w.

    As ``ops/_native.py`` says of every backend. Sums in float32, rounds once.
    """
    (k, d), numbers = w.shape, amount if isinstance(amount, Tensor) else None
    number = 0.0 if isinstance(amount, Tensor) else float(amount)
    with _basis.on(out):
        edit_kernel[(k * triton.cdiv(d, _BLOCK),)](
            w, delta, numbers, number, out, d, w.stride(0), out.stride(0), _BLOCK, num_warps=4,
        )  # fmt: skip
