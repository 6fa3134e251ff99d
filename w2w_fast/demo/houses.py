"""A section of the world's report: a second concept, to show that nothing here is about faces.

Houses, drawn by arithmetic as the faces are, populate a space of their own on the same base, which
never saw a house. Their attributes are then read from the weights.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..evaluate import Study, told
from ..evaluate.study import draw, picture
from ..sources import Subject
from ..space import WeightSpace
from ..training import train
from .build import RECIPE

TITLE = "A second concept: houses"
BINARY = ("chimney", "tree", "lights", "wide_door")
CONTINUOUS = ("width", "roof", "red")
ATTRIBUTES = BINARY + CONTINUOUS
PROMPT = "sks house"
PHOTOS, STEPS, SIZE = 8, 150, 64


def houses(n: int, generator: torch.Generator) -> Tensor:
    """n independent houses, [n, 7]: fair coins, then uniform numbers."""
    u = torch.rand(n, len(ATTRIBUTES), generator=generator)
    u[:, : len(BINARY)] = (u[:, : len(BINARY)] < 0.5).float()
    return u


def conditions(n: int, generator: torch.Generator) -> Tensor:
    """n skies and places: shift, size, colours of the sky and of the ground, [n, 8]."""
    return torch.rand(n, 8, generator=generator)


def render(rows: Tensor, condition: Tensor) -> Tensor:
    """Houses [n, 7] under conditions [n, 8]: uint8 [n, 3, 64, 64]."""
    a = dict(zip(ATTRIBUTES, rows.T[:, :, None, None], strict=True))
    shift, zoom, *colours = condition.T[:, :, None, None]
    line = torch.arange(SIZE, dtype=torch.float32)
    y, x = torch.meshgrid(line, line, indexing="ij")
    unit = 15 + 4 * zoom
    u, v = (x - 31.5 - 10 * (shift - 0.5)) / unit, (y - 36) / unit  # the house stands on v = 1
    image = torch.zeros(len(rows), 3, SIZE, SIZE)

    def paint(mask: Tensor, *rgb: Tensor | float) -> None:
        colour = torch.stack([torch.as_tensor(c).expand(len(rows), 1, 1) for c in rgb], 1)
        image.lerp_(colour.expand_as(image), mask[:, None].expand_as(image))

    def box(left: Any, right: Any, top: Any, bottom: Any) -> Tensor:
        across, down = torch.minimum(u - left, right - u), torch.minimum(v - top, bottom - v)
        return (40 * torch.minimum(across, down)).sigmoid()

    half = 0.7 + 0.5 * a["width"]
    r, g, b, *ground = colours
    paint(torch.ones_like(u), 0.4 + 0.3 * r, 0.6 + 0.2 * g, 0.8 + 0.2 * b)
    r, g, b = ground
    paint((40 * (v - 0.95)).sigmoid(), 0.3 + 0.3 * r, 0.5 + 0.2 * g, 0.2 + 0.2 * b)
    crown = (40 * (0.55 - ((u - 1.7) ** 2 + (v - 0.1) ** 2).sqrt())).sigmoid()
    paint(box(1.6, 1.8, 0.3, 1.0) * a["tree"], 0.35, 0.22, 0.12)
    paint(crown * a["tree"], 0.12, 0.4, 0.15)
    paint(box(0.35, 0.6, -1.5, -0.3) * a["chimney"], 0.3, 0.28, 0.3)
    wall = 0.85 - 0.25 * a["red"]
    paint(box(-half, half, -0.2, 1.0), wall, 0.8 - 0.55 * a["red"], 0.7 - 0.5 * a["red"])
    top = -0.6 - 0.8 * a["roof"]
    slope = (v - top) / (-0.2 - top)  # 0 at the ridge, 1 at the eaves
    roof = torch.minimum(slope * (half + 0.15) - u.abs(), torch.minimum(v - top, -0.2 - v))
    paint((40 * roof).sigmoid(), 0.35, 0.16, 0.14)
    door = 0.16 + 0.16 * a["wide_door"]
    paint(box(-door, door, 0.35, 1.0), 0.25, 0.15, 0.1)
    for side in (-1, 1):
        pane = box(side * 0.55 - 0.14, side * 0.55 + 0.14, 0.05, 0.35)
        paint(pane, 0.25 + 0.75 * a["lights"], 0.3 + 0.6 * a["lights"], 0.4 - 0.1 * a["lights"])
    return image.mul_(255).round_().clamp_(0, 255).to(torch.uint8)


def subjects(rows: Tensor) -> list[Subject]:
    """Photographs of every house under the same conditions, as the population's people have."""
    seen = conditions(PHOTOS, torch.Generator().manual_seed(95))
    return [
        Subject(f"house-{i:03d}", render(row.expand(PHOTOS, -1), seen), (PROMPT,) * PHOTOS)
        for i, row in enumerate(rows)
    ]


def run(study: Study) -> dict[str, Any]:
    n = study.size.trained
    rows = houses(n, torch.Generator().manual_seed(96))
    recipe = replace(RECIPE, steps=min(STEPS, study.size.steps), lr=0.01)
    w = train(study.pipe, study.space.layout, subjects(rows), recipe, None, batch=64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # m close to a third of n
        space = WeightSpace.from_population(
            w, study.space.layout, min(30, n // 4), labels=rows, attributes=ATTRIBUTES
        )
    report = space.meta["readers"]
    table = []
    for name, entry in report.items():
        key = "balanced_accuracy" if name in BINARY else "r2"
        table.append([name, key.replace("_", " "), entry[key], entry["null"][key][1]])
    two = [row[2] for row in table if row[0] in BINARY]
    some = min(8, n)
    w = space.reconstruct(space.coefficients[:some])
    made = draw(study, w, [PROMPT] * some, range(some))
    first = conditions(1, torch.Generator().manual_seed(95)).expand(some, -1)
    both = torch.cat([render(rows[:some], first), made])
    return told.section(
        {"readers": report, "explained": float(space.explained.sum())},
        [
            told.table(
                f"Read from {space.m} coefficients of {n} houses, each left out once",
                ("attribute", "figure", "measured", "95% of chance below"), table,
            )
        ],
        [told.claim("houses: mean balanced accuracy of two-valued attributes",
                    sum(two) / len(two), at_least=0.9)],
        notes=["The base never saw a house: the pictures show what rank 1 can teach it."],
        pictures=[("Drawn houses, and generated ones of their coefficients", picture(both, some))],
    )  # fmt: skip
