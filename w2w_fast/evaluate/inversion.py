"""One photo into the space, beside those who have many, or no space (w2w paper, tables 2 and 4).

All are judged on new poses, prompts and seeds: on the photo itself a copy would win.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..linear import ridge
from ..sources import Subject
from ..space import WeightSpace
from ..training import Recipe, train
from ..verbs.invert import invert
from ..whereabouts import whitened
from . import told
from .study import HeldOut, Judge, Study, draw, picture

TITLE = "Inversion of one photo"


def run(study: Study) -> dict[str, Any]:
    size, space = study.size, study.space
    people = study.held_out(size.inverted, 500)
    n = len(people.labels)
    known = _known(study, people)
    ways, seconds = {}, {}
    for name, make in (
        ("w2w, one photo", lambda: find(study, people.photos[:, 0], people.masks[:, 0])),
        ("adapter, many photos", lambda: _adapter(study, people, size.photos)),
        ("adapter, one photo", lambda: _adapter(study, people, 1)),
        ("regression from the photo", lambda: _regression(study, people)),
    ):
        began = time.perf_counter()
        ways[name] = make()
        seconds[name] = time.perf_counter() - began
    figures, rows, shown = {}, [], {"photo": people.photos[:, 0]}
    for name, found in ways.items():
        if found is None:
            continue
        figures[name], shown[name] = _judged(study, people, known, found)
        figures[name] |= {"seconds_a_person": seconds[name] / n,
                          "parameters": found.shape[1]}  # fmt: skip
        at = {key: told.Figure(**figures[name][key]) for key in ("identity", "right", "found")}
        rows.append([name, *at.values(), f"{figures[name]['seconds_a_person']:.1f} s",
                     f"{found.shape[1]:,}"])  # fmt: skip
    ours, many, one = (
        figures[name]["identity"]["value"]
        for name in ("w2w, one photo", "adapter, many photos", "adapter, one photo")
    )
    some = torch.stack([images[:6] for images in shown.values()], 1)
    sheet = picture(some.flatten(0, 1), len(shown), list(shown) * len(some))
    z = whitened(space, ways["w2w, one photo"])
    figures["rms_of_whitened_coefficients"] = float(z.square().mean().sqrt())
    return told.section(
        figures,
        [
            told.table(
                f"{n} people the space never saw, found again among {len(known)} "
                f"(chance {1 / len(known):.1%})",
                ("way", "identity", "attributes right", "found first", "time a person",
                 "parameters"), rows,
            )
        ],
        [
            told.claim("identity, as a share of the many-photo adapter's", ours / many,
                       at_least=0.93),
            told.claim("identity, over the one-photo adapter's", ours / one, at_least=1.4),
        ],
        notes=["identity: cosine of the judge's identities on generated pictures and on other "
               "photos of the person, never on the photo that was given. Times are of all in one "
               "batch."],
        pictures=[("The photo, and a picture in another place and pose by each way", sheet)],
    )  # fmt: skip


def _known(study: Study, people: HeldOut) -> Tensor:
    """Mean identities [k, e] on photos: the held-out subjects first, then the population's."""
    mine = mean_identity(study.judge, people.others)
    return mine if study.identities is None else torch.cat([mine, study.identities()])


def mean_identity(judge: Judge, photos: Tensor) -> Tensor:
    """[n, e] of photos [n, p, 3, h, w]."""
    n, p = photos.shape[:2]
    return F.normalize(judge.read(photos.flatten(0, 1)).identity.view(n, p, -1).mean(1), dim=1)


def _judged(
    study: Study, people: HeldOut, known: Tensor, found: Tensor
) -> tuple[dict[str, Any], Tensor]:
    """The figures of pictures of `found` [n, ...], and the first picture of each."""
    n, images = len(found), study.size.images
    rows = torch.arange(n).repeat_interleave(images)
    seeds = list(range(40_000, 40_000 + len(rows)))
    made = draw(study, found[rows], study.texts(len(rows), 501), seeds)
    sight = study.judge.read(made)
    identity = (sight.identity * known[rows]).sum(1).view(n, images)
    columns = [study.column(name) for name in study.binary]
    truth = people.labels[:, columns][rows] > 0.5
    right = ((sight.attributes[:, columns] > 0.5) == truth).float().mean(1).view(n, images)
    mean = F.normalize(sight.identity.view(n, images, -1).mean(1), dim=1)
    first = (mean @ known.T).argmax(1) == torch.arange(n)
    return {
        "identity": told.figure(identity)._asdict(),
        "right": told.figure(right)._asdict(),
        "found": told.figure(first.float())._asdict(),
        "whole": told.figure((sight.whole > 0.5).float().view(n, images))._asdict(),
    }, made[::images]


def find(study: Study, photos: Tensor, masks: Tensor, space: WeightSpace | None = None) -> Tensor:
    """Coefficients of those on photos [n, 3, h, w], one each, in the study's space or another."""
    settings = {**study.inversion, "steps": study.size.steps}
    space = study.space if space is None else space
    return invert(
        space, study.pipe, photos, masks=masks, prompt=study.who, progress=False, **settings
    )


def _adapter(study: Study, people: HeldOut, photos: int) -> Tensor:
    """DreamBooth without a space: an adapter [n, d] of each person, from the start of PEFT."""
    captions = people.captions[:photos] if photos > 1 else (study.who,)
    subjects = [
        Subject(str(i), mine[:photos], captions, masks[:photos])
        for i, (mine, masks) in enumerate(zip(people.photos, people.masks, strict=True))
    ]
    recipe = Recipe(
        steps=study.size.steps, lr=0.005, eps=1e-4, timesteps="early", average=0.5, prior=0.0,
        seed=study.seed,
    )  # fmt: skip
    return train(study.pipe, study.space.layout, subjects, recipe)


def _regression(study: Study, people: HeldOut) -> Tensor | None:
    """Coefficients guessed by ridge regression from what the judge sees on the photo."""
    if study.photos_of is None:
        return None
    space = study.space

    def seen(photos: Tensor) -> Tensor:
        sight = study.judge.read(photos)
        return torch.cat([sight.attributes, sight.identity], 1)

    x = seen(study.photos_of(torch.arange(space.n)))
    weights = ridge(x, space.coefficients).weights.float()
    return space.mu + (seen(people.photos[:, 0]) - x.mean(0)) @ weights.T
