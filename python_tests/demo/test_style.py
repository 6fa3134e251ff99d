"""The pictures of docs/embed.md: still what the world draws, and they show what the page says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from w2w_fast import demo, read_adapter
from w2w_fast.demo import style

DOCS = Path(__file__).parents[2] / "docs"


def rows(sheet: Image.Image, n: int) -> list[np.ndarray]:
    """The rows of a contact sheet without their labels, int [128, w, 3]."""
    step = (sheet.height - 4) // n
    picture = np.asarray(sheet.convert("RGB"), dtype=int)
    return [picture[4 + i * step : 4 + i * step + 128] for i in range(n)]


def colour(picture: np.ndarray) -> float:
    """How far from grey, on average over pixels."""
    return float((picture.max(-1) - picture.min(-1)).mean())


def test_pencil_draws_edges_and_drops_colours():
    photo = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    photo[:, :, :, :16], photo[:, :, :, 16:] = 200, 150  # grey beside darker grey
    flat = style.pencil(photo[:, :, :, :1].expand(-1, -1, -1, 32))
    assert (flat == torch.tensor([244, 238, 222]).view(3, 1, 1)).all()  # paper
    drawn = style.pencil(photo).int()
    assert drawn[..., 16].max() < 150 < drawn[..., :12].min()  # a line, on the darker side
    red_grey = torch.tensor([[100, 0], [0, 50], [0, 0]], dtype=torch.uint8)  # of one lightness
    drawn = style.pencil(red_grey.view(1, 3, 1, 2).repeat_interleave(16, 3))
    assert (drawn[..., 0] == drawn[..., -1]).all()


def test_the_styled_picture_loses_its_colours_row_by_row():
    colours = [colour(row) for row in rows(Image.open(DOCS / "embed-style.png"), 3)]
    assert colours[0] > 1.2 * colours[1] > 1.2 * 1.2 * colours[2]


@pytest.mark.slow
def test_the_pictures_are_what_the_world_draws(tmp_path, monkeypatch):
    world, pipe = demo.space(), demo.pipeline()
    kept = rows(Image.open(DOCS / "embed-blend.png"), 2)
    for got, want in zip(rows(style.blended(world, pipe), 2), kept, strict=True):
        assert np.abs(got - want).mean() < 2
    # The style is trained for a moment only: the row without it is there, and the file is a LoRA.
    path = style.style_lora(pipe, tmp_path / "x.safetensors", replace(style.RECIPE, steps=2))
    assert read_adapter(path).ranks == (2,)
    monkeypatch.setattr(style, "WEIGHTS", (0.0,))
    (got,) = rows(style.styled(world, pipe, path), 1)
    assert np.abs(got - rows(Image.open(DOCS / "embed-style.png"), 3)[0]).mean() < 2
