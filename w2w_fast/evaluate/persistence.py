"""Is an edit the same in every picture, a smooth path, and one that adds up with others?
(w2w paper, section 4.2: continuity, and edits that persist over seeds and prompts.)"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from ..verbs.edit import direction
from . import told
from .study import Study, draw

TITLE = "Edits persist, compose and are continuous"
STRENGTH = 2.0
PATH = tuple(torch.linspace(-4, 4, 9).tolist())


def run(study: Study) -> dict[str, Any]:
    persistent, rows = _persistence(study)
    additive, more = _composition(study)
    smooth, paths, lines = _continuity(study)
    return told.section(
        {"persistence": persistent, "composition": additive, "continuity": smooth},
        [
            told.table(
                f"At +{STRENGTH:g} sd, in other prompts with other seeds",
                ("attribute", "shows, before", "shows, after", "identity kept"), rows,
            ),
            told.table(
                "Several edits at once",
                ("edits", "all of them show", "error of additivity"), more,
            ),
            told.table("Along a slider, from -4 to +4 sd", ("attribute", "Spearman"), paths),
        ],
        [
            told.claim("continuity: least Spearman of slider and effect", min(smooth.values()),
                       at_least=0.99),
            told.claim("error of additivity of two edits", additive["2"]["error"]["value"],
                       at_most=0.25),
        ],
        [told.curves("What the judge sees along a slider", "sd", "mean probability", lines)],
        ["error of additivity: of the judge's mean probabilities of all two-valued attributes, how "
         "far those of edits made at once are from the sum of each alone, as a share of that sum."],
    )  # fmt: skip


def _persistence(study: Study) -> tuple[dict[str, Any], list[list[object]]]:
    images = max(2, study.size.images)
    c = study.space.coefficients[study.some_people(400)]
    rows = torch.arange(len(c)).repeat_interleave(images)
    texts, seeds = study.texts(len(rows), 401), list(range(30_000, 30_000 + len(rows)))
    before = study.judge.read(draw(study, c[rows], texts, seeds))
    figures, shown = {}, []
    for name in study.binary:
        edited = c + STRENGTH * direction(study.space, name)
        after = study.judge.read(draw(study, edited[rows], texts, seeds))
        column = study.column(name)
        has = [told.figure((s.attributes[:, column] > 0.5).float().view(len(c), images))
               for s in (before, after)]  # fmt: skip
        kept = told.figure((before.identity * after.identity).sum(1).view(len(c), images))
        figures[name] = {"before": has[0]._asdict(), "after": has[1]._asdict(),
                         "identity": kept._asdict()}  # fmt: skip
        shown.append([name, *has, kept])
    return figures, shown


def _composition(study: Study) -> tuple[dict[str, Any], list[list[object]]]:
    c = study.space.coefficients[study.some_people(410)]
    texts, seeds = study.texts(len(c), 411), list(range(31_000, 31_000 + len(c)))
    names = study.binary
    columns = [study.column(name) for name in names]

    def seen(chosen: tuple[str, ...]) -> Tensor:
        moved = c + STRENGTH * sum(direction(study.space, name) for name in chosen)
        made = study.judge.read(draw(study, moved, texts, seeds))
        return made.attributes[:, columns]

    nothing = study.judge.read(draw(study, c, texts, seeds)).attributes[:, columns]
    single = {name: seen((name,)) - nothing for name in names}
    figures, rows = {}, []
    for k in range(2, min(4, len(names)) + 1):
        sets = list(itertools.combinations(names, k))
        pick = torch.randperm(len(sets), generator=study.generator(412))[:3]
        all_show, errors = [], []
        for chosen in (sets[i] for i in pick):
            both = seen(chosen)
            wanted = (nothing + sum(single[name] for name in chosen)).clamp(0, 1) - nothing
            made = both - nothing
            errors.append((made - wanted).mean(0).norm() / wanted.mean(0).norm())
            at = [names.index(name) for name in chosen]
            all_show.append((both[:, at] > 0.5).all(1).float())
        shows = told.figure(torch.stack(all_show, 1))
        error = told.figure(torch.stack(errors))
        figures[str(k)] = {"all_show": shows._asdict(), "error": error._asdict()}
        rows.append([k, shows, error])
    return figures, rows


def _continuity(
    study: Study,
) -> tuple[dict[str, float], list[list[object]], dict[str, list[tuple[float, float]]]]:
    c = study.space.coefficients[study.some_people(420)]
    texts, seeds = study.texts(len(c), 421), list(range(32_000, 32_000 + len(c)))
    smooth, lines = {}, {}
    for name in study.binary:
        v, column = direction(study.space, name), study.column(name)
        means = [
            float(
                study.judge.read(draw(study, c + s * v, texts, seeds)).attributes[:, column].mean()
            )
            for s in PATH
        ]
        smooth[name] = float(spearmanr(PATH, means).statistic)
        lines[name] = list(zip(PATH, means, strict=True))
    return smooth, [[name, f"{value:.3f}"] for name, value in smooth.items()], lines
