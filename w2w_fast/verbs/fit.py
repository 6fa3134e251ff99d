"""`fit`: a weight space from a population (w2w paper, section 3.2)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..labels import labels_of
from ..population import open_population
from ..space import WeightSpace


def fit(
    population: str | Path,
    components: int,
    *,
    labels: str | Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
    meta: dict[str, Any] | None = None,
) -> WeightSpace:
    """The weight space of a finished population folder, with directions if labels are given.

    labels: a CSV or Parquet table with one column of names (the subjects') and a column of
        numbers for each attribute. Everybody needs a row; rows of others are left out.
    Raises InputError for unfinished populations, missing names and columns that are not numbers.
    """
    people = open_population(population)
    labels = labels or people.labels
    table = None if labels is None else labels_of(labels, people.names)
    return WeightSpace.from_population(
        people.load(),
        people.layout,
        components,
        labels=None if table is None else table[0],
        attributes=() if table is None else table[1],
        names=people.names,
        dtype=dtype,
        meta=meta,
    )
