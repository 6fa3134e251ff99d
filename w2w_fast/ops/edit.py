"""A step along a direction: ``w' = w + amount * delta``, or the same of coefficients.

An edit of coefficients c along a direction v is an edit of flattened adapters along
``delta = std * (V v)`` (``WeightSpace.delta``), computed once: moving a slider then never touches
V. With a space's own directions the amount counts population standard deviations. Dravid et al.,
"Interpreting the Weight Space of Customized Diffusion Models", 2024, section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from . import _dispatch
from ._basis import compute_dtype
from ._check import shapes

_dispatch.library.define(
    "edit(Tensor w, Tensor delta, Tensor? amounts, float amount, str? backend=None) -> Tensor"
)


def edit_reference(
    w: Tensor, delta: Tensor, amounts: Tensor | None = None, amount: float = 1.0
) -> Tensor:
    """The definition: w ``[k, d]``, delta ``[d]`` or ``[k, d]``, amounts ``[k]`` or one amount.

    Summed in float32 (float64 if an input is), in w's dtype.
    """
    work = compute_dtype(w, delta)
    step = amount if amounts is None else amounts.to(work)[:, None]
    return (w.to(work) + step * delta.to(work)).to(w.dtype)


def _forward(
    w: Tensor, delta: Tensor, amounts: Tensor | None, amount: float, backend: str | None = None
) -> Tensor:
    launch = None
    if delta.ndim == 1:
        launch = _dispatch.kernels("edit", backend, w, delta, amounts)
    elif _dispatch.choose("edit", backend) != "torch" and _dispatch.forced(backend):
        raise InputError("edit: a forced backend takes one delta [d] for all; leave it unset")
    if launch is None:
        return edit_reference(w, delta, amounts, amount)
    out = _fake(w)
    if out.numel():
        step = amount if amounts is None else _dispatch.vector(amounts)
        launch.edit(_dispatch.rows(w), delta.contiguous(), step, out)
    return out


def _fake(w: Tensor, *_: Any) -> Tensor:
    return w.new_empty(w.shape)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, delta, amounts, ctx.amount, _ = inputs
    ctx.save_for_backward(delta, amounts)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    delta, amounts = ctx.saved_tensors
    step = ctx.amount if amounts is None else amounts.to(g.dtype)[:, None]
    ddelta = damounts = None
    if ctx.needs_input_grad[1]:
        ddelta = (g * step).to(delta.dtype)
        ddelta = ddelta.sum(0) if delta.ndim == 1 else ddelta
    if ctx.needs_input_grad[2]:
        damounts = (g * delta.to(g.dtype)).sum(1).to(amounts.dtype)
    return g, ddelta, damounts, None, None


_dispatch.library.impl("edit", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("w2w_fast::edit", _fake, lib=_dispatch.library)
torch.library.register_autograd(
    "w2w_fast::edit", _backward, setup_context=_setup, lib=_dispatch.library
)


def edit(
    w: Tensor,
    delta: Tensor,
    amount: float | Sequence[float] | Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """w ``[k, d]``, delta ``[d]`` or ``[k, d]``, amount a number or ``[k]`` -> ``[k, d]``.

    Flattened adapters, or coefficients and a direction. In w's dtype; differentiable in all
    three. ``backend`` forces one of ``_dispatch.BACKENDS``. InputError for what does not fit.
    """
    letters = "d" if isinstance(delta, Tensor) and delta.ndim == 1 else "k d"
    shapes("edit", w=(w, "k d"), delta=(delta, letters))
    amounts, number = None, 1.0
    if isinstance(amount, (int, float)):
        number = float(amount)
    else:
        amounts = torch.as_tensor(amount, device=w.device)
        amounts = amounts if amounts.is_floating_point() else amounts.to(torch.float32)
        amounts = amounts.expand(w.shape[0]) if not amounts.ndim else amounts
        if amounts.shape != w.shape[:1]:
            raise InputError(
                f"edit: amount: wanted a number or [{w.shape[0]}] (one an identity), "
                f"got {list(amounts.shape)}"
            )
    args = (w, delta, amounts, number, backend)
    if _dispatch.plain(w, delta, amounts):
        return _forward(*args)
    return torch.ops.w2w_fast.edit.default(*args)
