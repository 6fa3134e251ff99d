"""A Linear with one adapter a sample: ``y = x W^T + bias + scale * (x A^T) B^T``.

``low_rank`` is the last term, which ``attach`` adds to the output of a Linear it hooks. Its
backward is written out: with ``s = x A^T`` and ``u = g B``,

    dL/dx = u A      dL/dA = u^T x      dL/dB = g^T s

which at rank 1 needs two matrix-vector products and two outer products a sample, a third to a
half of what autograd records. Hu et al., LoRA, 2021, section 4.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import InputError
from ._check import shapes


def adapted_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float | Tensor
) -> Tensor:
    """The definition in plain torch; shapes as ``adapted_linear``."""
    return functional.linear(x, weight, bias) + (x @ A.mT) @ _scaled(B, scale).mT


def _scaled(B: Tensor, scale: float | Tensor) -> Tensor:
    return B * (scale.to(B.dtype)[:, None, None] if isinstance(scale, Tensor) else scale)


def _product(s: Tensor, b: Tensor, base: Tensor | None = None) -> Tensor:
    """base + s b with s ``[b, t, r]``, b ``[b, r, n]``.

    At rank 1 one pass of broadcasting, except in 16 bits on a CPU, where oneDNN's bmm is twice
    as fast.
    """
    if s.shape[-1] == 1 and (s.is_cuda or s.dtype == torch.float32):
        return s * b if base is None else torch.addcmul(base, s, b)
    return torch.bmm(s, b) if base is None else torch.baddbmm(base, s, b)


class _LowRank(torch.autograd.Function):
    """base ``[b, t, out]`` or None, x ``[b, t, in]``, A ``[b, r, in]``, Bt ``[b, r, out]``."""

    @staticmethod
    def forward(base: Tensor | None, x: Tensor, A: Tensor, Bt: Tensor) -> tuple[Tensor, Tensor]:
        s = torch.bmm(x, A.mT)
        return _product(s, Bt, base), s

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs[1:], output[1])

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: Tensor) -> tuple[Tensor | None, ...]:
        if g is None:
            return None, None, None, None
        x, A, Bt, s = ctx.saved_tensors
        wants_base, wants_x, wants_A, wants_B = ctx.needs_input_grad
        u = torch.bmm(g, Bt.mT) if wants_x or wants_A else None
        return (
            g if wants_base else None,
            _product(u, A) if wants_x else None,
            torch.bmm(u.mT, x) if wants_A else None,
            torch.bmm(s.mT, g) if wants_B else None,
        )


def add_low_rank(base: Tensor | None, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """base + (x A^T) B^T without checks, in base's dtype (x's if None): the hooks' inner call.

    x ``[b, ..., in]``; A and B ``[b, ...]`` one a sample, or ``[1, ...]`` for all of them.
    """
    like = x if base is None else base
    x, A, B = x.to(like.dtype), A.to(like), B.to(like)
    # The view of a rank-1 B as a row, not its transpose: MKL is six times slower on the latter.
    Bt = B.flatten(1)[:, None] if B.shape[2] == 1 else B.mT
    shape = (*x.shape[:-1], B.shape[1])
    # Equal adapters turn the whole batch into one sample: one GEMM.
    rows = A.shape[0]
    tokens = math.prod(x.shape[:-1]) // max(rows, 1)
    x = x.reshape(rows, tokens, x.shape[-1])
    base = base if base is None else base.reshape(rows, tokens, base.shape[-1])
    # Autocast would narrow a float32 x again; the dtypes are settled above.
    with torch.autocast(x.device.type, enabled=False):
        return _LowRank.apply(base, x, A, Bt)[0].reshape(shape)


def low_rank(x: Tensor, A: Tensor, B: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """x ``[b, t, in]``, A ``[b, r, in]``, B ``[b, out, r]`` -> scale * (x A^T) B^T ``[b, t, out]``.

    A and B may be ``[1, ...]``: one adapter for all. scale is a number or ``[b]``, one a sample.
    In x's dtype; differentiable in x, A and B. InputError for shapes that do not fit.
    """
    rows, letter = (x.shape[0], "b") if A.shape[:1] != (1,) else (1, "k")
    shapes("low_rank", x=(x, "b t in"), A=(A, f"{letter} r in"), B=(B, f"{letter} out r"))
    if isinstance(scale, Tensor) and scale.ndim:
        if scale.shape != x.shape[:1]:
            raise InputError(
                f"low_rank: scale: wanted a number or [{x.shape[0]}] (one a sample), "
                f"got {list(scale.shape)}"
            )
        A = A.expand(x.shape[0], -1, -1) if rows == 1 else A
        return add_low_rank(None, x, A, _scaled(B, scale))
    return add_low_rank(None, x, A, B * scale)


def adapted_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float | Tensor = 1.0,
) -> Tensor:
    """``linear(x, weight, bias) + low_rank(x, A, B, scale)``, ``[b, t, in]`` -> ``[b, t, out]``.

    weight ``[out, in]``, bias ``[out]`` or None; the rest as ``low_rank``.
    """
    shapes("adapted_linear", x=(x, "b t in"), weight=(weight, "out in"), B=(B, "k out r"))
    return functional.linear(x, weight, bias) + low_rank(x, A, B, scale)
