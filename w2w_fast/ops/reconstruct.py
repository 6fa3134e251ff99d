"""Adapters from coefficients: ``w = mean + std * (c V^T)``.

A basis of integers counts in units of ``row_scale``, which joins std: ``std * row_scale``.
Backward: ``dL/dc = (std * dL/dw) V``, which is ``project``'s contraction. mean, std and V are
constants of a space. Dravid et al., "Interpreting the Weight Space of Customized Diffusion
Models", 2024, section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _basis, _dispatch
from ._check import shapes

_dispatch.library.define(
    "reconstruct(Tensor c, Tensor basis, Tensor? mean, Tensor std, Tensor? row_scale, "
    "ScalarType dtype, str? backend=None) -> Tensor"
)


def reconstruct_reference(
    c: Tensor,
    basis: Tensor,
    mean: Tensor | None,
    std: Tensor,
    row_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The definition in plain torch, summed in float32 (float64 if an input is)."""
    work = _basis.compute_dtype(c, basis, mean, std, row_scale)
    gain = std.to(work) if row_scale is None else std.to(work) * row_scale.to(work)
    w = gain * _basis.expand(c.to(work), basis)
    w = w if mean is None else w + mean.to(work)
    return w.to(c.dtype if dtype is None else dtype)


def _forward(
    c: Tensor,
    basis: Tensor,
    mean: Tensor | None,
    std: Tensor,
    row_scale: Tensor | None,
    dtype: torch.dtype,
    backend: str | None = None,
) -> Tensor:
    out = _fake(c, basis, mean, std, row_scale, dtype)
    launch = _dispatch.kernels("reconstruct", backend, out, c, basis, mean, std, row_scale)
    if launch is None:
        return reconstruct_reference(c, basis, mean, std, row_scale, dtype)
    if out.numel():
        constants = (_dispatch.vector(t) for t in (mean, std, row_scale))
        c = _dispatch.rows(c.to(torch.float32))
        launch.reconstruct(c, _dispatch.rows(basis), *constants, out)
    return out


def _fake(
    c: Tensor,
    basis: Tensor,
    mean: Tensor | None,
    std: Tensor,
    row_scale: Tensor | None,
    dtype: torch.dtype,
    backend: str | None = None,
) -> Tensor:
    return c.new_empty(c.shape[0], basis.shape[0], dtype=dtype)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    c, basis, _, std, row_scale, _, ctx.backend = inputs
    ctx.save_for_backward(basis, std, row_scale)
    ctx.m, ctx.dtype = c.shape[1], c.dtype


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    basis, std, row_scale = ctx.saved_tensors
    dc = torch.ops.w2w_fast.project.default(
        g, basis, None, std, row_scale, ctx.m, False, ctx.backend
    )
    return dc.to(ctx.dtype), None, None, None, None, None, None


_dispatch.library.impl("reconstruct", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("w2w_fast::reconstruct", _fake, lib=_dispatch.library)
torch.library.register_autograd(
    "w2w_fast::reconstruct", _backward, setup_context=_setup, lib=_dispatch.library
)


def reconstruct(
    c: Tensor,
    basis: Tensor,
    mean: Tensor | None,
    std: Tensor,
    dtype: torch.dtype | None = None,
    *,
    row_scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """c ``[k, m]``, basis, mean and std ``[d]`` -> w ``[k, d]`` in ``dtype`` (c's).

    basis is ``[d, m]`` of floats; or int8, or uint8 ``[d, ceil(m / 2)]`` (4 bits, two a byte),
    with row_scale ``[d]``. mean None is 0. Differentiable in c. ``backend`` forces one of
    ``_dispatch.BACKENDS``. Raises InputError for shapes, devices or dtypes that do not fit, where
    a gradient is asked of a constant of the space, and where a forced backend cannot serve.
    """
    sizes = shapes("reconstruct", c=(c, "k m"))
    _basis.check("reconstruct", basis, sizes["m"], row_scale)
    constants = {"mean": mean, "std": std, "row_scale": row_scale}
    given = {name: (t, "d") for name, t in constants.items() if t is not None}
    shapes("reconstruct", {"d": basis.shape[0]}, c, basis=(basis, None), **given)
    _basis.no_gradient("reconstruct", basis=basis, **constants)
    dtype = c.dtype if dtype is None else dtype
    args = (c, basis, mean, std, row_scale, dtype, backend)
    return _forward(*args) if _dispatch.plain(c) else torch.ops.w2w_fast.reconstruct.default(*args)
