"""Tables of labels: what is known of the people of a population, CSV or Parquet."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import InputError

if TYPE_CHECKING:
    from pyarrow import Table


def read_labels(path: str | Path) -> tuple[list[str] | None, list[str], Tensor]:
    """(names or None, attributes, labels [n, a] float32) of a CSV or Parquet table.

    A text column, if there is one, holds the subjects' names; every other column is an attribute.
    """
    from pyarrow import ArrowException, csv, parquet
    from pyarrow import types as kinds

    path = Path(path)
    readers = {".csv": csv.read_csv, ".parquet": parquet.read_table}
    if path.suffix not in readers or not path.is_file():
        raise InputError(f"labels: {path}; wanted an existing .csv or .parquet file")
    try:
        table = readers[path.suffix](path)
    except (ArrowException, OSError) as error:
        raise InputError(f"labels: {path}: {str(error).splitlines()[0]}") from None
    text = [
        f.name for f in table.schema if kinds.is_string(f.type) or kinds.is_large_string(f.type)
    ]
    attributes = [name for name in table.column_names if name not in text]
    if len(set(table.column_names)) != table.num_columns or len(text) > 1 or not attributes:
        raise InputError(
            f"labels: {path}: columns {reprlib.repr(table.column_names)}, text in {len(text)}; "
            "wanted distinct names, one column of text at most and at least one of numbers"
        )
    columns = []
    for name in attributes:
        if not name or name.startswith("__"):
            raise InputError(f"labels: {path}: column {name!r} is an index; write without it")
        try:
            column = torch.tensor(table[name].cast("float32").to_pylist(), dtype=torch.float32)
        except (ArrowException, TypeError):  # TypeError: an empty cell
            column = torch.tensor(torch.nan)
        if not column.isfinite().all():
            raise InputError(f"labels: {path}: column {name!r} has cells that are not numbers")
        columns.append(column)
    return (table[text[0]].to_pylist() if text else None), attributes, torch.stack(columns, dim=1)


def labels_of(path: str | Path, people: Sequence[str]) -> tuple[Tensor, list[str]]:
    """The labels [n, a] of the people named, in their order, and the attributes.

    Everybody needs one row; rows of others are left out. InputError otherwise.
    """
    rows, labels, attributes = labels_of_some(path, people)
    if len(rows) < len(people):
        missing = sorted(set(range(len(people))) - set(rows))
        raise InputError(
            f"labels: {path}: nothing on {len(missing)} of {len(people)} people, "
            f"{people[missing[0]]!r} first"
        )
    return labels, attributes


def labels_of_some(path: str | Path, people: Sequence[str]) -> tuple[list[int], Tensor, list[str]]:
    """(who [k] of the people named has a row, their labels [k, a], the attributes)."""
    names, attributes, labels = read_labels(path)
    if names is None:
        raise InputError(f"labels: {path}: no column of names to join the people by")
    where = {name: i for i, name in enumerate(names)}
    if len(where) != len(names):
        raise InputError(f"labels: {path}: a name occurs twice")
    rows = [i for i, name in enumerate(people) if name in where]
    return rows, labels[[where[people[i]] for i in rows]], attributes


def labels_table(path: str | Path, people: Sequence[str]) -> Table:
    """The same as a table: a column of names, then one an attribute."""
    import pyarrow as pa

    labels, attributes = labels_of(path, people)
    columns = dict(zip(attributes, labels.mT.tolist(), strict=True))
    return pa.table({"name": list(people), **columns})
