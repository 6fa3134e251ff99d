"""`fit`: a population's folder and a table of labels to a space; damaged inputs."""

from __future__ import annotations

import csv

import pytest
import torch
from tiny_world import population, write_population

from w2w_fast import InputError, fit
from w2w_fast.verbs.populate import read_population


@pytest.fixture
def folder(tmp_path, layout):
    write_population(tmp_path / "population", population(layout), layout)
    return tmp_path / "population"


def write_table(path, rows, header=("name", "hat", "age")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def people_rows(n=12):
    return [[f"person-{i:02d}", i % 2, i / 4] for i in range(n)]


def test_the_population_is_read_in_order(folder, layout):
    w, read, names = read_population(folder)
    assert torch.equal(w, population(layout)) and read == layout
    assert names == [f"person-{i:02d}" for i in range(12)]


def test_components_span_the_population(folder, layout):
    space = fit(folder, 11, dtype=torch.float32, meta={"prompt": "sks person"})
    w = population(layout)
    again = space.reconstruct(space.project(w))
    assert (again - w).abs().max() < 1e-4  # n - 1 components hold n people exactly
    assert space.n == 12 and space.meta == {"prompt": "sks person"}
    assert space.names[3] == "person-03" and space.attributes == []


@pytest.mark.filterwarnings("ignore:.*labelled models")
def test_labels_are_matched_by_name(folder, tmp_path):
    rows = people_rows()
    straight = fit(folder, 3, labels=write_table(tmp_path / "a.csv", rows))
    extra = [["somebody-else", 1, 9.0]]
    shuffled = fit(folder, 3, labels=write_table(tmp_path / "b.csv", extra + rows[::-1]))
    assert straight.attributes == ["hat", "age"]
    assert straight.labels[:, 1].tolist() == pytest.approx([i / 4 for i in range(12)])
    assert torch.equal(straight.labels, shuffled.labels)
    assert torch.equal(straight.directions, shuffled.directions)


@pytest.mark.parametrize(
    ("rows", "header", "said"),
    [
        (people_rows(11), ("name", "hat", "age"), "1 of 12.*person-11"),
        (people_rows() + people_rows(1), ("name", "hat", "age"), "twice"),
        ([[1, *r[1:]] for r in people_rows()], ("name", "hat", "age"), "no column of names"),
        ([[r[0], "yes", 1] for r in people_rows()], ("name", "hat", "age"), "one column of text"),
        ([[r[0], "inf", 1] for r in people_rows()], ("name", "hat", "age"), "not numbers"),
        ([[r[0], "", 1] for r in people_rows()], ("name", "hat", "age"), "not numbers"),
        ([r[:1] for r in people_rows()], ("name",), "at least one"),
    ],
)
def test_bad_tables(folder, tmp_path, rows, header, said):
    with pytest.raises(InputError, match=said):
        fit(folder, 3, labels=write_table(tmp_path / "labels.csv", rows, header))


def test_other_files_as_tables(folder, tmp_path):
    (tmp_path / "labels.parquet").write_bytes(b"not parquet")
    for name in ("labels.parquet", "missing.csv"):
        with pytest.raises(InputError, match=name):
            fit(folder, 3, labels=tmp_path / name)


def test_too_many_components(folder):
    with pytest.raises(InputError, match="components"):
        fit(folder, 12)


def test_unfinished_and_damaged_populations_are_refused(folder):
    record, shard = folder / "population.json", folder / "shard-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(InputError, match="shard-00001"):
        fit(folder, 3)
    shard.unlink()
    with pytest.raises(InputError, match="shard-00001"):
        fit(folder, 3)
    record.write_text(record.read_text().replace('"finished": true', '"finished": false'))
    with pytest.raises(InputError, match="not finished"):
        fit(folder, 3)
