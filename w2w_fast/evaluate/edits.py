"""What an edit does, beside its rivals at the same strength of effect (w2w paper, table 1).

People who lack an attribute are given it, with the same prompts and seeds before and after. Every
way is tried at several strengths, and its figures are interpolated to where the judge sees the
attribute risen by `TARGET` on average: a faint edit's side effects say nothing beside a strong
one's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..readers import fit_readers
from ..verbs.edit import direction
from . import told
from .study import Sight, Study, draw, picture
from .text_slider import fused, train_slider

TITLE = "Edits and their rivals"
TARGET = 0.5
MEASURES = ("identity", "distance", "leak", "whole")

Way = Callable[[float], Tensor]
"""An amount -> the pictures."""


def run(study: Study) -> dict[str, Any]:
    figures: dict[str, dict[str, Any]] = {}
    seen = []
    for name in study.binary:
        figures[name], row = _attribute(study, name)
        seen.append(row)
    ways = list(next(iter(figures.values())))
    labels = [x for name in figures for x in (f"no {name}", *ways)]
    sheet = picture(torch.cat(seen), 1 + len(ways), labels)
    rows = []
    for name, found in figures.items():
        for way in ways:
            at = found[way]["matched"]
            cells = [told.Figure(**at[key]) for key in MEASURES] if at else [None] * 4
            strength = at["strength"] if at else f"not reached ({found[way]['most']:.2f})"
            rows.append([name, way, strength, *cells])
    return told.section(
        {"target": TARGET, "attributes": figures},
        [
            told.table(
                f"Where the judge sees the attribute risen by {TARGET:g}: mean (95% interval)",
                ("attribute", "way", "strength", "identity kept", "distance", "others changed",
                 "whole"),
                rows,
            )
        ],
        _claims(figures, ways),
        notes=[
            "identity kept: cosine of the judge's identities before and after; distance: of the "
            "pictures, LPIPS's form; others changed: mean change of the other two-valued "
            "attributes' probabilities; strengths are in each way's own units."
        ],
        pictures=[("One person who lacks it, and each way at the last strength tried", sheet)],
    )  # fmt: skip


def _attribute(study: Study, name: str) -> tuple[dict[str, Any], Tensor]:
    """way -> curve over strengths and the figures at the matched one; and the first person's
    pictures, before and each way's last."""
    space, size = study.space, study.size
    lacking = (space.labels[:, space.attributes.index(name)] < 0.5).nonzero()[:, 0]
    order = torch.randperm(len(lacking), generator=study.generator(200))
    who = lacking[order][: size.people]
    c, n = space.coefficients[who], len(who)
    texts, seeds = study.texts(n, 201), list(range(20_000, 20_000 + n))
    unedited = draw(study, c, texts, seeds)
    before, seen = study.judge.read(unedited), [unedited[:1]]
    column = study.column(name)
    others = [study.column(x) for x in study.binary if x != name]
    found = {}
    for way, amounts, make in _ways(study, name, c, texts, seeds):
        # At no strength nothing changes: the curve starts there.
        steps = [(0.0, torch.zeros(n), dict(zip(MEASURES, (torch.ones(n), torch.zeros(n),
                  torch.zeros(n), before.whole), strict=True)))]  # fmt: skip
        for amount in amounts:
            images = make(amount)
            after = study.judge.read(images)
            gain = after.attributes[:, column] - before.attributes[:, column]
            steps.append((amount, gain, compare(before, after, others)))
            if float(gain.mean()) >= TARGET:
                break
        seen.append(images[:1])
        found[way] = {
            "curve": [
                {"strength": s, "gain": float(gain.mean()),
                 **{key: float(value.mean()) for key, value in measured.items()}}
                for s, gain, measured in steps
            ],
            "most": max(float(gain.mean()) for _, gain, _ in steps),
            "matched": _matched(steps),
        }  # fmt: skip
    return found, torch.cat(seen)


