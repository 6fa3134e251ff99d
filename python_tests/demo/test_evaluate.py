"""The main claims of the world's report, in direction; the report itself has their sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from w2w_fast.demo import houses, render
from w2w_fast.demo.study import held_out, study
from w2w_fast.evaluate import SHORT, evaluate


@pytest.fixture(scope="module")
def world():
    return study(size=replace(SHORT, attributes=1))


def test_the_main_claims_hold_in_direction(world, tmp_path):
    result = evaluate(world, tmp_path, ["decodability", "edits", "sampling"], progress=False)
    sections = result["sections"]
    for name in ("decodability", "sampling"):
        assert all(claim["holds"] for claim in sections[name]["claims"]), sections[name]["claims"]
    edits = sections["edits"]["figures"]["attributes"]["beard"]
    ours = edits["w2w"]["matched"]
    assert ours["identity"]["value"] > 0.7 and ours["leak"]["value"] < 0.15
    assert ours["whole"]["value"] > 0.9
    assert edits["random direction"]["matched"] is None
    for section in sections.values():
        for picture in section["pictures"]:
            assert (tmp_path / picture["file"]).read_bytes().startswith(b"\x89PNG")


def test_the_judge_measures_pictures_apart(world):
    people = render.people(4, torch.Generator().manual_seed(1))
    conditions = render.conditions(4, torch.Generator().manual_seed(2))
    photos = render.render(people, conditions)
    sight, again = world.judge.read(photos), world.judge.read(photos)
    assert torch.equal(sight.features, again.features)
    near = world.judge.read((photos.int() + 4).clamp(0, 255).to(torch.uint8))
    small = (sight.features - near.features).square().sum(1)
    far = (sight.features - sight.features.roll(1, 0)).square().sum(1)
    assert (small < 0.1 * far).all() and (far < 4).all()


def test_held_out_people_have_photos_of_their_own():
    found = held_out(3, 4, seed=1)
    assert found.photos.shape == (3, 4, 3, 64, 64) and found.masks.shape == (3, 4, 1, 64, 64)
    assert len(found.captions) == 4 and found.others.shape[:2] == (3, 8)
    more = held_out(5, 4, seed=1)
    assert torch.equal(more.labels[:3], found.labels)  # the same people, whatever their number


def test_houses_show_their_attributes():
    g = torch.Generator().manual_seed(3)
    rows, seen = houses.houses(6, g), houses.conditions(6, g)
    plain = houses.render(rows, seen).int()
    assert plain.shape == (6, 3, 64, 64)
    for i, name in enumerate(houses.ATTRIBUTES):
        other = rows.clone()
        other[:, i] = 1 - other[:, i].round()
        changed = (houses.render(other, seen).int() - plain).abs().amax((1, 2, 3))
        assert (changed > 40).all(), name
