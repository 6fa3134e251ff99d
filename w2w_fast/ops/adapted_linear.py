"""A Linear with one adapter a sample: ``y = x W^T + bias + scale * (x A^T) B^T``.

``low_rank`` is the last term, which ``attach`` adds to the output of a Linear it hooks. With
``s = x A^T`` and ``u = g B`` its backward is

    dL/dx = scale u A      dL/dA = scale u^T x      dL/dB = scale g^T s

where dL/dA and dL/dB of an adapter are summed over the samples that use it; neither Delta W nor a
gradient of W is ever formed. Hu et al., LoRA, 2021, section 4. Without gradients ``adapted_linear``
takes whichever of two routes its shape makes the faster: see ``route``.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import InputError
from . import _dispatch
from ._check import shapes

_dispatch.library.define(
    "low_rank(Tensor? base, Tensor x, Tensor A, Tensor B, Tensor? index, Tensor? scales, "
    "float scale, str? backend=None) -> (Tensor, Tensor)"
)
_dispatch.library.define(
    "low_rank_backward(Tensor g, Tensor x, Tensor A, Tensor B, Tensor s, Tensor? index, "
    "Tensor? scales, float scale, bool[3] needs, str? backend=None) -> (Tensor, Tensor, Tensor)"
)


def adapted_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float | Tensor
) -> Tensor:
    """The definition in plain torch; shapes as ``adapted_linear``."""
    scale = scale.to(B.dtype)[:, None, None] if isinstance(scale, Tensor) else scale
    return functional.linear(x, weight, bias) + (x @ A.mT) @ (B * scale).mT


# --- the low-rank term in plain torch -----------------------------------------------------------


def _row(B: Tensor) -> Tensor:
    """B ``[k, out, r]`` -> B^T. A rank-1 B as a row, not its transpose: MKL is six times slower
    on the latter."""
    return B.flatten(1)[:, None] if B.shape[2] == 1 else B.mT


def _product(s: Tensor, b: Tensor, base: Tensor | None = None) -> Tensor:
    """base + s b with s ``[b, t, r]``, b ``[b, r, n]``.

    At rank 1 one pass of broadcasting, except in 16 bits on a CPU, where oneDNN's bmm is twice
    as fast.
    """
    if s.shape[-1] == 1 and (s.is_cuda or s.dtype == torch.float32):
        return s * b if base is None else torch.addcmul(base, s, b)
    return torch.bmm(s, b) if base is None else torch.baddbmm(base, s, b)


def _one_a_sample(
    x: Tensor, A: Tensor, B: Tensor, index: Tensor | None, scales: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """A and scaled B of every sample in x's dtype; those of one adapter for all stay ``[1, ...]``.

    Equal adapters then turn the whole batch into one sample: one GEMM.
    """
    A, B = A.to(x.dtype), B.to(x.dtype)
    if index is not None:
        A, B = A[index], B[index]
    if scales is not None:
        B = B * scales.to(B.dtype)[:, None, None]
        A = A.expand(B.shape[0], -1, -1)
    return A, B if scale == 1.0 else B * scale


def low_rank_reference(
    base: Tensor | None,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    index: Tensor | None = None,
    scales: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(base + scale * (x A^T) B^T ``[b, t, out]``, x A^T in float32), in plain torch."""
    A, B = _one_a_sample(x, A, B, index, scales, scale)
    batch, (k, n_out, r) = x.shape[:2], B.shape
    x = x.reshape(k, -1, x.shape[-1]) if x.numel() else x.new_zeros(k, 0, x.shape[-1])
    base = base if base is None else base.reshape(k, -1, n_out)
    s = torch.bmm(x, A.mT)
    return _product(s, _row(B), base).reshape(*batch, n_out), s.float().reshape(*batch, r)


