"""What makes a population unfit for a space: no common start, or too few models."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from . import ranks
from .layout import Layout


def warn_of_many(m: int, n: int) -> None:
    """Warn of m components for n models: the last ones are what the models do not share."""
    warnings.warn(f"{m} components for {n} models: keep m below a third of n", stacklevel=3)


class Start:
    """Whether everybody started from one adapter, from blocks of a population w ``[n, d]``.

    (A, B) and (sA, B/s) are the same adapter, so raw factors can be compared only if every model
    started from one A. Then A keeps much of its start (cosine .3 to 1 after training), and from
    starts of their own it is near 0.
    """

    def __init__(self, layout: Layout, device: torch.device | str = "cpu") -> None:
        self._halves = [rows for rows, _ in layout.slices()]
        self._units = torch.zeros(layout.size, dtype=torch.float64, device=device)

    def add(self, w: Tensor) -> None:
        """See more models."""
        for rows in self._halves:
            unit = torch.nn.functional.normalize(w[:, rows].double(), dim=1)
            self._units[rows] += unit.sum(0)

    def cosine(self, n: int) -> float:
        """The mean pairwise cosine of n models' A: (n |mean unit vector|^2 - 1) / (n - 1)."""
        units = ranks.total(self._units.clone())
        values = [(units[rows].square().sum() / n - 1) / max(1, n - 1) for rows in self._halves]
        return float(torch.stack(values).mean())

    def check(self, n: int, std: Tensor, other: Tensor | None = None) -> dict[str, float]:
        """{"same_start", "fixed"}: that cosine, and the share of numbers of std 0; both warned of.

        other ``[d]``: a mean adapter that they should have started like.
        """
        alike, fixed = self.cosine(n), float((std == 0).double().mean())
        if other is not None:
            units = ranks.total(self._units.clone())
            cosine = torch.nn.functional.cosine_similarity
            pairs = [cosine(units[rows], other[rows].to(units), 0) for rows in self._halves]
            alike = min(alike, float(torch.stack(pairs).mean()))
        if alike < 0.1:
            warnings.warn(
                f"the models' A matrices are unrelated (mean cosine {alike:.2f}): they did not "
                "start from the same adapter, and components of raw factors mean little",
                stacklevel=3,
            )
        if fixed:
            warnings.warn(
                f"{fixed:.1%} of an adapter's numbers never moved: they stay fixed, at their mean",
                stacklevel=3,
            )
        return {"same_start": round(alike, 4), "fixed": round(fixed, 4)}


def same_start(w: Tensor, layout: Layout) -> float:
    """How alike the A matrices of a population w ``[n, d]`` are: see ``Start``."""
    start = Start(layout)
    start.add(w)
    return start.cosine(len(w))
