"""The twin test: how smooth is the map from a person to their adapter?

Train people and their twins, who differ in one attribute. If the map is smooth, the difference
of the adapters is about the same for every pair, and the mean difference of OTHER pairs applied
to a person flips the attribute. With independent random numbers, or from a random start, twins
end as far apart as strangers and edits carry nothing. `python -m w2w_fast.demo.twins WORLD`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..files import read_tensors
from ..layout import Layout
from ..space import WeightSpace
from ..training import Recipe, train
from . import pipeline, render
from .build import RECIPE, load_for_training, subjects
from .reading import Reader
from .score import adapter_pictures, prompts

CHANGES = ("beard", "hat", "glasses", "skin")


def twin_test(
    space: WeightSpace, pipe, training_pipe, reader: Reader, recipe: Recipe, start: Tensor | None,
    pairs: int = 12, seed: int = 80, alone: bool = False,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """For each change: the mean cosine between different people's edits, and how often the mean
    edit of the others, applied once and twice, gives a person the attribute.

    alone: everybody has random numbers of their own, and is trained alone.
    """
    layout: Layout = space.layout
    generator = torch.Generator().manual_seed(seed)
    people = render.people(pairs, generator)
    everybody: list[Tensor] = []
    for name in CHANGES:
        column = render.ATTRIBUTES.index(name)
        without, with_it = people.clone(), people.clone()
        without[:, column], with_it[:, column] = 0.1, 0.9
        if name in render.BINARY:
            without[:, column], with_it[:, column] = 0.0, 1.0
        everybody += [without, with_it]
    group = subjects(torch.cat(everybody), "twin")
    if alone:
        recipes = [replace(recipe, seed=recipe.seed + 1 + i) for i in range(len(group))]
        each = zip(group, recipes, strict=True)
        w = torch.cat([train(training_pipe, layout, [one], mine, start) for one, mine in each])
    else:
        w = train(training_pipe, layout, group, recipe, start, batch=len(group))
    w = w.view(len(CHANGES), 2, pairs, -1)
    texts, _ = prompts(pairs, seed + 1)
    result = {}
    for i, name in enumerate(CHANGES):
        edits = w[i, 1] - w[i, 0]
        unit = torch.nn.functional.normalize(edits)
        off = ~torch.eye(pairs, dtype=torch.bool)
        others = (edits.sum(0) - edits) / (pairs - 1)
        result[name] = {"cosine": float((unit @ unit.T)[off].mean())}
        column = render.ATTRIBUTES.index(name)
        for times in (1, 2):
            images = adapter_pictures(space, pipe, w[i, 0] + times * others, texts, 5000)
            has = reader.read(images).attributes[:, column] > 0.5
            result[name][f"flips_at_{times}x"] = float(has.float().mean())
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("world", type=Path)
    world = parser.parse_args().world
    shown = twin_test(
        WeightSpace.load(world / "space"),
        pipeline(world=world),
        load_for_training(world),
        Reader.load(world / "reader.safetensors"),
        RECIPE,
        read_tensors(world / "start.safetensors")[0]["w"],
    )
    print(json.dumps(shown, indent=2))
