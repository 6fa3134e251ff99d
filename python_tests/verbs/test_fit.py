"""`fit`: a population's folder and a table of labels to a space; damaged inputs."""

from __future__ import annotations

import csv

import pytest
import torch
from awkward import normal
from tiny_world import population, write_population

from w2w_fast import InputError, fit
from w2w_fast.linear import largest_angle
from w2w_fast.population import open_population, write_shard
from w2w_fast.testing import assert_close
from w2w_fast.verbs.fit import add, angle_to_refit


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


def test_components_span_the_population(folder, layout):
    space = fit(folder, 11, dtype=torch.float32, meta={"prompt": "sks person"})
    w = population(layout)
    again = space.reconstruct(space.project(w))
    assert (again - w).abs().max() < 1e-4  # n - 1 components hold n people exactly
    assert space.n == 12 and space.meta["prompt"] == "sks person"
    assert space.meta["fit"]["route"] == "gram" and space.meta["fit"]["fixed"] == 0
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


def test_who_is_not_finite_is_named(folder, layout):
    people = open_population(folder)
    w = people.shards[1].clone()
    w[2, 4] = torch.nan
    from w2w_fast.files import write_manifest, write_tensors

    write_tensors(folder / "shard-00001.safetensors", {"w": w}, {"names": "[]", "about": "null"})
    write_manifest(folder)
    with pytest.raises(InputError, match="w: person-07 holds NaN or infinite numbers"):
        fit(folder, 3)
    with pytest.raises(InputError, match="wanted finite numbers"):
        write_shard(folder, 1, w, people.names[5:10])


def test_too_few_people(tmp_path, layout):
    write_population(tmp_path / "one", population(layout, 1), layout)
    with pytest.raises(InputError, match="wanted 1 to n - 1 = 0 for 1 models, got 3"):
        fit(tmp_path / "one", 3)
    with pytest.raises(InputError, match="wanted 10 models or more to choose from, got 1"):
        fit(tmp_path / "one", "auto")


@pytest.mark.parametrize("labels", [False, True])
def test_shards_of_any_size_give_the_same_space(tmp_path, layout, labels):
    w, spaces = population(layout, 40), []
    table = write_table(tmp_path / "labels.csv", people_rows(40)) if labels else None
    for batch in (1, 7, 40):
        write_population(tmp_path / f"{batch}", w, layout, batch)
        spaces.append(fit(tmp_path / f"{batch}", "auto" if labels else 5, labels=table))
        spaces[-1].save(tmp_path / f"space-{batch}")
    manifests = [(tmp_path / f"space-{batch}" / "manifest.json").read_bytes() for batch in (1, 7)]
    assert manifests[0] == manifests[1]
    assert torch.equal(spaces[0].basis, spaces[2].basis)


# --- people added


def crowd(layout, n, seed):
    """Adapters that share 6 directions, and a little that each has alone."""
    shared = normal(n, 6, seed=seed) * torch.linspace(3, 1, 6) @ normal(6, layout.size, seed=90)
    return normal(layout.size, seed=91) * 5 + shared + 0.3 * normal(n, layout.size, seed=seed + 1)


@pytest.fixture
def both(tmp_path, layout):
    """The folders of 30 people, of 12 more, and of all."""
    w, more = crowd(layout, 30, 1), crowd(layout, 12, 3)
    write_population(tmp_path / "old", w, layout)
    write_population(tmp_path / "new", more, layout, who="more")
    write_population(tmp_path / "all", torch.cat([w, more]), layout)
    return tmp_path


def test_what_is_added_to_a_whole_space_is_a_fit_of_all(both, layout):
    """With n - 1 components nothing of the old people is lost: only rounding is."""
    options = {"dtype": torch.float32, "device": "cpu"}
    with pytest.warns(UserWarning, match="29 components for 30 models"):
        old = fit(both / "old", 29, **options)
    bigger, want = add(both / "new", old, 10, **options), fit(both / "all", 10, **options)
    assert_close("mean", bigger.mean, want.mean, 1e-5)
    assert_close("std", bigger.std, want.std, 1e-5)
    assert_close("explained", bigger.explained, want.explained, 1e-5)
    assert largest_angle(bigger.basis, want.basis) < 1e-3
    assert_close("c", bigger.coefficients, want.coefficients, 1e-2)
    assert (bigger.n, bigger.m) == (42, 10) and bigger.names[29:31] == ["person-29", "more-00"]


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_what_is_added_to_a_cut_space_is_near_it(both, kind):
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    old = fit(both / "old", 6, dtype=dtype)
    old = old.quantize("int8") if kind == "int8" else old
    bigger = add(both / "new", old)
    angle = angle_to_refit(bigger, [both / "old", both / "new"])
    assert angle < 0.05
    assert angle_to_refit(fit(both / "all", 6), [both / "all"]) < 5e-3  # the basis's rounding
    found, wanted = bigger.reconstruct(bigger.coefficients), fit(both / "all", 6)
    close = (found - wanted.reconstruct(wanted.coefficients)).norm(dim=1) / found.norm(dim=1)
    assert float(close.max()) < 0.05


def test_labels_of_both(both):
    rows = people_rows(30)
    more = [[f"more-{i:02d}", i % 2, 3.0 + i] for i in range(12)]
    old = fit(both / "old", 6, labels=write_table(both / "old.csv", rows))
    table = write_table(
        both / "new.csv", [[name, age, hat] for name, hat, age in more], ("name", "age", "hat")
    )
    bigger = add(both / "new", old, labels=table)
    assert bigger.attributes == ["hat", "age"] and bigger.directions.shape == (2, 6)
    assert bigger.labels[30:].tolist() == [row[1:] for row in more]
    assert set(bigger.meta["readers"]) == {"hat", "age"}
    with pytest.warns(UserWarning, match="directions are left out"):
        assert add(both / "new", old).attributes == []
    short = write_table(both / "short.csv", [row[:2] for row in more], ("name", "hat"))
    with pytest.raises(InputError, match="no column 'age', which the space knows of"):
        add(both / "new", old, labels=short)


def test_what_cannot_be_added(both, layout):
    import dataclasses

    old = fit(both / "old", 6)
    with pytest.raises(InputError, match="'person-00' is in the space already"):
        add(both / "old", old)
    bare = dataclasses.replace(old, coefficients=None)
    with pytest.raises(InputError, match="holds no coefficients"):
        add(both / "new", bare)
    other = dataclasses.replace(layout, alpha=layout.alpha + 1)
    with pytest.raises(InputError, match="another layout"):
        add(both / "new", dataclasses.replace(old, layout=other))
    with pytest.raises(InputError, match=r"spans \d+ dimensions, got 25"):
        add(both / "new", old, 25)
    stranger = crowd(layout, 12, 3) - 5 * normal(layout.size, seed=91)
    write_population(both / "strangers", stranger, layout, who="stranger")
    with pytest.warns(UserWarning, match="did not start from the same adapter"):
        add(both / "strangers", old)
