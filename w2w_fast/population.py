"""A population on disk: many people's adapters in shards, with a table of who they are.

    population.json          format, layout, how it was made, whether it is finished
    shard-00000.safetensors  w [n_i, d] float32, the names of its rows in the metadata
    people.parquet           one row a subject: name, shard, row, reason (set aside), what was seen
    labels.parquet           what is known of the people, where a table was given
    manifest.json            sha256 of all of these, written last

`populate` and `collect` write one, shard by shard; `fit` streams it. Who was set aside (diverged,
unreadable) is in the table with the reason and in no shard.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import sharing
from .errors import InputError
from .files import (
    atomic_path,
    check_manifest,
    read_tensors,
    write_json,
    write_manifest,
    write_tensors,
)
from .layout import Layout

if TYPE_CHECKING:
    from pyarrow import Table

FORMAT, VERSION = "w2w_fast.population", 2
RECORD, PEOPLE, LABELS = "population.json", "people.parquet", "labels.parquet"


@dataclass(frozen=True)
class Population:
    """A finished population, checked: layout, names (those in shards, in order), table, job.

    shards: w [n_i, d] float32 of each, mapped from disk: nothing is read until it is used.
    """

    folder: Path
    layout: Layout
    names: list[str]
    shards: list[Tensor]
    table: Table
    job: dict[str, Any]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def labels(self) -> Path | None:
        """The table of labels that came with it."""
        path = self.folder / LABELS
        return path if path.is_file() else None

    def load(self) -> Tensor:
        """Every adapter at once, w [n, d]."""
        return torch.cat(self.shards)


def open_population(folder: str | Path, *, verify: bool = True) -> Population:
    """The finished population in a folder; InputError, naming the file, for anything else.

    ``verify`` compares every file with the manifest's sha256. Numbers that are not finite are
    found by who uses them: that would read all of it.
    """
    folder = Path(folder)
    record = read_record(folder)
    if not record.get("finished"):
        raise InputError(f"{folder}: this population is not finished; run the same command again")
    if verify:
        listed = check_manifest(folder)
        if not {RECORD, PEOPLE} <= set(listed):
            raise InputError(f"{folder}: {RECORD} or {PEOPLE} is not in the manifest")
    layout = Layout.from_json(record.get("layout"))
    table = _people(folder / PEOPLE)
    shards: list[Tensor] = []
    names: list[str] = []
    where = {(s, r): n for n, s, r in zip(*_columns(table), strict=True) if s is not None}
    count = record.get("shards")
    for i in range(count if isinstance(count, int) else 0):
        expect = {"w": ((None, layout.size), {torch.float32})}
        w = read_tensors(shard_path(folder, i), expect=expect, finite=False)[0]["w"]
        rows = [where.pop((i, row), None) for row in range(len(w))]
        if None in rows:
            raise InputError(f"{folder}: {PEOPLE} does not say who row {rows.index(None)} of "
                             f"shard {i} is")  # fmt: skip
        shards.append(w)
        names += rows
    if where or not shards:
        raise InputError(f"{folder}: {PEOPLE}: {len(where)} people are in no shard")
    return Population(folder, layout, names, shards, table, record.get("job", {}))


def begin(folder: str | Path, layout: Layout, job: Mapping[str, Any]) -> Path:
    """Start a population's folder, or take up one that was started with the same job.

    job: JSON that says how it is made. InputError, naming what differs, for another one.
    """
    folder = Path(folder)
    record = {"format": FORMAT, "version": VERSION, "layout": layout.to_json(), "job": dict(job)}
    sharing.begin(folder / RECORD, record | {"finished": False}, "population")
    return folder


def shard_path(folder: Path, i: int) -> Path:
    """Where shard i is."""
    return folder / f"shard-{i:05d}.safetensors"


def write_shard(folder: Path, i: int, w: Tensor, names: Sequence[str], about: Any = None) -> None:
    """Shard i: w [n_i, d], finite, and whose they are; ``about`` is JSON kept beside them."""
    if w.shape[0] != len(names) or not bool(w.isfinite().all()):
        raise InputError(f"shard {i}: wanted finite numbers and a name for each of {len(w)} rows")
    metadata = {"names": json.dumps(list(names)), "about": json.dumps(about)}
    write_tensors(shard_path(folder, i), {"w": w.float()}, metadata)


def read_about(folder: Path, i: int) -> tuple[list[str], Any]:
    """(names, about) of shard i, as ``write_shard`` had them."""
    _, metadata = read_tensors(shard_path(folder, i), finite=False)
    return json.loads(metadata["names"]), json.loads(metadata["about"])


def finish(
    folder: Path, shards: int, people: Sequence[Mapping[str, Any]], labels: Table | None = None
) -> None:
    """Close a population: the table of people, the labels, the record and, last, the manifest.

    people: one row a subject, all with the same keys: name, shard and row (None: set aside),
        reason (why it was, or empty), and what else its maker tells.
    """
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.Table.from_pylist([dict(row) for row in people])
    for name, content in ((PEOPLE, table), (LABELS, labels)):
        if content is not None:
            with atomic_path(folder / name) as temporary:
                parquet.write_table(content, temporary)
    write_json(folder / RECORD, read_record(folder) | {"finished": True, "shards": shards})
    write_manifest(folder)


def read_record(folder: Path) -> dict[str, Any]:
    """population.json, of a finished population or one in the making."""
    return sharing.read_record(folder / RECORD, FORMAT, VERSION, "population")


def _people(path: Path) -> Table:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
        for name, kind in (("name", "string"), ("shard", "int64"), ("row", "int64")):
            table[name].cast(kind)
    except (pa.ArrowException, OSError, KeyError) as error:
        raise InputError(f"{path}: not a table of people: {str(error).splitlines()[0]}") from None
    return table


def _columns(table: Table) -> Iterator[list[Any]]:
    return (table[name].to_pylist() for name in ("name", "shard", "row"))
