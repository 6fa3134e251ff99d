"""The world that ships: complete, small, offline, and as good as its report says."""

import json
from pathlib import Path

import pytest
import torch

from w2w_fast import demo
from w2w_fast.demo import figures, render
from w2w_fast.demo.build import persons
from w2w_fast.demo.reading import measure
from w2w_fast.demo.score import held_out_photos, prompts
from w2w_fast.files import check_manifest
from w2w_fast.verbs.edit import edit
from w2w_fast.verbs.generate import generate
from w2w_fast.verbs.invert import invert
from w2w_fast.verbs.sample import sample


@pytest.fixture(scope="module")
def world():
    return demo.space(), demo.pipeline(), demo.reader()


def test_size_and_manifest():
    files = [path for path in demo.WORLD.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 15_000_000
    check_manifest(demo.WORLD / "space")


def test_a_thousand_identities_none_of_them_held_out(world):
    space = world[0]
    assert space.n >= 1000 and space.names == [f"person-{i:04d}" for i in range(space.n)]
    people, held_out = persons("population", space.n), persons("held-out", 128)
    assert torch.allclose(space.labels, people, atol=1e-3)
    assert torch.cdist(held_out, people).min() > 0.05


def test_reader_reads_rendered_photographs(world):
    people, conditions = persons("held-out", 128), render.conditions(128, torch.Generator())
    reading = world[2].read(render.render(people, conditions))
    right = (reading.binary > 0.5) == (people[:, : len(render.BINARY)] > 0.5)
    assert right.float().mean() > 0.93
    assert (reading.face > 0.5).float().mean() > 0.97


def test_the_judge_measures_one_attribute(world):
    people, conditions = persons("held-out", 64), render.conditions(64, torch.Generator())
    images = render.render(people, conditions)
    for name in ("hat", "skin"):
        seen = measure(world[2], name)(images)
        truth = people[:, render.ATTRIBUTES.index(name)]
        assert torch.corrcoef(torch.stack([seen, truth]))[0, 1] > 0.8
        assert seen.abs().max() <= 6
    with pytest.raises(demo.InputError, match="not 'wings'"):
        measure(world[2], "wings")


def test_populated_people_look_like_themselves(world):
    space, pipe, reader = world
    rows = torch.arange(0, 320, 10)
    texts, places = prompts(len(rows), seed=7)
    images = generate(space, pipe, space.coefficients[rows], texts, progress=False, seeds=900,
                      **space.meta["generate"])  # fmt: skip
    reading = reader.read(images)
    truth = space.labels[rows, : len(render.BINARY)] > 0.5
    # The report's figures are over a thousand pictures; 32 leave a few points of chance.
    goal = json.loads((demo.WORLD / "score.json").read_text())["populated"]
    assert ((reading.binary > 0.5) == truth).float().mean() > goal["attributes_right"] - 0.06
    assert (reading.place.argmax(1) == places).float().mean() > goal["prompt_followed"] - 0.12


def test_an_edit_changes_its_attribute(world):
    space, pipe, reader = world
    people = sample(space, 8, seed=3)
    both = torch.cat([edit(space, people, glasses=-3), edit(space, people, glasses=3)])
    images = generate(space, pipe, both, seeds=list(range(8)) * 2, progress=False,
                      **space.meta["generate"])  # fmt: skip
    less, more = reader.read(images).binary[:, render.BINARY.index("glasses")].view(2, 8).mean(1)
    assert more - less > 0.5


def test_inversion_finds_more_than_chance(world):
    space, pipe, reader = world
    people, photos, masks = held_out_photos(8, seed=123)
    settings = space.meta["invert"] | {"steps": 60}
    c = invert(space, pipe, photos, masks=masks, progress=False, **settings)
    images = generate(space, pipe, c, "sks person, blue background", progress=False, seeds=70,
                      **space.meta["generate"])  # fmt: skip
    right = (reader.read(images).binary > 0.5) == (people[:, : len(render.BINARY)] > 0.5)
    assert right.float().mean() > 0.65  # chance is 0.5, 64 readings: sd 0.06


def test_needs_no_network_and_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "WORLD", Path(tmp_path))
    with pytest.raises(demo.InputError, match="demo --rebuild"):
        demo.space()


@pytest.mark.parametrize("name", ["README.md", "docs/world.md"])
def test_documents_quote_the_world_that_ships(name):
    text = (Path(__file__).parents[2] / name).read_text()
    assert "<!-- /" in text and figures.update(text) == text, (
        f"python -m w2w_fast.demo.figures {name}"
    )
