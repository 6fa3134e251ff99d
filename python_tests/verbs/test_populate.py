"""`populate`: jobs resume to the same bytes, share their work, and set aside what is bad."""

from __future__ import annotations

import dataclasses
import hashlib
import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image
from pyarrow import parquet
from tiny_world import SIZE, photographs

from w2w_fast import InputError, Layout, populate
from w2w_fast import population as files
from w2w_fast.population import open_population
from w2w_fast.sources import Subject, open_photos
from w2w_fast.training import Recipe, Training, train
from w2w_fast.verbs.populate import Listed, recorded

RECIPE = Recipe(steps=4, lr=0.01, eps=1e-4, average=0.5, prior=0.0)
OPTIONS = {"recipe": RECIPE, "batch": 2, "shard": 2, "progress": False}


def person(i: int, photos: int = 2) -> Subject:
    prompts = ("sks person, at the beach", "sks person, at night", "sks person")[:photos]
    return Subject(f"person-{i}", photographs(photos, seed=100 + i), prompts)


def hashes(folder):
    found = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


FILES = {
    "population.json", "people.parquet", "manifest.json", "start.safetensors",
    "shard-00000.safetensors", "shard-00001.safetensors",
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(pipe, layout, tmp_path_factory):
    """Three people in two shards: the job as it ends when nothing disturbs it."""
    folder = tmp_path_factory.mktemp("populate") / "whole"
    subjects = [person(i) for i in range(3)]
    return subjects, populate(pipe, subjects, layout, folder, **OPTIONS), hashes(folder)


def test_a_population_on_disk(pipe, layout, whole):
    subjects, made, found = whole
    assert set(found) == FILES
    assert made.layout == layout and made.names == ["person-0", "person-1", "person-2"]
    assert (made.load() - train(pipe, layout, subjects, RECIPE)).abs().max() < 1e-4
    rows = made.table.to_pylist()
    assert [(r["shard"], r["row"]) for r in rows] == [(0, 0), (0, 1), (1, 0)]
    assert all(r["steps"] == 4 and r["photos"] == 2 and r["loss"] > 0 for r in rows)
    assert made.job["recipe"]["lr"] == 0.01 and made.labels is None


class Killed(BaseException):
    """What no handler of errors catches, as kill -9."""


@pytest.mark.parametrize("tick", [0, 1, 3, 4, 5, 7])
def test_a_killed_job_goes_on_to_the_same_bytes(pipe, layout, tmp_path, monkeypatch, whole, tick):
    """Killed after so many steps of the batch, four a shard; nothing that was written is redone."""
    subjects, _, want = whole
    folder, done, step = tmp_path / "job", [0], Training._step

    def counted(self):
        if done[0] == tick:
            raise Killed
        done[0] += 1
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_step", counted)
        with pytest.raises(Killed):
            populate(pipe, subjects, layout, folder, save_every=0.0, **OPTIONS)
    with pytest.raises(InputError, match="not finished"):
        open_population(folder)
    again = []
    with monkeypatch.context() as patch:
        patch.setattr(Training, "_step", lambda self: again.append(1) or step(self))
        populate(pipe, subjects, layout, folder, **OPTIONS)
    assert hashes(folder) == want
    assert len(again) == 8 - tick  # the state is written after every step here


@pytest.mark.parametrize("at", ["write_shard", "finish", "write_manifest"])
def test_killed_between_the_files(pipe, layout, tmp_path, monkeypatch, whole, at):
    subjects, _, want = whole

    def killed(*_):
        raise Killed

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(files, at, killed)
            with pytest.raises(Killed):
                populate(pipe, subjects, layout, tmp_path / "job", **OPTIONS)
    (tmp_path / "job" / ".shard-00000.safetensors.0123abcd.tmp").write_bytes(b"half")
    populate(pipe, subjects, layout, tmp_path / "job", **OPTIONS)
    assert hashes(tmp_path / "job") == want


def test_a_finished_job_is_not_touched(pipe, layout, monkeypatch, whole):
    subjects, made, want = whole
    monkeypatch.setattr(Training, "_step", None)
    assert populate(pipe, subjects, layout, made.folder, **OPTIONS).names == made.names
    assert hashes(made.folder) == want


def test_two_on_one_folder_share_the_work(pipe, layout, tmp_path, whole):
    """Two processes; the same bytes, and each shard is trained by one of them."""
    subjects, _, want = whole
    context = multiprocessing.get_context("fork")
    if torch.get_num_threads() > 1:
        pytest.skip("a forked process needs torch to have started no threads: run with -n2")
    report = context.Queue()

    def work():
        torch.set_num_threads(1)
        step = Training._step
        seen = []
        Training._step = lambda self: seen.append(self.subjects.names[0]) or step(self)
        populate(pipe, subjects, layout, tmp_path / "job", **OPTIONS)
        report.put(seen)

    workers = [context.Process(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    seen = [report.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert hashes(tmp_path / "job") == want
    assert sorted(sum(seen, [])) == ["person-0"] * 4 + ["person-2"] * 4


def test_threads_share_the_work_too(pipe, layout, tmp_path, whole, monkeypatch):
    """A second caller waits for the shard that the first is at, and finds it done."""
    import threading

    subjects, _, want = whole
    started, go = threading.Event(), threading.Event()
    step = Training._step

    def slow(self):
        started.set()
        go.wait(60)
        step(self)

    monkeypatch.setattr(Training, "_step", slow)
    one = {**OPTIONS, "shard": 3, "batch": 3}
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(populate, pipe, subjects, layout, tmp_path / "job", **one)
        assert started.wait(60)
        second = pool.submit(populate, pipe, subjects, layout, tmp_path / "job", **one)
        go.set()
        assert first.result(60).names == second.result(60).names
    assert not [p for p in (tmp_path / "job").iterdir() if p.name.startswith(".")]


def test_another_job_does_not_resume(pipe, layout, whole, tmp_path):
    subjects, made, want = whole
    changed = [
        ([person(0), person(1), person(3)], OPTIONS, "subjects"),
        (subjects[:2], OPTIONS, "people, subjects"),
        (subjects, {**OPTIONS, "recipe": dataclasses.replace(RECIPE, lr=0.02)}, "recipe"),
        (subjects, {**OPTIONS, "start": torch.zeros(layout.size)}, "start"),
        (subjects, {**OPTIONS, "batch": 1}, "batch"),
        (subjects, {**OPTIONS, "bf16": True}, "bf16"),
    ]
    for people, settings, said in changed:
        with pytest.raises(InputError, match=said):
            populate(pipe, people, layout, made.folder, **settings)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        populate(pipe, subjects, layout, tmp_path / "other", **OPTIONS)
    assert hashes(made.folder) == want


def test_another_base_does_not_resume(pipe, layout, whole):
    subjects, made, _ = whole
    weight = next(pipe.unet.parameters())
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.add_(1e-3)
        with pytest.raises(InputError, match="base"):
            populate(pipe, subjects, layout, made.folder, **OPTIONS)
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_the_settings_of_a_job_are_recorded(pipe, layout, whole):
    subjects, made, want = whole
    settings = recorded(made.folder)
    assert settings.pop("layout") == layout and settings["recipe"] == RECIPE
    assert settings.pop("prompt") is None
    populate(pipe, subjects, layout, made.folder, progress=False, **settings)
    assert hashes(made.folder) == want


def test_the_batch_fits_the_memory_and_stays_when_resumed(pipe, layout, tmp_path):
    subjects = [person(i) for i in range(3)]
    options = {"recipe": RECIPE, "progress": False}
    made = populate(pipe, subjects, layout, tmp_path / "job", memory=1 << 30, **options)
    assert made.job["batch"] == 3  # all there are
    populate(pipe, subjects, layout, tmp_path / "job", memory=1 << 29, **options)
    with pytest.raises(InputError, match="one subject needs"):
        populate(pipe, subjects, layout, tmp_path / "less", memory=1 << 10, **options)
    assert not (tmp_path / "less").exists()


def test_prior_preservation_from_the_prompt(pipe, layout, tmp_path):
    recipe = dataclasses.replace(RECIPE, steps=2, prior=1.0, class_images=3)
    options = {**OPTIONS, "recipe": recipe}
    made = populate(pipe, [person(0)], layout, tmp_path / "job", **options)
    pictures = files.read_tensors(tmp_path / "job" / "class.safetensors")[0]["latents"]
    assert pictures.shape == (3, 4, 8, 8)
    assert (pictures[0] - pictures[1]).abs().mean() > 0.1
    plain = populate(pipe, [person(0)], layout, tmp_path / "plain", **OPTIONS)
    assert (made.load() - plain.load()).abs().max() > 1e-4
    assert "class.safetensors" in (tmp_path / "job" / "manifest.json").read_text()


def test_labels_come_along(pipe, layout, tmp_path):
    table = tmp_path / "labels.csv"
    table.write_text("name,hat,age\nperson-1,1,0.5\nsomebody,0,0\nperson-0,0,0.25\n")
    people = [person(0), person(1)]
    made = populate(pipe, people, layout, tmp_path / "job", labels=table, **OPTIONS)
    rows = parquet.read_table(made.labels).to_pylist()
    assert rows == [
        {"name": "person-0", "hat": 0.0, "age": 0.25}, {"name": "person-1", "hat": 1.0, "age": 0.5}
    ]  # fmt: skip
    with pytest.raises(InputError, match="1 of 3 people, 'person-2' first"):
        populate(pipe, [*people, person(2)], layout, tmp_path / "x", labels=table, **OPTIONS)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch": 0}, "batch"),
        ({"shard": 0}, "shard"),
        ({"start": torch.zeros(3)}, "start"),
        ({"subjects": []}, "subjects"),
        ({"subjects": [person(0), person(0)]}, "subjects"),
        ({"layout": Layout.sd15()}, "0 of 64"),
        ({"labels": "missing.csv"}, "missing.csv"),
    ],
)
def test_refusals_leave_no_folder(pipe, layout, tmp_path, options, said):
    arguments = {"subjects": [person(0)], "layout": layout, "recipe": RECIPE, **options}
    with pytest.raises(InputError, match=said):
        populate(pipe, out=tmp_path / "job", progress=False, **arguments)
    assert not (tmp_path / "job").exists()


# --- from disk ------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path):
    """anna, bert and carl, two photos each."""
    root = tmp_path / "photos"
    for i, name in enumerate(("anna", "bert", "carl")):
        (root / name).mkdir(parents=True)
        for j, photo in enumerate(photographs(2, seed=i)):
            Image.fromarray(photo.permute(1, 2, 0).numpy()).save(root / name / f"{j}.png")
    return root


def test_subjects_are_read_one_by_one(pipe, layout, photos, tmp_path):
    listing = open_photos(photos)
    subjects = Listed(listing, SIZE, "sks person")
    made = populate(pipe, subjects, layout, tmp_path / "job", **OPTIONS)
    in_memory = train(pipe, layout, [subjects[i] for i in range(3)], RECIPE)
    assert made.names == ["anna", "bert", "carl"]
    assert (made.load() - in_memory).abs().max() < 1e-4
    other = Listed(listing, SIZE, "sks person, at night")
    with pytest.raises(InputError, match="subjects"):
        populate(pipe, other, layout, tmp_path / "job", **OPTIONS)


def test_who_cannot_be_read_is_set_aside_with_the_reason(pipe, layout, photos, tmp_path):
    (photos / "bert" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    for photo in (photos / "carl").iterdir():
        photo.unlink()
    subjects = Listed(open_photos(photos), SIZE, "sks person")
    made = populate(pipe, subjects, layout, tmp_path / "job", **OPTIONS)
    assert made.names == ["anna"] and len(made.load()) == 1
    rows = made.table.to_pylist()
    assert rows[0]["reason"] == "" and rows[0]["shard"] == 0
    assert "1.png" in rows[1]["reason"] and rows[1]["shard"] is None
    assert "0x" not in rows[1]["reason"]  # an address would differ from run to run
    assert "no photo" in rows[2]["reason"]


def test_nobody_left(pipe, layout, photos, tmp_path):
    for photo in photos.rglob("*.png"):
        photo.write_bytes(b"none")
    subjects = Listed(open_photos(photos), SIZE, "sks person")
    with pytest.raises(InputError, match="nobody is left of 3 subjects; the first, anna"):
        populate(pipe, subjects, layout, tmp_path / "job", **OPTIONS)


def test_a_disk_that_fills(pipe, layout, tmp_path, monkeypatch, whole):
    """Writing fails half-way: one clear error; with space again the job ends as it would have."""
    subjects, _, want = whole
    import w2w_fast.files as writing

    sync, calls = writing._sync, []

    def full(path):
        calls.append(path)
        if len(calls) > 7 and path.suffix == ".tmp":
            raise OSError(28, "No space left on device")
        sync(path)

    with monkeypatch.context() as patch:
        patch.setattr(writing, "_sync", full)
        with pytest.raises(OSError, match="No space left"):
            populate(pipe, subjects, layout, tmp_path / "job", **OPTIONS)
    populate(pipe, subjects, layout, tmp_path / "job", **OPTIONS)
    assert hashes(tmp_path / "job") == want
