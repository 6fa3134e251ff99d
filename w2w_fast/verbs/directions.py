"""`directions`: readers and directions from a table of labels, of some people, at any time."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..attributes import attributes_of
from ..errors import InputError
from ..labels import labels_of_some
from ..readers import PERMUTATIONS, fit_readers
from ..space import WeightSpace

_FEWEST = 10


def directions(
    space: WeightSpace,
    labels: str | Path,
    *,
    method: str = "ridge",
    keep: bool = True,
    permutations: int = PERMUTATIONS,
) -> WeightSpace:
    """The space with a reader and a direction for each attribute of a table of labels.

    labels: CSV or Parquet, a column of names and one of numbers an attribute. Some of the space's
        people are enough, ten at least; rows of others are left out.
    method: ridge, lstsq (the paper's) or logistic, see ``readers.fit_readers``; how well strangers
        are read is kept in ``meta["readers"]``.
    keep: the attributes that the space has stay beside the new ones; of one name the new one does.
    The space's table of labels stays if everybody has all of them, else it is dropped.
    Raises InputError for spaces without people or names, and tables that do not fit.
    """
    if space.coefficients is None or space.names is None:
        raise InputError(
            "directions: this space does not hold its people by name; use one that `fit` made, or "
            "name their population"
        )
    rows, table, attributes = labels_of_some(labels, space.names)
    if len(rows) < _FEWEST:
        raise InputError(
            f"labels: {labels}: {len(rows)} of the space's {space.n} people; wanted {_FEWEST} at "
            "least"
        )
    c = space.coefficients[rows]
    weights, report = fit_readers(
        c, table, attributes, method=method, permutations=permutations, origin=space.mu
    )
    for entry in report.values():
        entry["people"] = len(rows)
    everybody = len(rows) == space.n
    parts = [_Part(attributes, weights.to(space.mu), table if everybody else None, report)]
    if keep and space.attributes:
        parts.insert(0, _old(space, attributes))
    known = [part.labels for part in parts]
    made = dataclasses.replace(
        space,
        attributes=[name for part in parts for name in part.names],
        classifiers=torch.cat([part.weights for part in parts]),
        directions=None,
        labels=None if None in known else torch.cat([x.to(space.mu) for x in known], dim=1),
        meta={**space.meta, "readers": {k: v for part in parts for k, v in part.report.items()}},
    )
    made.set_directions()
    return made


@dataclasses.dataclass(frozen=True)
class _Part:
    """Attributes with their readers [a, m], and labels [n, a] where everybody has them."""

    names: list[str]
    weights: Tensor
    labels: Tensor | None
    report: Mapping[str, Any]


def _old(space: WeightSpace, replaced: list[str]) -> _Part:
    """The space's own attributes but those, with what their scores mean written down."""
    if space.classifiers is None:
        raise InputError("directions: this space has directions without readers: they cannot stay")
    rows = [i for i, name in enumerate(space.attributes) if name not in replaced]
    names = [space.attributes[i] for i in rows]
    told, known = space.meta.get("readers", {}), attributes_of(space)
    report = {name: dict(told.get(name, {})) for name in names}
    for name in names:
        if name in known:
            report[name]["calibration"] = known[name].to_json()
    labels = None if space.labels is None else space.labels[:, rows]
    return _Part(names, space.classifiers[rows], labels, report)
