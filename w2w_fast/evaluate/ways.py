"""What the ways of generating do: identity guidance, and edits that set in late.

Identity guidance runs the unconditional rows of classifier-free guidance without the adapter.
A delayed edit (w2w paper, section 4.2) leaves the first steps to the unedited person: the later it
sets in, the less of the picture changes, and the less of the attribute comes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..pictures import stack
from ..verbs.edit import direction
from ..verbs.generate import generate
from . import told
from .edits import compare
from .study import Study, draw

TITLE = "Identity guidance, and edits that set in late"
GUIDANCE = (1.0, 2.0, 3.0, 5.0)
STRENGTH = 3.0
STARTS = (1000, 900, 800, 650, 500, 300, 0)


def run(study: Study) -> dict[str, Any]:
    guided, rows = _guidance(study)
    late, lines = _late(study)
    best = {kind: max(x["right"]["value"] for x in guided[kind].values()) for kind in guided}
    return told.section(
        {"guidance": guided, "late": late},
        [
            told.table(
                "Populated people, in fresh prompts and seeds",
                ("guidance", "without the adapter in unconditional rows", "attributes right",
                 "whole"), rows,
            )
        ],
        [
            told.claim("identity guidance: attributes right at best, over plain guidance's",
                       best["identity"] - best["plain"], at_least=0.0),
            told.claim("an edit that sets in at half of the noise changes less of the picture",
                       late["distance"][STARTS.index(500)] - late["distance"][0], at_most=0.0),
        ],
        [told.curves(f"An edit of +{STRENGTH:g} sd that sets in late", "timestep it sets in at",
                     "share of the immediate edit's", lines)],
    )  # fmt: skip


def _guidance(study: Study) -> tuple[dict[str, Any], list[list[object]]]:
    space, images = study.space, study.size.images
    who = study.some_people(800)
    rows = who.repeat_interleave(images)
    texts, seeds = study.texts(len(rows), 801), list(range(60_000, 60_000 + len(rows)))
    columns = [study.column(name) for name in study.binary]
    labels = [space.attributes.index(name) for name in study.binary]
    truth = space.labels[rows][:, labels] > 0.5
    figures: dict[str, Any] = {"plain": {}, "identity": {}}
    shown = []
    for guidance in GUIDANCE:
        for kind in ("plain", "identity") if guidance > 1 else ("plain",):
            own = {**study.settings, "guidance": guidance, "identity_guidance": kind == "identity"}
            mine = replace(study, settings=own)
            sight = study.judge.read(draw(mine, space.coefficients[rows], texts, seeds))
            right = ((sight.attributes[:, columns] > 0.5) == truth).float().mean(1)
            at = told.figure(right.view(len(who), images))
            whole = float((sight.whole > 0.5).float().mean())
            figures[kind][str(guidance)] = {"right": at._asdict(), "whole": whole}
            shown.append([f"{guidance:g}", "yes" if kind == "identity" else "no", at, whole])
    return figures, shown


def _late(study: Study) -> tuple[dict[str, Any], dict[str, list[tuple[float, float]]]]:
    """Effect and distance of edits that set in at `STARTS`, as shares of the immediate edit's."""
    space = study.space
    who = study.some_people(810)
    c, n = space.coefficients[who], len(who)
    texts, seeds = study.texts(n, 811), list(range(61_000, 61_000 + n))
    before = study.judge.read(draw(study, c, texts, seeds))
    gains, distances = torch.zeros(len(STARTS)), torch.zeros(len(STARTS))
    for name in study.binary:
        column, label = study.column(name), space.attributes.index(name)
        lacking = space.labels[who, label] < 0.5
        edited = c + STRENGTH * direction(space, name) * torch.where(lacking, 1.0, -1.0)[:, None]
        for i, start in enumerate(STARTS):
            made = generate(
                space, study.pipe, edited, texts, seeds=seeds, before=c, start=start,
                progress=False, **study.settings,
            )  # fmt: skip
            after = study.judge.read(stack(made))
            change = (after.attributes - before.attributes)[:, column].abs()
            gains[i] += change.mean()
            distances[i] += compare(before, after, [])["distance"].mean()
    shares = {
        "effect": (gains / gains[0].clamp_min(1e-9)).tolist(),
        "distance": (distances / distances[0].clamp_min(1e-9)).tolist(),
    }
    lines = {name: list(zip(map(float, STARTS), shares[name], strict=True)) for name in shares}
    return {**shares, "starts": list(STARTS)}, lines
