"""Figures with intervals, tables and claims: what a section of the report is made of.

A section is plain JSON: ``figures`` (numbers), ``tables`` (title, columns, rows of text),
``curves`` (title, axes, lines of points) and ``claims`` (value, low, high, wanted, holds).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor

RESAMPLES = 2000


class Figure(NamedTuple):
    """A mean and the 95% interval of it over people (percentile bootstrap)."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def figure(values: Tensor, seed: int = 0) -> Figure:
    """The mean of values, one a person [n] (or several of each, [n, k]), and its interval."""
    each = values.double().flatten(1).mean(1) if values.ndim > 1 else values.double()
    generator = torch.Generator().manual_seed(seed)
    pick = torch.randint(len(each), (RESAMPLES, len(each)), generator=generator)
    low, high = each[pick].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return Figure(float(each.mean()), float(low), float(high))


def claim(
    text: str,
    measured: Figure | float,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
) -> dict[str, Any]:
    """A sentence that the measured value bears out or not; the interval stands beside it."""
    value, low, high = measured if isinstance(measured, Figure) else (measured,) * 3
    value = float(value)
    above = at_least is None or value >= at_least
    below = at_most is None or value <= at_most
    wanted = f"at least {at_least:g}" if at_least is not None else f"at most {at_most:g}"
    return {
        "claim": text, "value": value, "low": float(low), "high": float(high), "wanted": wanted,
        "holds": bool(above and below),
    }  # fmt: skip


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> dict[str, Any]:
    """A table of text: numbers get two digits, None a dash."""
    return {
        "title": title,
        "columns": list(columns),
        "rows": [[_cell(x) for x in row] for row in rows],
    }


def curves(
    title: str, x: str, y: str, lines: Mapping[str, Sequence[tuple[float, float]]]
) -> dict[str, Any]:
    """A plot: lines of (x, y) points by name."""
    plain = {name: [[float(a), float(b)] for a, b in line] for name, line in lines.items()}
    return {"title": title, "x": x, "y": y, "lines": plain}


def section(
    figures: Mapping[str, Any],
    tables: Sequence[dict] = (),
    claims: Sequence[dict] = (),
    plots: Sequence[dict] = (),
    notes: Sequence[str] = (),
    pictures: Sequence[tuple[str, Image]] = (),
) -> dict[str, Any]:
    """All of a section; pictures, (title, image), are written as files beside the report."""
    return {
        "figures": dict(figures), "tables": list(tables), "claims": list(claims),
        "curves": list(plots), "notes": list(notes), "pictures": list(pictures),
    }  # fmt: skip


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.2f}"
    return str(value)
