"""An adapter inside a weight: ``W' = W + scale * (B A)``.

Always computed from the pristine W and rounded once, so that any number of swaps and a final
restore leave no drift (adding and subtracting in place does). Hu et al., LoRA, 2021, section 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from ._basis import compute_dtype
from ._check import shapes


def merge_reference(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """The definition, summed in float32 (float64 if an input is), in the weight's dtype."""
    work = compute_dtype(weight, A, B)
    return torch.addmm(weight.to(work), B.to(work), A.to(work), alpha=scale).to(weight.dtype)


def merge(
    weight: Tensor, A: Tensor, B: Tensor, scale: float = 1.0, out: Tensor | None = None
) -> Tensor:
    """weight ``[out, in]``, A ``[r, in]``, B ``[out, r]`` -> ``[out, in]`` in the weight's dtype.

    ``out`` receives the result (no gradient) and must not be the pristine weight. InputError for
    shapes that do not fit.
    """
    sizes = shapes("merge", weight=(weight, "out in"), A=(A, "r in"), B=(B, "out r"))
    if out is None:
        return merge_reference(weight, A, B, scale)
    if out.shape != weight.shape:
        raise InputError(
            f"merge: out: wanted [{sizes['out']}, {sizes['in']}], got {list(out.shape)}"
        )
    if out.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr():
        raise InputError("merge: out: wanted other memory than weight's: keep a pristine copy")
    with torch.no_grad():
        return out.copy_(merge_reference(weight, A, B, scale))
