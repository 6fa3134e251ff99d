"""The embedded world: a weight space of 64 px faces that ships with the package.

A real StableDiffusionPipeline directory, a space fitted to adapters of people drawn by
`demo.render`, and a reader that judges pictures. `demo.build` makes all of it again.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    import torch

    from ..space import WeightSpace
    from .reading import Reader

WORLD = Path(__file__).with_name("world")


def _part(name: str) -> Path:
    path = WORLD / name
    if not path.exists():
        raise InputError(
            f"the embedded world lacks {name}: this copy was installed without its data; "
            "build it again with `python -m w2w_fast.demo.build`"
        )
    return path


def space() -> WeightSpace:
    """The world's weight space."""
    from ..space import WeightSpace

    return WeightSpace.load(_part("space"))


def pipeline(dtype: torch.dtype | None = None):
    """The world's StableDiffusionPipeline, in float32 unless told otherwise; no network."""
    import torch
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        pipe = StableDiffusionPipeline.from_pretrained(
            _part("pipeline"), dtype=dtype or torch.float32, local_files_only=True
        )
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()
    return pipe


def reader() -> Reader:
    """The judge: reads attributes and identity from a picture."""
    from .reading import Reader

    return Reader.load(_part("reader.safetensors"))
