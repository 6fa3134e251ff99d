"""`w2w directions`, `read`, `blend`, `calibrate`, `slider`, and what `sample` and `edit` learnt."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from pyarrow import csv, parquet

import w2w_fast as w2w
from w2w_fast.attributes import attributes_of, scores
from w2w_fast.verbs.calibrate import Scale


def brightness(images):
    """What `--reader test_cli_people:brightness` names: each picture more than the one before."""
    return [-float(i) if SIGN < 0 else float(i) for i, _ in enumerate(images)]


SIGN = 1


def test_sampling_as_given(run, world):
    line = "sample {}/space --n 5 --seed 1 --given beard=1,age=0.5 --covariance full --novelty"
    said = run(line + " --out a.safetensors").stdout
    assert re.search(r"nearest of the population at \d\.\d\d \(median\); theirs at", said)
    space = w2w.WeightSpace.load(world / "space")
    a = w2w.read_coefficients("a.safetensors", space.m)
    given = {"beard": 1, "age": 0.5}
    assert torch.equal(a, w2w.sample(space, 5, seed=1, covariance="full", given=given))
    read = scores(space, a)[:, 0]
    want = attributes_of(space)["beard"].score_of(1)
    assert torch.allclose(read, torch.full_like(read, want), atol=1e-4)
    run("sample {}/space --n 5 --method latin --out b.safetensors")
    run("sample {}/space --n 5 --novelty --population {}/population --out c.safetensors")


def test_directions_are_shown_and_fitted(run, world):
    said = run("directions {}/space").stdout
    assert re.search(r"\n  pc1 +(beard|age|glasses) [+-]0\.", said) and "\n  ica4 " in said
    assert "exploratory" in said and "  age" in said
    line = "directions {}/space more --labels {}/labels.csv --population {}/population"
    result = run(line)
    assert "more: 4 attributes" in result.stdout and "\n  hat " in result.stdout
    space = w2w.WeightSpace.load("more")
    assert space.attributes == ["beard", "age", "glasses", "hat"] and space.n == 12
    run("edit more {}/people.safetensors --set hat=1,pc1=-1,hold=age --out edited.safetensors")
    run(line.replace("more", "only") + " --only --method lstsq")
    assert w2w.WeightSpace.load("only").attributes == ["hat"]
    assert "hat" in run("info only").stdout


def test_read_tells_tables_and_maps(run, world):
    line = "read {}/space {}/people.safetensors {}/lora.safetensors"
    said = run(line + " --out who.csv --map map.png --shade age").stdout
    assert re.search(r"people:2\n  [\d.]+ from the mean.*\n  nearest, by cosine: row \d+", said)
    assert re.search(r"lora\n  \d+% of the adapter is outside", said)
    table = csv.read_csv("who.csv")
    assert table["name"].to_pylist() == ["people:0", "people:1", "people:2", "lora"]
    assert Image.open("map.png").width > 600
    run(line + " --out who.parquet")
    assert parquet.read_table("who.parquet")["age"].to_pylist() == pytest.approx(
        table["age"].to_pylist(), abs=1e-6
    )
    run(line + " --out who.csv", code=2)
    assert (
        "and 7 more: --out"
        in run("read {}/space {}/population {}/population {}/people.safetensors").stdout
    )


@pytest.mark.parametrize("method", ["linear", "spherical"])
def test_blend(run, world, method):
    files = "{}/people.safetensors {}/lora.safetensors"
    line = f"blend {{}}/space {files} --rows 2 0 --steps 4 --method {method}"
    if method == "spherical":  # the LoRA is the mean
        assert "no direction" in run(line, code=2).stderr
        line = line.replace("lora", "people")
    run(line + " --strip strip.png --seed 3")
    space = w2w.WeightSpace.load(world / "space")
    people = w2w.read_coefficients(world / "people.safetensors")
    made = w2w.read_coefficients("blend.safetensors", space.m)
    assert torch.equal(made[0], people[2]) and made.shape == (4, space.m)
    picture = Image.open("strip.png")
    assert picture.width > 4 * 128 and picture.height < 200


def test_calibrate_and_edit_by_what_was_measured(run, world, monkeypatch):
    line = "calibrate {}/space beard --reader test_cli_people:brightness --people 2 --steps 2"
    said = run(line + " --most 3 --hold age --out beard.json").stdout
    assert "beard=-3.00: read 0.5 on average" in said and "changes from -4 to +4" in said
    scale = Scale.load("beard.json")
    assert scale.hold == ("age",) and scale.amounts == (-3, -1.5, 0, 1.5, 3)
    edit = "edit {}/space {}/people.safetensors --set beard=+1,glasses=-1 --scale beard.json"
    run(edit + " --out a.safetensors")
    space = w2w.WeightSpace.load(world / "space")
    people = w2w.read_coefficients(world / "people.safetensors")
    want = w2w.edit(space, w2w.edit(space, people, beard=0.75, hold="age"), glasses=-1.0)
    assert torch.allclose(w2w.read_coefficients("a.safetensors"), want, atol=1e-5)
    assert "beard: wanted a change" in run(edit.replace("+1", "+9"), code=2).stderr
    assert "does not name" in run(edit.replace("beard=+1,", ""), code=2).stderr
    monkeypatch.setattr("test_cli_people.SIGN", -1)
    assert "does not rise" in run(line + " --out other.json", code=2).stderr
    assert not Path("other.json").exists()


@pytest.mark.parametrize("format", ["kohya", "diffusers", "peft"])
def test_slider(run, format):
    out = "out" if format == "peft" else "out.safetensors"
    line = f"slider {{}}/space {out} --set beard=2,hold=age --format {format} --verify"
    said = run(line).stdout
    assert "16 modules" in said and re.search(r"rank 2, for anybody, .* misses \d+% at", said)
    run(line, code=2)
    exact = run(line + " --of {}/people.safetensors --row 1 --overwrite").stdout
    assert "exact for people.safetensors, row 1" in exact
    assert f"LoRA, {format}" in run(f"info {out}").stdout
