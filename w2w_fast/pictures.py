"""Pictures on disk: PNGs that say how they were made, contact sheets, a space's spectrum."""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

_MARGIN = 4
_LABEL = 14


def contact_sheet(
    images: Sequence[Image.Image], columns: int | None = None, labels: Sequence[str] | None = None
) -> Image.Image:
    """All images in a grid, row by row, a label under each if given.

    The cells have the first image's size, at least 128 pixels, so that small faces can be seen.
    """
    columns = columns or min(len(images), max(1, round(math.sqrt(len(images) * 1.5))))
    width, height = images[0].size
    zoom = max(1, math.ceil(128 / width))
    width, height = width * zoom, height * zoom
    below = 0 if labels is None else _LABEL
    rows = math.ceil(len(images) / columns)
    step_x, step_y = width + _MARGIN, height + _MARGIN + below
    sheet = Image.new("RGB", (columns * step_x + _MARGIN, rows * step_y + _MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x, y = _MARGIN + i % columns * step_x, _MARGIN + i // columns * step_y
        sheet.paste(image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC), (x, y))
        if labels is not None:
            pen.text((x, y + height + 1), str(labels[i])[: width // 6], fill="black")
    return sheet


def save_pictures(
    folder: Path, images: Sequence[Image.Image], records: Sequence[Mapping[str, Any]]
) -> None:
    """image-00000.png ... with their record in the PNG's text, images.csv, contact-sheet.png."""
    table = []
    for i, (image, record) in enumerate(zip(images, records, strict=True)):
        name = f"image-{i:05d}.png"
        info = PngInfo()
        for key, value in record.items():
            info.add_itxt(key, str(value))
        image.save(folder / name, pnginfo=info)
        table.append({"file": name, **record})
    with (folder / "images.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    # A sheet is for looking at: of very many pictures the first 256.
    contact_sheet(images[:256]).save(folder / "contact-sheet.png")


def scree(path: Path, explained: Sequence[float]) -> None:
    """A scree plot as PNG: each component's share of the variance, and that of all up to it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    index = range(1, len(explained) + 1)
    left = figure.add_subplot()
    left.loglog(index, explained, ".-", color="#0b6e4f", linewidth=1, markersize=4)
    left.set(xlabel="component", ylabel="share of the variance")
    right = left.twinx()
    right.plot(index, [100 * x for x in itertools.accumulate(explained)], color="#3a6ea5")
    right.set(ylim=(0, 100), ylabel="all up to it, %")
    left.grid(color="#e3e6ea", linewidth=0.8)
    figure.savefig(path, metadata={"Software": None})  # the same bytes for the same numbers
