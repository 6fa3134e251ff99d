"""Are sampled people people, new ones, and the same in every picture? (w2w paper, section 3.2.)"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from scipy import stats

from ..verbs.sample import sample
from ..whereabouts import whitened
from . import told
from .study import Study, draw, picture

TITLE = "People who do not exist"


def run(study: Study) -> dict[str, Any]:
    space, size = study.space, study.size
    n, images = 2 * size.people, max(2, size.images)
    z = whitened(space, space.coefficients)
    normal = torch.tensor([stats.kstest(column.numpy(), "norm").pvalue for column in z.T])
    c = sample(space, n, seed=study.seed + 100)

    unit, new = F.normalize(z), F.normalize(whitened(space, c))
    among = (unit @ unit.T).fill_diagonal_(-1).amax(1)
    nearest = (new @ unit.T).amax(1)
    copies = (nearest[:, None] > among[None]).float().mean(1) > 0.99

    rows = torch.arange(n).repeat_interleave(images)
    seeds = list(range(10_000, 10_000 + len(rows)))
    made = draw(study, c[rows], study.texts(len(rows), 101), seeds)
    sight = study.judge.read(made)
    whole = told.figure((sight.whole > 0.5).float().view(n, images))
    alike = sight.identity @ sight.identity.T
    mine = rows[:, None] == rows[None]
    same = (mine & ~torch.eye(len(rows), dtype=torch.bool)).float()
    within = told.figure(((alike * same).sum(1) / same.sum(1)).view(n, images))
    other = (~mine).float()
    between = told.figure(((alike * other).sum(1) / other.sum(1)).view(n, images))

    figures = {
        "components_normal_at_1_percent": float((normal > 0.01).float().mean()),
        "whole": whole._asdict(), "within": within._asdict(), "between": between._asdict(),
        "nearest_cosine": {"sampled": float(nearest.median()), "population": float(among.median())},
        "copies": float(copies.float().mean()),
    }  # fmt: skip
    rows_ = [
        ["components that look normal (Kolmogorov-Smirnov, 1%)",
         figures["components_normal_at_1_percent"]],
        ["whole pictures", whole],
        ["similarity of two pictures of one person", within],
        ["similarity of two people's", between],
        ["cosine to the nearest person of the population, median", float(nearest.median())],
        ["the same among the population itself", float(among.median())],
        ["closer to somebody than 99% of the population are to anybody", figures["copies"]],
    ]  # fmt: skip
    return told.section(
        figures,
        [told.table(f"{n} sampled people, {images} pictures each", ("what", "measured"), rows_)],
        [
            told.claim("sampled people are whole", whole, at_least=0.95),
            told.claim(
                "pictures of one are more alike than of two",
                within.low - between.high,
                at_least=0.0,
            ),
            told.claim("share of them that are copies", figures["copies"], at_most=0.02),
        ],
        pictures=[
            (
                "Some of them, pictures of one person side by side",
                picture(made[: 4 * images], 2 * images),
            )
        ],
    )
