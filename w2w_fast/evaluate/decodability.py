"""Can attributes be read from weights? (w2w paper, section 3.3: linear classifiers.)

Readers are judged on people left out, beside the same readers of labels dealt out to the wrong
people. Few components hold too little, as many as people fit noise: both ends are shown.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from ..readers import fit_readers
from . import told
from .study import Study

TITLE = "Attributes read from weights"
COUNTS = (10, 30, 100, 300, 1000, 3000)


def run(study: Study) -> dict[str, Any]:
    space = study.space
    counts = sorted({m for m in COUNTS if m < min(space.m, space.n - 1)} | {space.m})
    by_count: dict[int, dict[str, dict[str, Any]]] = {}
    for m in counts:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "more components than a third of the people": wanted
            _, by_count[m] = fit_readers(
                space.coefficients[:, :m], space.labels, space.attributes,
                permutations=study.size.permutations, seed=study.seed,
            )  # fmt: skip
    rows, lines = [], {}
    for name, entry in by_count[space.m].items():
        key = "balanced_accuracy" if "balanced_accuracy" in entry else "r2"
        chance = entry["null"][key]
        shown = f"{entry['auc']:.2f}" if "auc" in entry else None
        rows.append([name, key.replace("_", " "), entry[key], chance[0], chance[1], shown])
        lines[name] = [(m, by_count[m][name][key]) for m in counts]
    above = torch.tensor([float(row[2] > row[4]) for row in rows])
    two = [row[2] for row in rows if row[1] != "r2"]
    claims = [
        told.claim("attributes read better than 95% of permuted labels are", float(above.mean()),
                   at_least=1.0)
    ]  # fmt: skip
    if two:
        mean = sum(two) / len(two)
        claims.append(told.claim("mean balanced accuracy of two-valued ones", mean, at_least=0.9))
    return told.section(
        {"by_components": {str(m): report for m, report in by_count.items()}},
        [
            told.table(
                f"Read from {space.m} coefficients of {space.n} people, each left out once",
                ("attribute", "figure", "measured", "by chance", "95% of chance below", "AUC"),
                rows,
            )
        ],
        claims,
        [told.curves("Read from the first components", "components", "accuracy or R2", lines)],
        ["The principal components saw everybody, the readers never the person they read."],
    )
