"""Pictures as tensors and files: PNGs that say how they were made, contact sheets, plots."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARGIN = 4
_LABEL = 14
_LABELLED = 30  # points of a map, at most


def stack(images: Sequence[Image.Image]) -> Tensor:
    """PIL images of one size as uint8 [n, 3, h, w]."""
    rows = []
    for image in images:
        data = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
        rows.append(data.view(image.height, image.width, 3).permute(2, 0, 1))
    return torch.stack(rows)


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


def encode(image: Image.Image, format: str, record: Mapping[str, Any]) -> bytes:
    """The file of a picture: "png" with its record as text, or "webp" or "jpeg" of quality 95."""
    file = io.BytesIO()
    if format == "png":
        info = PngInfo()
        for key, value in record.items():
            if value not in (None, ""):
                info.add_itxt(key, str(value))
        image.save(file, "PNG", pnginfo=info)
    else:
        image.convert("RGB").save(file, format.upper(), quality=95)
    return file.getvalue()


def strip(images: Sequence[Image.Image], most: int = 128) -> Image.Image:
    """All images beside one another, each made smaller until no side is longer than `most`."""
    width, height = images[0].size
    scale = min(1.0, most / max(width, height))
    width, height = max(1, round(width * scale)), max(1, round(height * scale))
    row = Image.new("RGB", (width * len(images), height))
    for i, image in enumerate(images):
        small = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
        row.paste(small, (i * width, 0))
    return row


def cut(row: Image.Image, count: int) -> list[Image.Image]:
    """The images of a strip of so many."""
    width = row.width // count
    return [row.crop((i * width, 0, (i + 1) * width, row.height)) for i in range(count)]


def scree(path: Path, explained: Sequence[float]) -> None:
    """A scree plot as PNG: each component's share of the variance, and that of all up to it."""
    figure = _figure()
    index = range(1, len(explained) + 1)
    left = figure.add_subplot()
    left.loglog(index, explained, ".-", color="#0b6e4f", linewidth=1, markersize=4)
    left.set(xlabel="component", ylabel="share of the variance")
    right = left.twinx()
    right.plot(index, [100 * x for x in itertools.accumulate(explained)], color="#3a6ea5")
    right.set(ylim=(0, 100), ylabel="all up to it, %")
    left.grid(color="#e3e6ea", linewidth=0.8)
    _save(figure, path)


def curve(path: Path, points: Sequence[tuple[float, float]], names: tuple[str, str]) -> None:
    """A line through (x, y) points as PNG; names: of x and of y."""
    figure = _figure()
    axes = figure.add_subplot()
    axes.plot(*zip(*points, strict=True), color="#3a6ea5", linewidth=1)
    axes.set(xlabel=names[0], ylabel=names[1])
    axes.grid(color="#e3e6ea", linewidth=0.8)
    _save(figure, path)


def lines(
    path: Path,
    points: Mapping[str, Sequence[tuple[float, float]]],
    names: tuple[str, str],
    title: str = "",
) -> None:
    """A line a name through its (x, y) points as PNG, with a legend; names: of x and of y."""
    figure = _figure()
    axes = figure.add_subplot()
    for name, mine in points.items():
        axes.plot(*zip(*mine, strict=True), ".-", linewidth=1, markersize=4, label=name)
    axes.set(xlabel=names[0], ylabel=names[1], title=title)
    axes.grid(color="#e3e6ea", linewidth=0.8)
    figure.legend(loc="outside right upper", fontsize=8)
    _save(figure, path)


def scatter(
    path: Path,
    crowd: Sequence[tuple[float, float]],
    points: Sequence[tuple[float, float]],
    labels: Sequence[str],
    names: Sequence[str],
    shade: Sequence[float] | None = None,
    shade_name: str = "",
) -> None:
    """A map as PNG: a crowd of grey dots, or shaded by a number each, and points with labels."""
    figure = _figure((7, 5.6))
    axes = figure.add_subplot()
    if crowd:
        colour = {"color": "#c3c9d0"} if shade is None else {"c": shade, "cmap": "viridis"}
        dots = axes.scatter(*zip(*crowd, strict=True), s=9, linewidths=0, **colour)
        if shade is not None:
            figure.colorbar(dots, ax=axes, label=shade_name)
    axes.scatter(*zip(*points, strict=True), s=34, color="#c0392b", edgecolors="white", zorder=2)
    if len(points) <= _LABELLED:
        for point, label in zip(points, labels, strict=True):
            # A name may hold a dollar sign, which would be taken for a formula.
            axes.annotate(label[:30].replace("$", r"\$"), point, xytext=(5, 4),
                          textcoords="offset points", fontsize=8)  # fmt: skip
    axes.set(xlabel=names[0], ylabel=names[1])
    axes.grid(color="#e3e6ea", linewidth=0.8)
    axes.set_axisbelow(True)
    _save(figure, path)


def _figure(size: tuple[float, float] = (7, 3.6)) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    # The same bytes for the same numbers, whatever the name of a temporary ends in.
    figure.savefig(path, format="png", metadata={"Software": None})
