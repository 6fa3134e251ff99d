"""Coefficients of adapters: ``c = ((w - mean) / std) V``; a coordinate of std 0 adds nothing.

Backward: ``dL/dw = (dL/dc V^T) / std``, the contraction that reconstruct runs forward. Dravid
et al., "Interpreting the Weight Space of Customized Diffusion Models", 2024, section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from . import _basis
from ._check import shapes


def _divisor(std: Tensor, dtype: torch.dtype) -> Tensor:
    # x / inf is 0 for every finite x, and NaN or inf in a fixed coordinate still shows as NaN.
    return std.to(dtype).masked_fill(std == 0, torch.inf)


def project_reference(w: Tensor, basis: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """The definition in plain torch, summed in float32 (float64 if an input is)."""
    work = _basis.compute_dtype(w, basis, mean, std)
    return _basis.contract((w.to(work) - mean.to(work)) / _divisor(std, work), basis)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(w: Tensor, *args: Any) -> Tensor:
        return project_reference(w, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        w, basis, _, std = inputs
        ctx.save_for_backward(basis, std)
        ctx.dtype = w.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        basis, std = ctx.saved_tensors
        dw = _basis.expand(grad, basis) / _divisor(std, grad.dtype)
        return dw.to(ctx.dtype), None, None, None


def project(w: Tensor, basis: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """w ``[k, d]``, basis ``[d, m]``, mean and std ``[d]`` -> c ``[k, m]``, float32 or float64.

    Differentiable in w. Raises InputError for shapes, devices or dtypes that do not fit, and
    where a gradient is asked of a constant of the space.
    """
    shapes("project", w=(w, "k d"), basis=(basis, "d m"), mean=(mean, "d"), std=(std, "d"))
    if torch.is_grad_enabled() and (basis.requires_grad or mean.requires_grad or std.requires_grad):
        raise InputError("project: basis, mean and std are constants: detach() them first")
    return _Project.apply(w, basis, mean, std)