def compare(before: Sight, after: Sight, others: list[int]) -> dict[str, Tensor]:
    """What an edit did to each picture [n]: see `MEASURES`."""
    change = (after.attributes - before.attributes)[:, others].abs()
    return {
        "identity": (before.identity * after.identity).sum(1),
        "distance": (before.features - after.features).square().sum(1),
        "leak": change.mean(1) if others else torch.zeros(len(change)),
        "whole": after.whole,
    }


def _matched(steps: list[tuple[float, Tensor, dict[str, Tensor]]]) -> dict[str, Any] | None:
    """The figures where the mean gain reaches `TARGET`, between two strengths; None if it never
    does."""
    (s0, g0, m0), (s1, g1, m1) = steps[-2:]
    low, high = float(g0.mean()), float(g1.mean())
    if high < TARGET:
        return None
    share = 1.0 if high == low else min(1.0, max(0.0, (TARGET - low) / (high - low)))
    measured = {key: m0[key] + share * (m1[key] - m0[key]) for key in MEASURES}
    return {
        "strength": s0 + share * (s1 - s0),
        **{key: told.figure(value)._asdict() for key, value in measured.items()},
    }


def _ways(
    study: Study, name: str, c: Tensor, texts: list[str], seeds: list[int]
) -> Iterable[tuple[str, tuple[float, ...], Way]]:
    """(name, strengths, pictures at a strength) of the edit and of its rivals."""
    space, amounts = study.space, study.size.strengths
    words = study.words[name]

    def along(v: Tensor) -> Way:
        return lambda amount: draw(study, c + amount * v, texts, seeds)

    yield "w2w", amounts, along(direction(space, name))
    held = [x for x in space.attributes if x != name]
    if held:
        yield "w2w, others held", amounts, along(direction(space, name, held))
    yield "least squares", amounts, along(_least_squares(study, name))
    random = torch.randn(space.m, generator=study.generator(202)) * space.sigma
    length = direction(space, name).norm() / random.norm()
    yield "random direction", amounts, along(random * length)
    wished = [t.format(who=f"{study.who} with {words}") for t in study.prompts(len(c), 201)]

    def prompted(amount: float) -> Tensor:
        return draw(study, c, texts, seeds, towards=wished, amount=amount)

    yield "prompt", (0.5, 1.0, 1.5, 2.0), prompted
    slider = train_slider(study, words, 300)

    def slid(amount: float) -> Tensor:
        with fused(study, slider, amount) if amount else nullcontext():
            return draw(study, c, texts, seeds)

    yield "text slider", (0.5, 1.0, 2.0, 3.0), slid


def _least_squares(study: Study, name: str) -> Tensor:
    """The paper's direction [m]: the reader itself, without a penalty; one standard deviation of
    the population along it."""
    space = study.space
    i = space.attributes.index(name)
    weights, _ = fit_readers(
        space.coefficients, space.labels[:, i : i + 1], [name], method="lstsq", permutations=0
    )
    unit = weights[0].double() / weights[0].double().norm()
    return (unit * (unit @ space.covariance().double() @ unit).sqrt()).float()


def _claims(figures: dict[str, Any], ways: list[str]) -> list[dict[str, Any]]:
    """Best in every cell? The cells: each attribute's identity, distance and leak."""
    ours = [way for way in ways if way.startswith("w2w")]
    won = cells = 0
    for found in figures.values():
        for key, sign in (("identity", 1), ("distance", -1), ("leak", -1)):

            def best(some: list[str], key=key, sign=sign, found=found) -> float:
                at = [found[way]["matched"] for way in some]
                return max((sign * x[key]["value"] for x in at if x), default=-torch.inf)

            cells += 1
            won += best(ours) >= best([way for way in ways if way not in ours])
    reached = [found["w2w"]["matched"] is not None for found in figures.values()]
    return [
        told.claim("edits that reach the target", sum(reached) / len(reached), at_least=1.0),
        told.claim("cells (attribute x measure) where w2w is best", won / cells, at_least=1.0),
    ]
