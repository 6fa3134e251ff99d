"""`populate`: rows are independent, jobs resume to the same bytes, what diverges is set aside."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import pytest
import torch
from PIL import Image
from tiny_world import SIZE, photographs

from w2w_fast import InputError, Layout, populate
from w2w_fast.verbs import populate as module
from w2w_fast.verbs.populate import (
    Recipe,
    Subject,
    initial_adapter,
    read_population,
    read_subjects,
)

RECIPE = Recipe(steps=4, lr=0.01, eps=1e-4, average=0.5)


def person(i: int, photos: int = 2) -> Subject:
    prompts = ("sks person, at the beach", "sks person, at night", "sks person")[:photos]
    return Subject(f"person-{i}", photographs(photos, seed=100 + i), prompts)


@pytest.fixture(scope="module")
def trained(pipe, layout):
    """Three people, of 2, 3 and 1 photos, in one batch."""
    subjects = [person(0), person(1, 3), person(2, 1)]
    return subjects, populate(pipe, subjects, layout, recipe=RECIPE, progress=False)[0]


def hashes(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_row_i_of_a_batch_is_training_i_alone(pipe, layout, trained):
    subjects, together = trained
    start = initial_adapter(layout, RECIPE.seed)
    assert together.shape == (3, layout.size) and together.dtype == torch.float32
    for i, subject in enumerate(subjects):
        alone, names = populate(pipe, [subject], layout, recipe=RECIPE, progress=False)
        assert names == [subject.name]
        assert (alone[0] - together[i]).abs().max() < 1e-4
        assert (together[i] - start).abs().max() > 5e-3  # about steps x lr, so it was trained
    for i, j in ((0, 1), (1, 2), (0, 2)):
        assert (together[i] - together[j]).abs().max() > 1e-3
    split, _ = populate(pipe, subjects, layout, recipe=RECIPE, batch=2, progress=False)
    assert (split - together).abs().max() < 1e-4


def test_random_numbers_are_common(pipe, layout):
    """Two people with the same photos end at the same adapter: nothing else differs."""
    twins = [person(0), dataclasses.replace(person(0), name="twin")]
    w, _ = populate(pipe, twins, layout, recipe=RECIPE, progress=False)
    assert (w[0] - w[1]).abs().max() < 1e-4


def test_one_step_is_adams(pipe, layout):
    """At the start B = 0, so A has no gradient and every number of B moves by lr."""
    recipe = Recipe(steps=1, lr=0.01, eps=1e-12)
    w, _ = populate(pipe, [person(0)], layout, recipe=recipe, progress=False)
    moved = w[0] - initial_adapter(layout)
    for a, b in layout.slices():
        assert not moved[a].any()
        assert torch.allclose(moved[b].abs(), torch.full_like(moved[b], 0.01), rtol=1e-3)


def test_training_b_leaves_a_untouched(pipe, layout):
    start = torch.randn(layout.size, generator=torch.Generator().manual_seed(0))
    recipe = dataclasses.replace(RECIPE, train="B")
    w, _ = populate(pipe, [person(0)], layout, recipe=recipe, start=start, progress=False)
    free, _ = populate(pipe, [person(0)], layout, recipe=RECIPE, start=start, progress=False)
    for a, b in layout.slices():
        assert torch.equal(w[0, a], start[a])
        assert not torch.equal(free[0, a], start[a])
        assert (w[0, b] != start[b]).all()


def test_a_job_resumes_to_the_same_bytes(pipe, layout, tmp_path, monkeypatch):
    subjects = [person(i) for i in range(3)]
    options = {"recipe": RECIPE, "batch": 2, "progress": False}
    w, names = populate(pipe, subjects, layout, tmp_path / "job", **options)
    whole = hashes(tmp_path / "job")
    assert set(whole) == {
        "population.json", "manifest.json", "shard-00000.safetensors", "shard-00001.safetensors"
    }  # fmt: skip
    read, read_layout, read_names = read_population(tmp_path / "job")
    assert torch.equal(read, w) and read_layout == layout and read_names == names

    (tmp_path / "job" / "shard-00001.safetensors").unlink()
    calls = []
    train = module.train_batch

    def counted(*args, **kwargs):
        calls.append(len(args[2]))
        return train(*args, **kwargs)

    monkeypatch.setattr(module, "train_batch", counted)
    again, _ = populate(pipe, subjects, layout, tmp_path / "job", **options)
    assert calls == [1]  # only the second shard, of one person
    assert torch.equal(again, w) and hashes(tmp_path / "job") == whole


def test_a_job_killed_in_the_middle_goes_on(pipe, layout, tmp_path, monkeypatch):
    subjects = [person(i) for i in range(2)]
    options = {"recipe": RECIPE, "batch": 1, "progress": False}
    populate(pipe, subjects, layout, tmp_path / "whole", **options)
    train = module.train_batch

    def killed(*args, **kwargs):
        if (tmp_path / "job" / "shard-00000.safetensors").exists():
            raise KeyboardInterrupt
        return train(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, "train_batch", killed)
        with pytest.raises(KeyboardInterrupt):
            populate(pipe, subjects, layout, tmp_path / "job", **options)
    with pytest.raises(InputError, match="not finished"):
        read_population(tmp_path / "job")
    populate(pipe, subjects, layout, tmp_path / "job", **options)
    assert hashes(tmp_path / "job") == hashes(tmp_path / "whole")


def test_another_job_does_not_resume(pipe, layout, tmp_path):
    options = {"recipe": RECIPE, "progress": False}
    populate(pipe, [person(0)], layout, tmp_path / "job", **options)
    before = hashes(tmp_path / "job")
    changed = [
        ([person(1)], options, "names, photos"),
        ([dataclasses.replace(person(1), name="person-0")], options, "photos"),
        ([person(0)], {**options, "recipe": dataclasses.replace(RECIPE, lr=0.02)}, "recipe"),
        ([person(0)], {**options, "start": torch.zeros(layout.size)}, "start"),
    ]
    for subjects, settings, said in changed:
        with pytest.raises(InputError, match=said):
            populate(pipe, subjects, layout, tmp_path / "job", **settings)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        populate(pipe, [person(0)], layout, tmp_path / "other", **options)
    assert hashes(tmp_path / "job") == before


def test_who_diverges_is_set_aside(pipe, layout, tmp_path, monkeypatch, trained):
    """One row becomes NaN in the middle of a batch: the others are what they would have been."""
    subjects, together = trained
    encode, seen = module.encode_images, []

    def poisoned(pipe, images, **options):
        seen.append(images)
        latents = encode(pipe, images, **options)
        return latents * float("nan") if len(seen) == 2 else latents

    monkeypatch.setattr(module, "encode_images", poisoned)
    w, names = populate(pipe, subjects, layout, tmp_path / "job", recipe=RECIPE, progress=False)
    assert names == ["person-0", "person-2"]
    assert (w - together[[0, 2]]).abs().max() < 1e-4
    record = json.loads((tmp_path / "job" / "population.json").read_text())
    assert record["diverged"] == ["person-1"]
    read, _, read_names = read_population(tmp_path / "job")
    assert torch.equal(read, w) and read_names == names


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch": 0}, "batch"),
        ({"start": torch.zeros(3)}, "start"),
        ({"start": None, "subjects": []}, "subjects"),
        ({"subjects": [person(0), person(0)]}, "subjects"),
        ({"subjects": [Subject("p", photographs(1), ("x" * 10_001,))]}, "10,000"),
        ({"layout": Layout.sd15()}, "0 of 64"),
    ],
)
def test_refusals_leave_no_folder(pipe, layout, tmp_path, options, said):
    arguments = {"subjects": [person(0)], "layout": layout, "recipe": RECIPE, **options}
    with pytest.raises(InputError, match=said):
        populate(pipe, out=tmp_path / "job", progress=False, **arguments)
    assert not (tmp_path / "job").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 0},
        {"steps": 10**6},
        {"lr": float("nan")},
        {"lr": 0.0},
        {"eps": -1.0},
        {"train": "A"},
        {"timesteps": "late"},
        {"average": 1.0},
        {"seed": -1},
    ],
)
def test_recipes_out_of_range(settings):
    (name,) = settings
    with pytest.raises(InputError, match=name):
        Recipe(**settings)


def test_subjects_need_photos_in_bytes_and_a_prompt_each():
    with pytest.raises(InputError, match="prompts"):
        Subject("p", photographs(2), ("sks person",))
    for bad in (photographs(1).float(), photographs(1)[:, :2], photographs(1)[0]):
        with pytest.raises(InputError, match="uint8"):
            Subject("p", bad, ("sks person",))


def test_read_subjects(tmp_path):
    for name, colour in (("b", "blue"), ("a", "red")):
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.new("RGB", (40, 30), colour).save(tmp_path / name / f"{i}.png")
    (tmp_path / "a" / "1.txt").write_text(" sks person, at night\n")
    (tmp_path / "notes.txt").write_text("not a person")
    a, b = read_subjects(tmp_path, "sks person", SIZE)
    assert (a.name, a.prompts) == ("a", ("sks person", "sks person, at night"))
    assert b.images.shape == (2, 3, SIZE, SIZE)
    assert b.images.dtype == torch.uint8
    assert b.images[:, 2].eq(255).all() and not b.images[:, 0].any()


@pytest.mark.parametrize(
    "trouble", ["no folder", "no people", "no photo", "damaged", "latin", "long"]
)
def test_read_subjects_refuses(tmp_path, trouble):
    root = tmp_path / "photos"
    if trouble != "no folder":
        root.mkdir()
    if trouble not in ("no folder", "no people"):
        (root / "anna").mkdir()
    if trouble in ("damaged", "latin", "long"):
        Image.new("RGB", (20, 20)).save(root / "anna" / "1.png")
    if trouble == "damaged":
        (root / "anna" / "2.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    if trouble == "latin":
        (root / "anna" / "1.txt").write_bytes("Müller".encode("latin-1"))
    if trouble == "long":
        (root / "anna" / "1.txt").write_text("x" * 10**6)
    with pytest.raises(InputError, match="photos"):
        read_subjects(root, "sks person", SIZE)


def head(photos: int) -> torch.Tensor:
    mask = torch.full((photos, 1, SIZE, SIZE), 0.1)
    mask[..., SIZE // 4 : SIZE // 2, SIZE // 4 : SIZE // 2] = 1
    return mask


def test_masks_say_which_pixels_count(pipe, layout, trained):
    subjects, plain = trained
    masked = [dataclasses.replace(s, masks=head(len(s.prompts))) for s in subjects]
    w, _ = populate(pipe, masked, layout, recipe=RECIPE, progress=False)
    assert (w - plain).abs().max() > 1e-3
    even = [dataclasses.replace(s, masks=torch.ones_like(head(len(s.prompts)))) for s in subjects]
    w, _ = populate(pipe, even, layout, recipe=RECIPE, progress=False)
    assert (w - plain).abs().max() < 1e-4


def test_masks_for_all_or_for_none_and_good_ones(pipe, layout, tmp_path):
    some = [person(0), dataclasses.replace(person(1), masks=head(2))]
    with pytest.raises(InputError, match="masks for all or for none, 'person-0' has none"):
        populate(pipe, some, layout, tmp_path / "out", recipe=RECIPE, progress=False)
    assert not (tmp_path / "out").exists()
    for bad, message in (
        (head(3), r"wanted \[2, 1, h, w\]"),
        (2 * head(2), r"in \[0, 1\]"),
        (0 * head(2), "empty"),
    ):
        with pytest.raises(InputError, match=message):
            dataclasses.replace(person(0), masks=bad)


def test_a_job_with_other_masks_is_another_job(pipe, layout, tmp_path):
    one = dataclasses.replace(person(0), masks=head(2))
    populate(pipe, [one], layout, tmp_path, recipe=RECIPE, progress=False)
    other = dataclasses.replace(one, masks=head(2).flip(2))
    with pytest.raises(InputError, match="another photos"):
        populate(pipe, [other], layout, tmp_path, recipe=RECIPE, progress=False)


def test_masks_beside_photos(tmp_path):
    (tmp_path / "anna").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (40, 30), "red").save(tmp_path / "anna" / f"{name}.jpg")
    mask = Image.new("L", (40, 30))
    mask.paste(255, (5, 0, 20, 30))  # the left half of the centre square
    mask.save(tmp_path / "anna" / "a.mask.png")
    with pytest.raises(InputError, match="b.mask.png: missing"):
        read_subjects(tmp_path, "x", 16)
    mask.save(tmp_path / "anna" / "b.mask.png")
    (subject,) = read_subjects(tmp_path, "x", 16)
    assert subject.images.shape == (2, 3, 16, 16) and subject.masks.shape == (2, 1, 16, 16)
    assert torch.equal(subject.masks[..., :8], torch.ones(2, 1, 16, 8))
    assert not subject.masks[..., 8:].any()
