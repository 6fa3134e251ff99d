"""`fit`: a weight space from a population (w2w paper, section 3.2), or a larger one from a space.

A space that exists stands for its people: their mean and spread are known, and so is where each of
them is along its components. ``add`` merges the moments exactly, puts m + 1 rows that have the old
people's covariance in the place of all of them, and fits these and the new people together. What
is lost is what the old people had outside their components.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import choice, ops
from ..components import (
    PASSES,
    Moments,
    Stack,
    Standardised,
    coefficients,
    moments,
    principal_components,
)
from ..errors import InputError
from ..labels import labels_of
from ..linear import largest_angle, orthonormalise_
from ..population import open_population
from ..space import WeightSpace
from ..start import Start, warn_of_many


def fit(
    population: str | Path,
    components: int | str,
    *,
    labels: str | Path | None = None,
    method: str = "ridge",
    dtype: torch.dtype = torch.bfloat16,
    meta: dict[str, Any] | None = None,
    device: torch.device | str = "cpu",
    route: str = "auto",
    passes: int = PASSES,
    oversample: int | None = None,
) -> WeightSpace:
    """The weight space of a finished population folder, with directions if labels are given.

    components: how many, or "auto": see ``choice``.
    labels: a CSV or Parquet table with one column of names (the subjects') and a column of
        numbers for each attribute, by default the one in the folder. Everybody needs a row; rows
        of others are left out.
    method: of the readers, ridge, lstsq or logistic. route, passes, oversample: see ``components``.
    Raises InputError for populations unfinished, damaged or not finite, missing names and columns
    that are not numbers. Under torchrun every rank calls this and gets the same space.
    """
    people = open_population(population)
    labels = labels or people.labels
    table, attributes = (None, []) if labels is None else labels_of(labels, people.names)
    auto, most = components == "auto", 0
    if auto:
        components = most = choice.most(len(people))
        if table is None:
            components = choice.by_completion(people.shards, most, device)
    later = auto and table is not None  # readers choose, of as many components as may be
    space = WeightSpace.from_population(
        people.shards,
        people.layout,
        int(components),
        labels=None if later else table,
        attributes=attributes,
        method=method,
        names=people.names,
        dtype=dtype,
        meta=meta,
        device=device,
        route=route,
        passes=passes,
        oversample=oversample,
    )
    if later:
        space = space.cut(choice.by_reading(space.coefficients, table))
        space.fit_directions(table, attributes, method=method)
    space.meta["fit"]["made_by"] = people.job.get("verb", "")
    if auto:
        space.meta["fit"] |= {"chosen_by": "reading" if later else "completion", "of": most}
    return space


def add(
    population: str | Path,
    space: WeightSpace,
    components: int | None = None,
    *,
    labels: str | Path | None = None,
    method: str = "ridge",
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    route: str = "auto",
    passes: int = PASSES,
    oversample: int | None = None,
) -> WeightSpace:
    """The space of a space's people and those of a finished population, the old ones first.

    components: the old space's number by default. Directions are fitted again where the old people
    have labels and the new ones' table has the same attributes; else there are none.
    Raises InputError as ``fit`` does, and for a space without people, another layout, or a name
    that both have.
    """
    people = open_population(population)
    if space.coefficients is None:
        raise InputError("add: the space holds no coefficients, so nothing stands for its people")
    if people.layout != space.layout:
        raise InputError(f"add: {population}: a population of another layout than the space's")
    twice = set(people.names) & set(space.names or ())
    if twice:
        raise InputError(f"add: {min(twice)!r} is in the space already")
    labels, table = labels or people.labels, None
    if labels is not None and space.labels is not None:
        table = _labels_of_both(labels, people.names, space)
    elif space.labels is not None:
        warnings.warn("the people added have no labels: directions are left out", stacklevel=2)
    m = space.m if components is None else components

    stack, start = Stack(people.shards).near(device), Start(people.layout, device)
    new = moments(stack, people.names, start.add, device)
    old = _Old(space, device)
    known = old.moments + new
    old.standardise(known.mean, known.std)
    pca = principal_components(
        Standardised(stack, known.mean, known.std, old.rows(), device), known.n, m,
        way=route, passes=passes, oversample=oversample,
    )  # fmt: skip
    mean, std, basis = known.mean.float(), known.std.float(), pca.basis.to(dtype)
    c = torch.cat([old.project(basis), coefficients(stack, basis, mean, std)])
    facts = {"route": pca.route, **start.check(new.n, std, space.mean), "added": new.n}
    kept = {key: value for key, value in space.meta.items() if key not in ("readers", "quantized")}
    bigger = WeightSpace(
        layout=space.layout,
        mean=mean.cpu(),
        std=std.cpu(),
        basis=basis.cpu(),
        coefficients=c.cpu(),
        names=None if space.names is None else [*space.names, *people.names],
        explained=pca.explained.float().cpu(),
        meta=kept | {"fit": facts},
    )
    if table is not None:
        bigger.fit_directions(table, space.attributes, method=method)
    elif 3 * m > known.n:
        warn_of_many(m, known.n)
    return bigger


def angle_to_refit(
    space: WeightSpace, populations: Sequence[str | Path], device: torch.device | str = "cpu"
) -> float:
    """The largest principal angle, in radians, between a space and one fitted from nothing.

    populations: the folders of all its people, the ones added too. Both bases are standardised, by
    the same mean and std but for rounding.
    """
    opened = [open_population(folder) for folder in populations]
    shards = [shard for people in opened for shard in people.shards]
    if space.quantized or any(people.layout != space.layout for people in opened):
        raise InputError("refit: wanted populations of the space's layout, and a basis of floats")
    stack = Stack(shards).near(device)
    known = moments(stack, device=device)
    again = principal_components(
        Standardised(stack, known.mean, known.std, device=device), known.n, space.m
    ).basis
    # A basis that was rounded to be stored is not quite orthonormal any more.
    basis = space.basis.to(again)
    orthonormalise_(basis)
    return largest_angle(again, basis)


class _Old:
    """The people of a space, in the units of the space that they become a part of.

    z = a + c U^T with a = (mean_old - mean) / std, U = (std_old / std) V_old: what ``add`` fits.
    """

    def __init__(self, space: WeightSpace, device: torch.device | str) -> None:
        n, std = space.n, space.std.to(device)
        self._c = space.coefficients.to(device)
        self.moments = Moments(n, space.mean.to(device).double(), n * std.double().square())
        eye = torch.eye(space.m, device=device)
        scale = None if space.row_scale is None else space.row_scale.to(device)
        self._u = ops.reconstruct(eye, space.basis.to(device), None, std, row_scale=scale)

    def standardise(self, mean: Tensor, std: Tensor) -> None:
        """Take the mean and std ``[d]`` of everybody."""
        gain = torch.where(std > 0, 1 / std, 0)
        self._a = ((self.moments.mean - mean) * gain).float()
        self._u *= gain.float()

    def rows(self) -> Tensor:
        """[r + 1, d] rows F, r at most m, with F^T F = Z^T Z: no row is a person any more."""
        c = self._c.double()
        middle = c.mean(0)
        spread = torch.linalg.qr(c - middle, mode="r")[1].float() @ self._u
        mean = (self._a + middle.float() @ self._u) * self.moments.n**0.5
        return torch.cat([mean[None], spread])

    def project(self, basis: Tensor) -> Tensor:
        """Their coefficients ``[n, m]`` in a basis ``[d, m]``."""
        basis = basis.float()
        return self._a @ basis + self._c @ (self._u @ basis)


def _labels_of_both(path: str | Path, names: Sequence[str], space: WeightSpace) -> Tensor:
    """Labels [n, a] of a space's people and the new ones', attributes as the space has them."""
    table, attributes = labels_of(path, names)
    missing = [name for name in space.attributes if name not in attributes]
    if missing:
        raise InputError(f"labels: {path}: no column {missing[0]!r}, which the space knows of")
    columns = [attributes.index(name) for name in space.attributes]
    return torch.cat([space.labels.cpu(), table[:, columns]])
