"""Coefficients of adapters: ``c = ((w - mean) / std) V``; a coordinate of std 0 adds nothing.

A basis of integers counts in units of ``row_scale``. The same contraction with another prologue,
``z = std * dL/dw``, is the backward of ``reconstruct``; the backward of both is ``reconstruct``
without a mean. Dravid et al., "Interpreting the Weight Space of Customized Diffusion Models",
2024, section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _basis, _dispatch
from ._check import shapes

_dispatch.library.define(
    "project(Tensor source, Tensor basis, Tensor? mean, Tensor std, Tensor? row_scale, "
    "SymInt m, bool divide, str? backend=None) -> Tensor"
)


def _divisor(std: Tensor) -> Tensor:
    # x / inf is 0 for every finite x, and NaN or inf in a fixed coordinate still shows as NaN.
    return std.masked_fill(std == 0, torch.inf)


def project_reference(
    source: Tensor,
    basis: Tensor,
    mean: Tensor | None,
    std: Tensor,
    row_scale: Tensor | None = None,
    m: int | None = None,
    divide: bool = True,
) -> Tensor:
    """The definition in plain torch, summed in float32 (float64 if an input is).

    divide: z = ((source - mean) / std) * row_scale, otherwise z = source * std * row_scale.
    """
    work = _basis.compute_dtype(source, basis, mean, std, row_scale)
    z, std = source.to(work), std.to(work)
    centred = z if mean is None or not divide else z - mean.to(work)
    z = centred / _divisor(std) if divide else z * std
    z = z if row_scale is None else z * row_scale.to(work)
    return _basis.contract(z, basis, _columns(basis) if m is None else m)


def _columns(basis: Tensor) -> int:
    return basis.shape[1] * (2 if basis.dtype == torch.uint8 else 1)


def _forward(
    source: Tensor,
    basis: Tensor,
    mean: Tensor | None,
    std: Tensor,
    row_scale: Tensor | None,
    m: int,
    divide: bool,
    backend: str | None = None,
) -> Tensor:
    launch = _dispatch.kernels("project", backend, source, basis, mean, std, row_scale)
    if launch is None:
        return project_reference(source, basis, mean, std, row_scale, m, divide)
    out = source.new_empty(source.shape[0], m, dtype=torch.float32)
    if out.numel():
        constants = (_dispatch.vector(t) for t in (mean, std, row_scale))
        launch.project(_dispatch.rows(source), _dispatch.rows(basis), *constants, divide, out)
    return out


def _fake(
    source: Tensor,
    basis: Tensor,
    mean: Tensor | None,
    std: Tensor,
    row_scale: Tensor | None,
    m: int,
    divide: bool,
    backend: str | None = None,
) -> Tensor:
    work = _basis.compute_dtype(source, basis, mean, std, row_scale)
    return source.new_empty(source.shape[0], m, dtype=work)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    source, basis, _, std, row_scale, _, ctx.divide, ctx.backend = inputs
    ctx.save_for_backward(basis, std, row_scale)
    ctx.dtype = source.dtype


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    basis, std, row_scale = ctx.saved_tensors
    gain = 1 / _divisor(std.to(g.dtype)) if ctx.divide else std
    dw = torch.ops.w2w_fast.reconstruct.default(
        g, basis, None, gain, row_scale, ctx.dtype, ctx.backend
    )
    return dw, None, None, None, None, None, None, None


_dispatch.library.impl("project", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("w2w_fast::project", _fake, lib=_dispatch.library)
torch.library.register_autograd(
    "w2w_fast::project", _backward, setup_context=_setup, lib=_dispatch.library
)


def project(
    w: Tensor,
    basis: Tensor,
    mean: Tensor | None,
    std: Tensor,
    *,
    row_scale: Tensor | None = None,
    m: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """w ``[k, d]``, basis, mean and std ``[d]`` -> c ``[k, m]``, float32 or float64.

    basis, row_scale and backend as ``reconstruct`` takes them; m is needed where an odd number of
    4-bit columns is stored. Differentiable in w. Raises InputError for shapes, devices or dtypes
    that do not fit, and where a gradient is asked of a constant of the space.
    """
    shapes("project", w=(w, "k d"))
    if m is None:
        m = _columns(basis) if isinstance(basis, Tensor) and basis.ndim == 2 else 0
    _basis.check("project", basis, m, row_scale)
    constants = {"mean": mean, "std": std, "row_scale": row_scale}
    given = {name: (t, "d") for name, t in constants.items() if t is not None}
    shapes("project", {"d": w.shape[1]}, w, basis=(basis, "d m"), **given)
    _basis.no_gradient("project", basis=basis, **constants)
    return torch.ops.w2w_fast.project.default(w, basis, mean, std, row_scale, m, True, backend)
