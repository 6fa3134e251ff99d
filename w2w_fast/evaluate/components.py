"""How many components, how many models? (w2w paper, sections 4.5 and 5, tables 5 and 6.)"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..readers import fit_readers
from ..verbs.edit import direction
from ..whereabouts import whitened
from . import told
from .edits import compare
from .inversion import find, mean_identity
from .study import Study, draw

TITLE = "How many components and models"
COUNTS = (10, 30, 100, 300, 1000, 3000)
STRENGTH = 2.0


def run(study: Study) -> dict[str, Any]:
    edited, found, shown = _components(study)
    alike, rows = _models(study)
    most = max(edited)
    return told.section(
        {"edits": {str(m): e for m, e in edited.items()},
         "inversion": {str(m): f for m, f in found.items()}, "models": alike},
        [
            told.table(
                f"Edits of +{STRENGTH:g} sd and inversions in the first components",
                ("components", "attribute rises by", "identity kept", "others changed",
                 "inverted: identity", "inverted: rms of c, sd"), shown,
            ),
            told.table(
                f"Directions found from fewer models, {alike['components']} components",
                ("models", "cosine of two directions, size", "the same, permuted labels",
                 "others' readings moved", "right on models left out"), rows,
            ),
        ],
        [told.claim("edits move more with all components than with the fewest",
                    edited[most]["gain"]["value"] - edited[min(edited)]["gain"]["value"],
                    at_least=0.0)],
        notes=["Fewer models: the population's coefficients of the shipped components stand in for "
               "its adapters. A falling cosine says little, it falls for permuted labels too; what "
               "an edit moves besides is the measure."],
    )  # fmt: skip


def _components(study: Study) -> tuple[dict[int, Any], dict[int, Any], list[list[object]]]:
    size = study.size
    order = study.some_people(700)
    counts = [m for m in COUNTS if m < study.space.m] + [study.space.m]
    texts, seeds = study.texts(len(order), 701), list(range(50_000, 50_000 + len(order)))
    people = None if study.held_out is None else study.held_out(max(3, size.inverted // 2), 702)
    known = None if people is None else mean_identity(study.judge, people.others)
    edited, found, shown = {}, {}, []
    for m in counts:
        space = study.space.cut(m)
        mine = replace(study, space=space)
        c = space.coefficients[order]
        before = study.judge.read(draw(mine, c, texts, seeds))
        gains, kept, leaks = [], [], []
        for name in study.binary:
            v = direction(space, name)
            after = study.judge.read(draw(mine, c + STRENGTH * v, texts, seeds))
            column = study.column(name)
            others = [study.column(x) for x in study.binary if x != name]
            change = compare(before, after, others)
            gains.append(after.attributes[:, column] - before.attributes[:, column])
            kept.append(change["identity"])
            leaks.append(change["leak"])
        at = [told.figure(torch.stack(parts, 1)) for parts in (gains, kept, leaks)]
        edited[m] = dict(zip(("gain", "identity", "leak"), (x._asdict() for x in at), strict=True))
        cells: list[object] = [None, None]
        if people is not None:
            inverted = find(study, people.photos[:, 0], people.masks[:, 0], space)
            k = len(inverted)
            sight = study.judge.read(
                draw(mine, inverted, study.texts(k, 703), list(range(51_000, 51_000 + k)))
            )
            identity = told.figure((sight.identity * known).sum(1))
            z = whitened(space, inverted)
            found[m] = {"identity": identity._asdict(), "rms": float(z.square().mean().sqrt())}
            cells = [identity, found[m]["rms"]]
        shown.append([m, *at, *cells])
    return edited, found, shown


def _models(study: Study) -> tuple[dict[str, Any], list[list[object]]]:
    """Directions of subsets of the population, and what they move in everybody left out."""
    space, seed = study.space, study.generator(710)
    names = [space.attributes.index(name) for name in study.binary]
    y = space.labels[:, names]
    order = torch.randperm(space.n, generator=seed)
    test = order[: space.n // 4]
    rest = order[space.n // 4 :]
    m = min(space.m, len(rest) // 12)
    c = space.coefficients[:, :m]
    truth, _ = _readers(c[test], y[test])
    counts = sorted({len(rest) // 8, len(rest) // 4, len(rest) // 2, len(rest)})
    figures: dict[str, Any] = {"components": m, "by_models": {}}
    rows = []
    for n in counts:
        some = rest[:n]
        weights, middle = _readers(c[some], y[some])
        v = _directions(c[some], weights)
        mixed = y[some][torch.randperm(n, generator=seed)]
        null = _directions(c[some], _readers(c[some], mixed)[0])
        moved = v @ truth.T  # what a direction moves in readers that others found
        share = moved / moved.diagonal()[:, None]
        right = ((c[test] @ weights.T > middle) == (y[test] > 0.5)).float().mean()
        at = {
            "cosine": _off_diagonal(_cosines(v)), "permuted": _off_diagonal(_cosines(null)),
            "moved": _off_diagonal(share.abs()), "right": float(right),
        }  # fmt: skip
        figures["by_models"][str(n)] = at
        rows.append([n, *at.values()])
    return figures, rows


def _readers(c: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Ridge readers [a, m] and the scores [a] midway between the classes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weights, _ = fit_readers(c, y, [str(i) for i in range(y.shape[1])], permutations=0)
    scores, high = c @ weights.T, y > 0.5
    ends = [(scores * part).sum(0) / part.sum(0).clamp_min(1) for part in (high, ~high)]
    return weights, (ends[0] + ends[1]) / 2


def _directions(c: Tensor, weights: Tensor) -> Tensor:
    z = (c - c.mean(0)).double()
    return F.normalize((weights.double() @ (z.mT @ z)).float(), dim=1)


def _cosines(v: Tensor) -> Tensor:
    return (F.normalize(v, dim=1) @ F.normalize(v, dim=1).T).abs()


def _off_diagonal(matrix: Tensor) -> float | None:
    a = len(matrix)
    return float((matrix.sum() - matrix.trace()) / (a * (a - 1))) if a > 1 else None
