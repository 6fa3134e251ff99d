"""A step along a direction of weight space: ``c' = c + amount * direction``.

With a space's own directions the amount counts population standard deviations. Dravid et al.,
"Interpreting the Weight Space of Customized Diffusion Models", 2024, section 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InputError
from ._check import shapes


def edit_reference(c: Tensor, direction: Tensor, amount: Tensor) -> Tensor:
    """The definition: c ``[k, m]``, direction ``[m]`` or ``[k, m]``, amount ``[]`` or ``[k]``."""
    return c + amount[..., None] * direction


def edit(c: Tensor, direction: Tensor, amount: float | Sequence[float] | Tensor) -> Tensor:
    """c ``[k, m]``, direction ``[m]`` or ``[k, m]``, amount a number or ``[k]`` -> ``[k, m]``.

    In c's dtype; differentiable in all three. InputError for shapes that do not fit.
    """
    steps = torch.as_tensor(amount, device=c.device)
    steps = steps if steps.is_floating_point() else steps.to(c.dtype)
    letters = "m" if direction.ndim == 1 else "k m"
    shapes("edit", c=(c, "k m"), direction=(direction, letters))
    if steps.ndim and steps.shape != c.shape[:1]:
        raise InputError(
            f"edit: amount: wanted a number or [{c.shape[0]}] (one an identity), "
            f"got {list(steps.shape)}"
        )
    return edit_reference(c, direction.to(c.dtype), steps.to(c.dtype))
