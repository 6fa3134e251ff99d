"""`read`: who an adapter is, from a file, a folder, a population; as a table and a map."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from PIL import Image
from tiny_world import ATTRIBUTES, population, write_population

from w2w_fast import InputError, Layout, export, read, sample, write_coefficients
from w2w_fast.attributes import read_attributes
from w2w_fast.verbs.read import as_table, draw_map, lines
from w2w_fast.whereabouts import outside


def test_coefficients(space):
    c = space.coefficients[[3, 7]]
    first, second = read(space, c)
    assert first["name"] == "row 0" and first["outside"] is None
    assert first["nearest"][0][1] == pytest.approx(1) and first["copy"]
    want = read_attributes(space, c)
    assert second["attributes"]["beard"] == {"probability": float(want["beard"]["probability"][1])}
    assert set(second["attributes"]["age"]) == {"value", "low", "high"}
    assert list(second["attributes"]) == ATTRIBUTES
    assert read(space, c[:0]) == []


@pytest.mark.parametrize("format", ["kohya", "diffusers", "peft"])
def test_an_adapter_reads_as_its_coefficients_do(space, tmp_path, format):
    c = sample(space, 1, seed=3)
    path = tmp_path / ("someone" if format == "peft" else "someone.safetensors")
    export(space, c, path, format=format)
    (fact,) = read(space, path)
    (want,) = read(space, c)
    assert fact["name"] == "someone" and fact["source"] == str(path)
    assert fact["distance"] == pytest.approx(want["distance"], rel=1e-3)
    assert fact["nearest"][0][0] == want["nearest"][0][0]
    assert fact["attributes"]["age"]["value"] == pytest.approx(
        want["attributes"]["age"]["value"], abs=1e-2
    )
    assert fact["outside"] < 1e-3  # it came out of the space


def test_what_is_outside_is_measured(space, tmp_path):
    """An adapter half in the space, half at right angles to it."""
    c = sample(space, 1, seed=3)
    noise = torch.randn(space.d, generator=torch.Generator().manual_seed(0))
    noise -= space.basis.float() @ (space.basis.float().T @ noise)
    noise *= c.norm() / noise.norm()
    w = space.reconstruct(c) + space.std * noise
    assert outside(space, w, space.project(w)).item() == pytest.approx(0.5, abs=1e-3)
    export(space.layout, w, tmp_path / "odd.safetensors")
    assert read(space, tmp_path / "odd.safetensors")[0]["outside"] == pytest.approx(0.5, abs=1e-3)
    fixed = dataclasses.replace(space, std=torch.zeros_like(space.std))
    assert outside(fixed, w, torch.zeros_like(c)).item() == 1  # nothing moved: nothing is inside


def test_a_folder_tells_who_does_not_fit(space, tmp_path):
    for i in (10, 2):
        export(space, sample(space, 1, seed=i), tmp_path / f"p{i}.safetensors")
    write_coefficients(tmp_path / "three.safetensors", sample(space, 3))
    export(space.layout, torch.zeros(space.d), tmp_path / "peft", format="peft")
    narrow = Layout(space.layout.modules[:2], 1, 8.0)
    export(narrow, torch.zeros(narrow.size), tmp_path / "other.safetensors")
    (tmp_path / "notes.txt").write_text("nobody")
    (tmp_path / "pictures").mkdir()
    facts = read(space, tmp_path)
    names = ["other.safetensors", "p2", "p10", "peft", "three:0", "three:1", "three:2"]
    assert [fact["name"] for fact in facts] == names
    assert "2/16 modules" in facts[0]["reason"] and "attributes" not in facts[0]
    table = as_table(facts)
    assert table.num_rows == 7 and table["reason"].null_count == 6
    assert {"beard", "age", "age_low", "age_high", "nearest", "likeness"} <= set(table.column_names)
    assert table["beard"].null_count == 1 and 0 <= table["beard"][1].as_py() <= 1
    said = [line for fact in facts for line in lines(space, fact)]
    assert said[0].startswith("other.safetensors: not read: ") and "beard " in said[5]
    with pytest.raises(InputError, match="other.*2/16"):
        read(space, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="no adapter or coefficients of this space in it"):
        read(space, tmp_path / "pictures")


def test_a_population(space, tmp_path):
    w = population(space.layout, 12)
    names = write_population(tmp_path / "people", w, space.layout)
    facts = read(space, [tmp_path / "people"])
    assert [fact["name"] for fact in facts] == names
    want = outside(space, w, space.project(w))
    assert torch.allclose(torch.tensor([f["outside"] for f in facts]), want, atol=1e-5)
    write_population(tmp_path / "others", w, Layout(space.layout.modules, 1, 3.0))
    with pytest.raises(InputError, match="another layout"):
        read(space, tmp_path / "others")


def test_a_bare_space_still_tells_the_distance(space, tmp_path):
    bare = dataclasses.replace(space, coefficients=None, labels=None, classifiers=None,
                               directions=None, attributes=[], explained=None)  # fmt: skip
    (fact,) = read(bare, space.coefficients[:1])
    assert set(fact) == {"name", "source", "outside", "map", "distance", "rms", "attributes"}
    assert len(list(lines(bare, fact))) == 2
    draw_map(bare, [fact], tmp_path / "map.png")
    assert as_table([fact])["nearest"].to_pylist() == [None]


def test_a_map(space, tmp_path):
    facts = read(space, space.coefficients[:3])
    facts[0]["name"] = "cost $5 and $6"  # would be a formula
    draw_map(space, facts, tmp_path / "map.png", "age")
    with Image.open(tmp_path / "map.png") as picture:
        shaded = picture.convert("RGB")
        assert shaded.width > 600 and len(shaded.getcolors(1 << 24)) > 100
    draw_map(space, facts, tmp_path / "again.png", "age")
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "map.png").read_bytes()
    with pytest.raises(InputError, match="'hat' is not in this space"):
        draw_map(space, facts, tmp_path / "map.png", "hat")
    assert facts[0]["map"] == pytest.approx(
        ((space.coefficients[0] - space.mu) / space.sigma)[:2].tolist(), abs=1e-5
    )


def test_refusals(space, tmp_path):
    with pytest.raises(InputError, match=r"people: wanted \[k, 6\]"):
        read(space, torch.zeros(2, 3))
    with pytest.raises(InputError, match="missing"):
        read(space, tmp_path / "missing.safetensors")
