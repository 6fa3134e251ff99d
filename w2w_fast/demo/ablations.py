"""A section of the world's report: what makes a weight space appear, by the twin test (`twins`).

Twins differ in one attribute. Where the map from people to adapters is smooth their difference is
the same for everybody, and the mean edit of others gives a person the attribute.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..evaluate import Study, told
from .build import RECIPE
from .twins import CHANGES, twin_test

TITLE = "Ablations of the population: twins"
STEPS = 120


def run(study: Study) -> dict[str, Any]:
    space, size = study.space, study.size
    recipe = replace(RECIPE, steps=min(STEPS, size.steps))
    arms: dict[str, tuple[dict[str, Any], Any]] = {
        "A and B, from the mean (ships)": ({}, space.mean),
        "B only, from the mean": ({"train": "B"}, space.mean),
        "A and B, from a random start": ({}, None),
        "A and B, random numbers of one's own": ({"alone": True}, space.mean),
    }
    figures, rows = {}, []
    for name, (changed, start) in arms.items():
        alone = changed.get("alone", False)
        mine = replace(recipe, train=changed.get("train", "AB"))
        found = twin_test(
            space, study.pipe, study.pipe, study.judge.reader, mine, start, pairs=size.twins,
            alone=alone,
        )  # fmt: skip
        figures[name] = found
        mean = {key: sum(x[key] for x in found.values()) / len(found) for key in found["hat"]}
        rows.append([name, *(f"{found[x]['cosine']:.2f}" for x in CHANGES), *mean.values()])
    ours, own = (sum(x["cosine"] for x in figures[name].values()) / len(CHANGES)
                 for name in (list(arms)[0], list(arms)[3]))  # fmt: skip
    frozen = sum(x["cosine"] for x in figures[list(arms)[1]].values()) / len(CHANGES)
    return told.section(
        figures,
        [
            told.table(
                f"{size.twins} pairs of twins a change, {recipe.steps} steps",
                ("training", *(f"cosine, {x}" for x in CHANGES), "cosine", "flips at once",
                 "flips at twice"), rows,
            )
        ],
        [
            told.claim("common random numbers: cosine of edits, over that with one's own",
                       ours - own, at_least=0.0),
            told.claim("B alone: cosine of edits, over that of A and B", frozen - ours,
                       at_least=0.0),
        ],
        notes=["flips: how often the mean edit of the other pairs, applied once or twice, gives a "
               "person the attribute."],
    )  # fmt: skip
