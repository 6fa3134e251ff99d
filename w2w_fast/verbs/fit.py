"""`fit`: a weight space from a population (w2w paper, section 3.2)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..space import WeightSpace
from .populate import read_population


def fit(
    population: str | Path,
    components: int,
    *,
    labels: str | Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
    meta: dict[str, Any] | None = None,
) -> WeightSpace:
    """The weight space of a finished population folder, with directions if labels are given.

    labels: a CSV or Parquet table with a column `name` (the subjects' names) and a column of
        numbers for each attribute. Everybody needs a row; rows of others are left out.
    Raises InputError for unfinished populations, missing names and columns that are not numbers.
    """
    w, layout, names = read_population(population)
    table = None if labels is None else read_labels(labels, names)
    return WeightSpace.from_population(
        w,
        layout,
        components,
        labels=None if table is None else table[0],
        attributes=() if table is None else table[1],
        names=names,
        dtype=dtype,
        meta=meta,
    )


def read_labels(path: str | Path, names: list[str]) -> tuple[Tensor, list[str]]:
    """The labels [n, a] f32 of the people `names`, and the names of the attributes."""
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such table of labels")
    read = pyarrow.parquet.read_table if path.suffix == ".parquet" else pyarrow.csv.read_csv
    try:
        columns = read(path).to_pydict()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable CSV or Parquet table: {error}") from error
    if "name" not in columns:
        raise InputError(f"{path}: no column 'name'; it has {', '.join(columns)}")
    found = [str(name) for name in columns.pop("name")]
    where = {name: i for i, name in enumerate(found)}
    if len(where) != len(found):
        raise InputError(f"{path}: a name occurs twice in column 'name'")
    missing = [name for name in names if name not in where]
    if missing:
        raise InputError(
            f"{path}: no labels for {len(missing)} of {len(names)} people, {missing[0]!r} first"
        )
    rows = [where[name] for name in names]
    try:
        table = torch.tensor(
            [[float(values[i]) for values in columns.values()] for i in rows], dtype=torch.float32
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: labels must be numbers: {error}") from error
    if not columns or not torch.isfinite(table).all():
        raise InputError(f"{path}: wanted at least one column of finite numbers beside 'name'")
    return table, list(columns)
