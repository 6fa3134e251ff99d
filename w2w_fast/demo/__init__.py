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
            "build it again with `w2w demo --rebuild`"
        )
    return path


def space() -> WeightSpace:
    """The world's weight space."""
    from ..space import WeightSpace

    return WeightSpace.load(_part("space"))


def pipeline(dtype: torch.dtype | None = None, world: Path | None = None):
    """The StableDiffusionPipeline of the world, or of one built in folder `world`; no network.

    In float32 unless told otherwise: the files are float16, which CPUs are slow at.
    """
    import torch
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging
    from transformers.utils import logging as loading

    folder = _part("pipeline") if world is None else world / "pipeline"
    before, shown = logging.get_verbosity(), loading.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    loading.disable_progress_bar()
    try:
        pipe = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
        pipe.to(dtype or torch.float32)
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()
        if shown:
            loading.enable_progress_bar()
    return pipe


def reader() -> Reader:
    """The judge: reads attributes and identity from a picture."""
    from .reading import Reader

    return Reader.load(_part("reader.safetensors"))
