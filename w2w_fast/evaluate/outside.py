"""Photos of another kind than the space was built from land in it as people (w2w paper, 4.4)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..whereabouts import whitened
from . import told
from .inversion import find
from .study import Study, draw

TITLE = "Pictures from outside"


def run(study: Study) -> dict[str, Any]:
    space = study.space
    people = study.held_out(max(3, study.size.inverted // 2), 600)
    n = len(people.labels)
    photos, masks = people.photos[:, 0], people.masks[:, 0]
    kinds = {"as it is": photos, **{name: make(photos) for name, make in KINDS.items()}}
    every = torch.cat(list(kinds.values()))
    found = find(study, every, masks.repeat(len(kinds), 1, 1, 1)).split(n)
    population = whitened(space, space.coefficients).norm(dim=1)
    farthest = float(population.quantile(0.99))
    columns = [study.column(name) for name in study.binary]
    truth = people.labels[:, columns] > 0.5
    texts, seeds = study.texts(n, 601), list(range(41_000, 41_000 + n))
    figures, rows = {"population_99": farthest}, []
    for name, c in zip(kinds, found, strict=True):
        far = told.figure(whitened(space, c).norm(dim=1))
        sight = study.judge.read(draw(study, c, texts, seeds))
        right = told.figure(((sight.attributes[:, columns] > 0.5) == truth).float().mean(1))
        figures[name] = {"distance": far._asdict(), "right": right._asdict(),
                         "whole": float((sight.whole > 0.5).float().mean())}  # fmt: skip
        rows.append([name, far, right, figures[name]["whole"]])
    worst = max(figures[name]["distance"]["high"] for name in kinds)
    return told.section(
        figures,
        [
            told.table(
                f"{n} people; 99% of the population lie within {farthest:.1f} of the mean",
                ("picture", "Mahalanobis distance", "attributes right", "whole"), rows,
            )
        ],
        [told.claim("distance, against 99% of the population's", worst / farthest, at_most=1.0)],
    )  # fmt: skip


def _drawn(photos: Tensor) -> Tensor:
    """Ink on paper: dark where the brightness has an edge."""
    grey = photos.float().mean(1, keepdim=True)
    kernel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    both = torch.stack([kernel, kernel.T])[:, None]
    edges = F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), both).norm(dim=1, keepdim=True)
    paper = torch.tensor([244.0, 238.0, 222.0]).view(1, 3, 1, 1)
    return (paper * (1 - (edges / 200).clamp(0, 0.85))).round().to(torch.uint8)


def _recoloured(photos: Tensor) -> Tensor:
    """Red, green and blue change places."""
    return photos[:, [2, 0, 1]].contiguous()


def _occluded(photos: Tensor) -> Tensor:
    """A grey block over a quarter of the width, in the middle."""
    result = photos.clone()
    width = photos.shape[-1]
    result[..., 3 * width // 8 : 5 * width // 8] = 128
    return result


KINDS = {"drawn": _drawn, "recoloured": _recoloured, "occluded": _occluded}
