"""`w2w demo --rebuild`: from a base and a reader to a space, with a handful of people."""

from __future__ import annotations

import dataclasses
import shutil

from w2w_fast import WeightSpace, demo
from w2w_fast.demo import build
from w2w_fast.population import open_population


def test_the_population_and_the_space_are_built_and_not_twice(tmp_path, monkeypatch):
    shutil.copytree(demo.WORLD / "pipeline", tmp_path / "pipeline")
    shutil.copy(demo.WORLD / "reader.safetensors", tmp_path)
    for name, value in (("PEOPLE", 8), ("FIRST", 3), ("PHOTOS", 2), ("COMPONENTS", 2)):
        monkeypatch.setattr(build, name, value)
    for name in ("FIRST_RECIPE", "RECIPE"):
        short = dataclasses.replace(getattr(build, name), steps=2)
        monkeypatch.setattr(build, name, short)
    build.build(tmp_path)
    made, space = open_population(tmp_path / "population"), WeightSpace.load(tmp_path / "space")
    assert len(made) == 8 and made.names[0] == "person-0000" and space.n == 8 and space.m == 2
    start = open_population(tmp_path / "first").load().mean(0)
    assert (made.load() - start).abs().max() > 1e-3
    assert space.attributes and space.meta["invert"] == build.META["invert"]
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("shard-*")}
    build.build(tmp_path)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("shard-*")} == before
