"""Adapters from coefficients: ``w = mean + std * (c V^T)``.

Backward: ``dL/dc = (std * dL/dw) V``. mean, std and V are constants of a space. Dravid et al.,
"Interpreting the Weight Space of Customized Diffusion Models", 2024, section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from . import _basis, _dispatch
from ._check import shapes

_dispatch.library.define(
    "reconstruct(Tensor c, Tensor basis, Tensor mean, Tensor std, ScalarType dtype) -> Tensor"
)


def reconstruct_reference(
    c: Tensor, basis: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype
) -> Tensor:
    """The definition in plain torch, summed in float32 (float64 if an input is)."""
    work = _basis.compute_dtype(c, basis, mean, std)
    return (mean.to(work) + std.to(work) * _basis.expand(c.to(work), basis)).to(dtype)


def _fake(c: Tensor, basis: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    return c.new_empty(c.shape[0], basis.shape[0], dtype=dtype)


def _cpu(c: Tensor, basis: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    out = c.new_empty(c.shape[0], basis.shape[0], dtype=dtype)
    if _dispatch.backend("reconstruct", c, basis, mean, std, out)[0] == "torch":
        return reconstruct_reference(c, basis, mean, std, dtype)
    c, mean, std = (t.to(torch.float32).contiguous() for t in (c, mean, std))
    if basis.stride(1) != 1 or basis.stride(0) < basis.shape[1]:
        basis = basis.contiguous()
    (k, m), d = c.shape, basis.shape[0]
    if out.numel():
        native, codes = _dispatch.native(), _dispatch.NATIVE_DTYPES
        native.reconstruct(
            c.data_ptr(), k, m, c.stride(0),
            basis.data_ptr(), codes[basis.dtype], d, basis.stride(0),
            mean.data_ptr(), std.data_ptr(),
            out.data_ptr(), codes[dtype], out.stride(0),
            torch.get_num_threads(),
        )  # fmt: skip
    return out


_dispatch.library.impl("reconstruct", reconstruct_reference, "CompositeExplicitAutograd")
_dispatch.library.impl("reconstruct", _cpu, "CPU")
torch.library.register_fake("w2w_fast::reconstruct", _fake, lib=_dispatch.library)


class _Reconstruct(torch.autograd.Function):
    @staticmethod
    def forward(c: Tensor, *args: Any) -> Tensor:
        return torch.ops.w2w_fast.reconstruct.default(c, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        c, basis, _, std, _ = inputs
        ctx.save_for_backward(basis, std)
        ctx.work, ctx.dtype = _basis.compute_dtype(c, basis, std), c.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        basis, std = ctx.saved_tensors
        z = grad.to(ctx.work) * std.to(ctx.work)
        return _basis.contract(z, basis).to(ctx.dtype), None, None, None, None


def reconstruct(
    c: Tensor, basis: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """c ``[k, m]``, basis ``[d, m]``, mean and std ``[d]`` -> w ``[k, d]`` in ``dtype`` (c's).

    Differentiable in c. Raises InputError for shapes, devices or dtypes that do not fit, and
    where a gradient is asked of a constant of the space.
    """
    shapes("reconstruct", c=(c, "k m"), basis=(basis, "d m"), mean=(mean, "d"), std=(std, "d"))
    dtype = c.dtype if dtype is None else dtype
    if torch.is_grad_enabled() and (basis.requires_grad or mean.requires_grad or std.requires_grad):
        raise InputError("reconstruct: basis, mean and std are constants: detach() them first")
    if torch.is_grad_enabled() and c.requires_grad:
        return _Reconstruct.apply(c, basis, mean, std, dtype)
    return torch.ops.w2w_fast.reconstruct.default(c, basis, mean, std, dtype)
