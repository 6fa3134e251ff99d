"""Files of coefficients: people as points of a weight space, one safetensors tensor [k, m].

{"coefficients": [k, m] float32}, metadata {"format": "w2w_fast.coefficients"}
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .errors import InputError
from .files import read_tensors, write_tensors

FORMAT = "w2w_fast.coefficients"
_KEY = "coefficients"


def write_coefficients(
    path: str | Path, coefficients: Tensor, metadata: Mapping[str, str] | None = None
) -> None:
    """Write coefficients [k, m] as float32, atomically. InputError unless they are finite."""
    if coefficients.ndim != 2 or not coefficients.numel():
        raise InputError(f"coefficients: wanted [k, m], got {list(coefficients.shape)}")
    c = coefficients.detach().float().cpu()
    if not torch.isfinite(c).all():
        raise InputError("coefficients: hold NaN or infinite numbers; not written")
    write_tensors(path, {_KEY: c}, {**(metadata or {}), "format": FORMAT})


def read_coefficients(path: str | Path, m: int | None = None) -> Tensor:
    """The coefficients [k, m] f32 in a file, k > 0, those of a space of `m` components if given.

    InputError for other files, other widths, and numbers that are not finite.
    """
    tensors, metadata = read_tensors(path)
    if metadata.get("format") != FORMAT or set(tensors) != {_KEY}:
        raise InputError(f"{path}: not a file of coefficients (`w2w info` says what it is)")
    c = tensors[_KEY]
    if c.dtype != torch.float32 or c.ndim != 2 or not c.numel():
        raise InputError(f"{path}: wanted float32 [k, m], got {c.dtype} {list(c.shape)}")
    if m is not None and c.shape[1] != m:
        raise InputError(
            f"{path}: {c.shape[1]} coefficients a person, the space has {m} components; "
            "they were made in another space"
        )
    return c
