"""Where people lie in the population of a space: how far out, next to whom.

Coefficients are whitened first, z = (c - mu) / sigma, so that |z| is the Mahalanobis distance from
the mean. Likeness is the cosine of two z, the angle between people: priors and truncation shorten
z and leave angles alone. Novelty is a distance between two z over sqrt(2 m), about 1 for strangers.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import InputError
from .population import open_population
from .space import WeightSpace

_NEAREST = 5
_SAMPLE = 1000  # people of the population whose own nearest is looked for
_ROWS = 1024  # compared at once


def whitened(space: WeightSpace, c: Tensor) -> Tensor:
    """z = (c - mu) / sigma of c ``[k, m]``; 0 where nobody differs."""
    z = (c.to(space.mu) - space.mu) / space.sigma.clamp_min(1e-12)
    return torch.where(space.sigma > 0, z, 0)


def with_people(space: WeightSpace, population: str | Path) -> WeightSpace:
    """The space with the people of a finished population folder for its own, without labels.

    For a space that holds statistics only, as published ones may. InputError for another layout.
    """
    people = open_population(population)
    if people.layout != space.layout:
        raise InputError(f"{population}: a population of another layout than the space's")
    c = torch.cat([space.project(w.to(space.mean)) for w in people.shards])
    return dataclasses.replace(space, coefficients=c, names=people.names, labels=None)


def outside(space: WeightSpace, w: Tensor, c: Tensor) -> Tensor:
    """The share [k] of adapters w [k, d] that their coefficients c [k, m] do not hold.

    Of the squared distance from the mean in standardised coordinates, where the components are
    orthonormal; coordinates in which nobody differs are not counted. People of the population have
    1 - explained.sum() on average, others more.
    """
    far = (w.to(space.mean) - space.mean) / space.std.clamp_min(1e-12) * (space.std > 0)
    return (1 - c.to(far).square().sum(1) / far.square().sum(1).clamp_min(1e-30)).clamp(0, 1)


def whereabouts(space: WeightSpace, c: Tensor) -> list[dict[str, Any]]:
    """Where people c [k, m] lie in the population of the space: for each of them

    distance: Mahalanobis, from the mean; rms: the same over sqrt(m), sd a component;
    and where the space holds its people's coefficients
    farther: the share of the population that lies farther out, 0 for whom none does;
    nearest: (name, cosine) of the five at the smallest angles;
    closer: the share of the population's people whose own nearest is closer than this person's;
    copy: whether that is under 1%.
    """
    z = whitened(space, c)
    distance = z.norm(dim=1)
    told: list[dict[str, Any]] = [
        {"distance": d, "rms": d / space.m**0.5} for d in distance.tolist()
    ]
    if space.n < 2 or not told:
        return told
    population = whitened(space, space.coefficients)
    far = population.norm(dim=1)
    unit = torch.nn.functional.normalize(population)
    sample = _some(space)
    between = unit[sample] @ unit.T
    between[torch.arange(len(sample), device=sample.device), sample] = -1
    closest = between.amax(1)
    near = [(part @ unit.T).topk(min(_NEAREST, space.n)) for part in
            torch.nn.functional.normalize(z).split(_ROWS)]  # fmt: skip
    best, who = (torch.cat(part) for part in zip(*near, strict=True))
    names = names_of(space)
    for i, about in enumerate(told):
        closer = float((closest > best[i, 0]).float().mean())
        about["farther"] = float((far > distance[i]).float().mean())
        about["nearest"] = [
            (names[j], cosine) for j, cosine in zip(who[i].tolist(), best[i].tolist(), strict=True)
        ]
        about |= {"closer": closer, "copy": closer < 0.01}
    return told


class Novelty(NamedTuple):
    """distance [k] to the nearest person of the population, who [k] that is, and the same distance
    of people of the population to their own nearest: own [s], at most a thousand of them."""

    distance: Tensor
    who: Tensor
    own: Tensor

    def __str__(self) -> str:
        low, middle, high = self.own.quantile(self.own.new_tensor([0.05, 0.5, 0.95])).tolist()
        closer = float((self.distance < low).float().mean())
        return (
            f"nearest of the population at {float(self.distance.median()):.2f} (median); theirs at "
            f"{middle:.2f}, nine in ten from {low:.2f} to {high:.2f}; {closer:.0%} are closer than "
            "that"
        )


def novelty(space: WeightSpace, c: Tensor) -> Novelty:
    """How far people c [k, m] are from the nearest the space was made from, beside train-train.

    Distances of whitened coefficients over sqrt(2 m): that of two independent people is about 1.
    InputError where the space does not hold its people (see ``with_people``).
    """
    if space.n < 2:
        raise InputError("novelty: this space does not hold its people; name their population")
    population = whitened(space, space.coefficients)
    z, rows = whitened(space, c), _some(space)
    scale = (2 * space.m) ** 0.5
    nearest = [torch.cdist(part, population).min(1) for part in z.split(_ROWS)]
    own = torch.cdist(population[rows], population)
    own[torch.arange(len(rows), device=rows.device), rows] = torch.inf
    distance = torch.cat([found.values for found in nearest] or [z.new_empty(0)])
    who = torch.cat([found.indices for found in nearest] or [rows[:0]])
    return Novelty(distance / scale, who, own.amin(1) / scale)


def names_of(space: WeightSpace) -> list[str]:
    """Of the people held, "row 0" ... where they have none."""
    return space.names or [f"row {i}" for i in range(space.n)]


def _some(space: WeightSpace) -> Tensor:
    """Rows of the population, evenly, at most _SAMPLE."""
    return torch.linspace(0, space.n - 1, min(space.n, _SAMPLE)).long().to(space.mu.device)