def _backward_reference(
    g: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    s: Tensor,
    index: Tensor | None,
    scales: Tensor | None,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    A1, B1 = _one_a_sample(x, A, B, index, scales, scale)
    b, k = x.shape[0], B1.shape[0]
    dx, dA, dB = (like.new_empty(0) for like in (x, A, B))
    if not x.shape[1] * b:
        return (
            torch.zeros_like(x) if needs[0] else dx,
            torch.zeros_like(A) if needs[1] else dA,
            torch.zeros_like(B) if needs[2] else dB,
        )
    flat = [t.reshape(k, -1, t.shape[-1]) for t in (g, x, s.to(x.dtype))]
    if needs[0] or needs[1]:
        u = torch.bmm(flat[0], _row(B1).mT)
    if needs[0]:
        dx = _product(u, A1).reshape(x.shape)
    if needs[1]:
        dA = _gathered(torch.bmm(u.mT, flat[1]), A, index)
    if needs[2]:
        dB = torch.bmm(flat[2].mT, flat[0]) * scale
        if scales is not None:
            dB = dB * scales.to(dB.dtype)[:, None, None]
        dB = _gathered(dB, B.mT, index).mT.contiguous()
    return dx, dA, dB


def _gathered(of_samples: Tensor, like: Tensor, index: Tensor | None) -> Tensor:
    """Gradients of every sample's adapter -> of the adapters, in like's shape and dtype."""
    if index is not None:
        total = of_samples.new_zeros(like.shape)
        return total.index_add_(0, index, of_samples).to(like.dtype)
    if of_samples.shape[0] != like.shape[0]:
        of_samples = of_samples.sum(0, keepdim=True)
    return of_samples.to(like.dtype)


# --- torch.ops.w2w_fast.low_rank ----------------------------------------------------------------


def _forward(
    base: Tensor | None,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    index: Tensor | None,
    scales: Tensor | None,
    scale: float,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    launch = _dispatch.kernels("adapted_linear", backend, x, base, A, B, scales)
    if launch is None:
        return low_rank_reference(base, x, A, B, index, scales, scale)
    y, s = _fake(base, x, A, B)
    A, B, index, scale = _prepared(A, B, index, scales, scale)
    if s.numel():
        base, x = _dispatch.rows(base), _dispatch.rows(x)
        launch.low_rank(base, x, A, B, index, scale, y, s)
    return y, s


def _prepared(
    A: Tensor, B: Tensor, index: Tensor | None, scales: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor | None, float | Tensor]:
    """What the launches take: contiguous A and B of one dtype, one scale or one a sample."""
    if A.dtype != B.dtype:
        A, B = A.float(), B.float()
    factor = scale if scales is None else _dispatch.vector(scales * scale)
    return A.contiguous(), B.contiguous(), None if index is None else index.contiguous(), factor


def _fake(base: Tensor | None, x: Tensor, A: Tensor, B: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    s = x.new_empty(*x.shape[:2], A.shape[1], dtype=torch.float32)
    return x.new_empty(*x.shape[:2], B.shape[1]), s


def _backward_op(
    g: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    s: Tensor,
    index: Tensor | None,
    scales: Tensor | None,
    scale: float,
    needs: list[bool],
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    launch = _dispatch.kernels("adapted_linear", backend, x, g, A, B, scales)
    if launch is None:
        return _backward_reference(g, x, A, B, s, index, scales, scale, needs)
    dx, dA, dB = _fake_backward(g, x, A, B, s, index, scales, scale, needs)
    A, B, index, scale = _prepared(A, B, index, scales, scale)
    g, x, s = _dispatch.rows(g), _dispatch.rows(x), s.contiguous()
    if not s.numel():
        return tuple(t.zero_() for t in (dx, dA, dB))
    if needs[0] or needs[1]:
        u = torch.empty_like(s)
        launch.low_rank(None, g, B.mT, A.mT, index, scale, dx if needs[0] else None, u)
    if needs[1]:
        launch.outer(u, x, index, scale, dA)
    if needs[2]:
        launch.outer(s, g, index, scale, dB.mT)
    return dx, dA, dB


def _fake_backward(
    g: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    s: Tensor,
    index: Tensor | None,
    scales: Tensor | None,
    scale: float,
    needs: list[bool],
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    pairs = zip(needs, (x, A, B), strict=True)
    return tuple(like.new_empty(like.shape if need else 0) for need, like in pairs)


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    base, x, A, B, index, scales, ctx.scale, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, A, B, output[1], index, scales)


def _backward(ctx: Any, g: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if g is None:
        return (None,) * 8
    x, A, B, s, index, scales = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[1:4])
    grads = (None, None, None)
    if any(needs):
        grads = torch.ops.w2w_fast.low_rank_backward.default(
            g, x, A, B, s, index, scales, ctx.scale, needs, ctx.backend
        )
    grads = (t if need else None for t, need in zip(grads, needs, strict=True))
    return g if ctx.needs_input_grad[0] else None, *grads, None, None, None, None


_dispatch.library.impl("low_rank", _forward, "CompositeExplicitAutograd")
_dispatch.library.impl("low_rank_backward", _backward_op, "CompositeExplicitAutograd")
torch.library.register_fake("w2w_fast::low_rank", _fake, lib=_dispatch.library)
torch.library.register_fake("w2w_fast::low_rank_backward", _fake_backward, lib=_dispatch.library)
torch.library.register_autograd(
    "w2w_fast::low_rank", _backward, setup_context=_setup, lib=_dispatch.library
)


# --- the public functions -----------------------------------------------------------------------


def add_low_rank(
    base: Tensor | None,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    index: Tensor | None = None,
    scales: Tensor | None = None,
    scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """base + scale * (x A^T) B^T without checks, in base's dtype (x's if None): the hooks' call.

    x ``[b, ..., in]``; A and B ``[k, ...]`` by ``index [b]``, or one a sample, or one for all;
    scales ``[b]`` or None. Under torch.compile it is the definition, which the compiler fuses with
    its neighbours, unless a backend is forced.
    """
    like, wide = x if base is None else base, x.shape
    if x.dtype != like.dtype:
        x = x.to(like.dtype)
    if A.device != like.device:
        A, B = A.to(like.device), B.to(like.device)
    if len(wide) != 3:
        x = x.reshape(wide[0], math.prod(wide[1:-1]), wide[-1])
        base = base if base is None else base.reshape(*x.shape[:2], B.shape[1])
    args = (base, x, A, B, index, scales, scale)
    if _dispatch.plain(base, x, A, B, scales):
        call = partial(_forward, *args, backend)
    elif torch.compiler.is_compiling() and not _dispatch.forced(backend):
        call = partial(low_rank_reference, *args)
    else:
        call = partial(torch.ops.w2w_fast.low_rank.default, *args, backend)
    if torch.is_autocast_enabled(x.device.type):
        # Autocast would narrow a float32 x again; the dtypes are settled above.
        with torch.autocast(x.device.type, enabled=False):
            y = call()[0]
    else:
        y = call()[0]
    return y if len(wide) == 3 else y.reshape(*wide[:-1], y.shape[-1])


def low_rank(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float | Tensor = 1.0,
    *,
    index: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """x ``[b, t, in]``, A ``[k, r, in]``, B ``[k, out, r]`` -> scale * (x A^T) B^T ``[b, t, out]``.

    Sample i uses the adapter index[i] (int64 ``[b]``, each from 0 to k - 1: not checked on a GPU,
    which would have to be waited for); without an index k is b, or 1: one adapter for all. scale
    is a number or ``[b]``, one a sample. In x's dtype; differentiable in x, A and B. ``backend``
    forces one of ``_dispatch.BACKENDS``. InputError for what does not fit.
    """
    return _checked("low_rank", None, x, A, B, scale, index, backend)


def adapted_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float | Tensor = 1.0,
    *,
    index: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``linear(x, weight, bias) + low_rank(x, A, B, scale)``, ``[b, t, in]`` -> ``[b, t, out]``.

    weight ``[out, in]``, bias ``[out]`` or None; the rest as ``low_rank``.
    """
    shapes("adapted_linear", x=(x, "b t in"), weight=(weight, "out in"), B=(B, "k out r"))
    if not _dispatch.forced(backend) and _may_merge(x, weight, bias, A, B, scale, index):
        (b, t, n_in), n_out = x.shape, weight.shape[0]
        if route(x.device.type, x.dtype, t, n_in, n_out) == "merged":
            wide = scale[:, None, None] if isinstance(scale, Tensor) and scale.ndim else scale
            W = torch.baddbmm(weight.expand(b, -1, -1), B * wide, A).mT
            return torch.bmm(x, W) if bias is None else torch.baddbmm(bias, x, W)
    base = functional.linear(x, weight, bias)
    return _checked("adapted_linear", base, x, A, B, scale, index, backend)


def route(device: str, dtype: torch.dtype, t: int, n_in: int, n_out: int) -> str:
    """How ``adapted_linear`` is fastest at a shape, without gradients: "added" or "merged".

    merged: W + scale B A of each sample, then one batched product. It writes ``out x in`` numbers
    a sample and saves three passes over ``t`` rows, so it pays where t passes the width: measured
    at SD1.5's shapes (docs/benchmarks.md). Only in float32, since W' in 16 bits would be rounded
    once more, and only on CPUs, where it was measured.
    """
    pays = device == "cpu" and dtype == torch.float32 and t > max(n_in, n_out)
    return "merged" if pays else "added"


def _may_merge(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float | Tensor,
    index: Tensor | None,
) -> bool:
    """Whether the merged route gives what the other would: one adapter a sample, no gradients."""
    b, r = x.shape[0], A.shape[1:2]
    per_sample = isinstance(scale, Tensor) and scale.ndim
    tensors = (x, weight, bias, A, B, *([scale] if isinstance(scale, Tensor) else []))
    return (
        index is None
        and A.shape == (b, *r, x.shape[2])
        and B.shape == (b, weight.shape[0], *r)
        and not (per_sample and scale.shape != (b,))
        and all(t is None or (t.dtype == x.dtype and t.device == x.device) for t in tensors)
        and _dispatch.plain(*tensors)
    )


def _checked(
    op: str,
    base: Tensor | None,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float | Tensor,
    index: Tensor | None,
    backend: str | None,
) -> Tensor:
    one = index is None and A.shape[:1] != (1,)
    letter = "b" if one else "k"
    sizes = shapes(op, x=(x, "b t in"), A=(A, f"{letter} r in"), B=(B, f"{letter} out r"))
    b, k = sizes["b"], A.shape[0]
    if index is not None:
        good = isinstance(index, Tensor) and index.dtype == torch.int64 and index.shape == (b,)
        if not good or index.device != x.device:
            got = f"{index.dtype} {list(index.shape)}" if isinstance(index, Tensor) else index
            raise InputError(f"{op}: index: wanted int64 [{b}] on {x.device}, got {got}")
        if index.device.type == "cpu" and b and not 0 <= int(index.min()) <= int(index.max()) < k:
            raise InputError(f"{op}: index: wanted 0 to {k - 1}, got {index.tolist()}")
    scales, number = None, scale
    if isinstance(scale, Tensor) and scale.ndim:
        if scale.shape != (b,):
            raise InputError(
                f"{op}: scale: wanted a number or [{b}] (one a sample), got {list(scale.shape)}"
            )
        scales, number = scale, 1.0
    elif isinstance(scale, Tensor):
        number = float(scale)
    if scales is not None and scales.requires_grad:
        # Outside of the op, where autograd sees it.
        B, scales = _one_a_sample(x, A, B, index, scales, 1.0)[1], None
        A, index = A if index is None else A[index], None
        A = A.expand(b, -1, -1)
    return add_low_rank(base, x, A, B, index, scales, float(number), backend)
