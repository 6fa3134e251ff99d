"""What a space cannot do: components without labels, and a trait that its population lacks.

The paper's limits (section 6): principal components are entangled, and inversion cannot find what
was undersampled. The space without a trait is spanned by the people who lack it.
"""

from __future__ import annotations

from typing import Any

import torch

from ..space import WeightSpace
from ..verbs.edit import direction
from . import told
from .inversion import find
from .study import Study, draw

TITLE = "Raw components, and a trait left out"
STRENGTH = 2.0
COMPONENTS = 6
MOVED = 0.15


def run(study: Study) -> dict[str, Any]:
    raw, rows = _raw(study)
    parts: dict[str, Any] = {"raw": raw}
    tables = [
        told.table(
            f"Attributes whose mean probability moves by over {MOVED:g} at +{STRENGTH:g} sd",
            ("along", "attributes moved", "the most, by"), rows,
        )
    ]  # fmt: skip
    claims = [
        told.claim("attributes that a raw component moves, over those of a direction",
                   raw["components"] - raw["directions"], at_least=0.0)
    ]  # fmt: skip
    if study.held_out is not None:
        parts["left_out"], more = _left_out(study)
        tables.append(
            told.table(
                "Held-out people with the trait, inverted: it shows in",
                ("trait", "whole space", "space of people without it"), more,
            )
        )  # fmt: skip
        gap = [a["whole"]["value"] - a["without"]["value"] for a in parts["left_out"].values()]
        claims.append(
            told.claim("a trait that was left out shows less, by", sum(gap) / len(gap),
                       at_least=0.1)
        )  # fmt: skip
    return told.section(parts, tables, claims)


def _raw(study: Study) -> tuple[dict[str, Any], list[list[object]]]:
    space = study.space
    c = space.coefficients[study.some_people(900)]
    texts, seeds = study.texts(len(c), 901), list(range(70_000, 70_000 + len(c)))
    columns = [study.column(name) for name in study.binary]
    before = study.judge.read(draw(study, c, texts, seeds)).attributes[:, columns].mean(0)
    ways = {
        f"component {i + 1}": torch.eye(space.m)[i] * space.sigma[i]
        for i in range(min(COMPONENTS, space.m))
    }
    ways |= {name: direction(space, name) for name in study.binary}
    rows, counts = [], []
    for name, v in ways.items():
        made = study.judge.read(draw(study, c + STRENGTH * v, texts, seeds))
        moved = made.attributes[:, columns].mean(0) - before
        most = int(moved.abs().argmax())
        counts.append(int((moved.abs() > MOVED).sum()))
        rows.append([name, counts[-1], f"{study.binary[most]} {float(moved[most]):+.2f}"])
    first = min(COMPONENTS, space.m)
    return {
        "components": sum(counts[:first]) / first,
        "directions": sum(counts[first:]) / len(counts[first:]),
    }, rows


def without(space: WeightSpace, rows: torch.Tensor) -> WeightSpace:
    """The space of some of its people [k], spanned by their coefficients' components.

    A space of a space: what the shipped components leave out is left out here too.
    """
    some = space.coefficients[rows]
    middle = some.mean(0)
    m = max(1, min(space.m, len(rows) // 4))
    U = torch.linalg.svd((some - middle).double(), full_matrices=False).Vh[:m].T.float()
    # V U, whatever the basis is stored in; where std is 0 nothing ever moved.
    basis = (space.reconstruct(U.T.contiguous()) - space.mean) / space.std.clamp_min(1e-12)
    return WeightSpace(
        layout=space.layout,
        mean=space.reconstruct(middle[None])[0],
        std=space.std,
        basis=basis.T.contiguous(),
        coefficients=(some - middle) @ U,
        meta=dict(space.meta),
    )


def _left_out(study: Study) -> tuple[dict[str, Any], list[list[object]]]:
    space, size = study.space, study.size
    people = study.held_out(4 * size.inverted, 910)
    figures, rows = {}, []
    for name in study.binary[: 1 if size.attributes < 3 else 3]:
        column = study.column(name)
        has = (people.labels[:, column] > 0.5).nonzero()[:, 0][: size.inverted]
        lacking = (space.labels[:, space.attributes.index(name)] < 0.5).nonzero()[:, 0]
        k, shows = len(has), {}
        for kind, known in (("whole", space), ("without", without(space, lacking))):
            c = find(study, people.photos[has, 0], people.masks[has, 0], known)
            # `known` has no labels: pictures are of its adapters.
            w = known.reconstruct(c)
            sight = study.judge.read(
                draw(study, w, study.texts(k, 911), list(range(71_000, 71_000 + k)))
            )
            shows[kind] = told.figure((sight.attributes[:, column] > 0.5).float())
        figures[name] = {kind: value._asdict() for kind, value in shows.items()}
        rows.append([name, shows["whole"], shows["without"]])
    return figures, rows
