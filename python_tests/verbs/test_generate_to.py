"""`generate_to`: galleries resume to the same bytes, share their work, and say what made each."""

from __future__ import annotations

import copy
import io
import json
import multiprocessing
import shutil
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from tiny_world import SIZE, as_array, distance, make_space, tree

from w2w_fast import InputError, edit, gallery, generate, generate_to, read_coefficients, sample
from w2w_fast.gallery import Draft, open_gallery
from w2w_fast.prepared import Prepared
from w2w_fast.verbs import generate_to as verb
from w2w_fast.verbs.generate import named_scheduler

PROMPTS = ["sks person", "sks person, at the beach", "sks person, at night"]
OPTIONS = {
    "prompts": PROMPTS, "per_identity": 2, "edits": "beard=+2,hold=age", "seed": 7, "steps": 3,
    "guidance": 2.0, "batch": 4, "progress": False,
}  # fmt: skip
SETTINGS = {"steps": 3, "guidance": 2.0, "progress": False}


@pytest.fixture(scope="module")
def people(space):
    return sample(space, 5, seed=2, factor=2.0)


@pytest.fixture(scope="module")
def whole(space, pipe, people, tmp_path_factory):
    """Ten pictures in three pieces: the job as it ends when nothing disturbs it."""
    folder = tmp_path_factory.mktemp("gallery") / "whole"
    return generate_to(space, pipe, people, folder, **OPTIONS), tree(folder)


def test_a_gallery_on_disk(space, pipe, people, whole):
    made, found = whole
    names = [f"image-{i:06d}.png" for i in range(10)]
    assert set(found) == {
        *names, "gallery.json", "coefficients.safetensors", "images.parquet",
        "contact-sheets/00000.jpg", "manifest.json",
    }  # fmt: skip
    listed = json.loads((made.folder / "manifest.json").read_text())
    assert {name: entry["sha256"] for name, entry in listed.items()} == {
        name: digest for name, digest in found.items() if name not in (*names, "manifest.json")
    }
    assert torch.equal(read_coefficients(made.folder / gallery.PEOPLE), people)
    rows = parquet.read_table(made.folder / gallery.TABLE).to_pylist()
    assert len(made) == 10 and made.table.to_pylist() == rows
    assert [row["file"] for row in rows] == names
    assert [row["sha256"] for row in rows] == [found[name] for name in names]
    assert [row["row"] for row in rows] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert [row["prompt"] for row in rows] == PROMPTS[:2] * 5
    assert [row["seed"] for row in rows] == list(range(7, 17))
    for row in rows:
        facts = {k: v for k, v in row.items() if k not in ("file", "sha256")}
        assert facts["edits"] == "beard=+2,hold=age" and facts["start"] is None
        assert (facts["scheduler"], facts["steps"], facts["guidance"]) == ("DDIMScheduler", 3, 2.0)
        assert (facts["identity_guidance"], facts["strength"]) == (False, 1.0)
        assert f"torch {torch.__version__}" in facts["versions"]
        with Image.open(made.folder / row["file"]) as image:
            assert image.size == (SIZE, SIZE)
            assert image.text == {k: str(v) for k, v in facts.items() if v is not None}


def test_an_image_can_be_made_again_from_its_row(space, pipe, whole):
    """To 1/255 alone, whatever batch it fell into; in its batch to the bit."""
    made, _ = whole
    people = edit(space, read_coefficients(made.folder / gallery.PEOPLE), beard=2.0, hold="age")
    rows = made.table.to_pylist()
    images = [Image.open(made.folder / row["file"]) for row in rows]
    for i in (0, 5, 9):
        c, prompt, seed = people[rows[i]["row"]][None], rows[i]["prompt"], rows[i]["seed"]
        alone = generate(space, pipe, c, prompt, seeds=seed, **SETTINGS)
        assert distance(alone, images[i : i + 1]) <= 1
    who = [row["row"] for row in rows[4:8]]
    prompts = [row["prompt"] for row in rows[4:8]]
    together = generate(space, pipe, people[who], prompts, seeds=11, **SETTINGS)
    assert distance(together, images[4:8]) == 0


class Killed(BaseException):
    """What no handler of errors catches, as kill -9."""


def killing(monkeypatch, owner, name, after):
    """Let the attribute raise Killed at the call after so many; the list of its calls."""
    real, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        if len(calls) == after:
            raise Killed
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


AT = [
    (Prepared, "make", 0), (Prepared, "make", 1), (Prepared, "make", 2), (gallery, "encode", 0),
    (gallery, "encode", 6), (gallery, "strip", 1), (gallery, "write_json", 2), (Draft, "finish", 0),
    (gallery, "contact_sheet", 0), (Draft, "_write_table", 0), (gallery, "write_manifest", 0),
]  # fmt: skip


@pytest.mark.parametrize(("owner", "name", "after"), AT, ids=lambda x: getattr(x, "__name__", x))
@pytest.mark.parametrize("format", ["png", "tar"])
def test_a_killed_job_goes_on_to_the_same_bytes(
    space, pipe, people, tmp_path, monkeypatch, whole, owner, name, after, format
):
    options, folder = {**OPTIONS, "format": format}, tmp_path / "job"
    if format == "png":
        want = whole[1]
    else:
        generate_to(space, pipe, people, tmp_path / "whole", **options)
        want = tree(tmp_path / "whole")
    with monkeypatch.context() as patch:
        killing(patch, owner, name, after)
        with pytest.raises(Killed):
            generate_to(space, pipe, people, folder, **options)
    with pytest.raises(InputError, match="not finished"):
        open_gallery(folder)
    marks = len(list(folder.glob(".done-*")))
    with monkeypatch.context() as patch:
        calls = killing(patch, Prepared, "make", -1)
        generate_to(space, pipe, people, folder, **options)
    assert tree(folder) == want
    assert len(calls) == 3 - marks  # nothing that was written is made again


def test_killed_when_only_the_sweeping_was_left(space, pipe, people, tmp_path, whole):
    made, want = whole
    shutil.copytree(made.folder, tmp_path / "job")
    for name in (".done-00001.json", ".image-000001.png.0123abcd.tmp", ".piece-00001.lock"):
        (tmp_path / "job" / name).write_text("{}")
    generate_to(space, pipe, people, tmp_path / "job", **OPTIONS)
    assert tree(tmp_path / "job") == want


def test_a_finished_gallery_is_not_touched(space, pipe, people, monkeypatch, whole):
    made, want = whole
    monkeypatch.setattr(Draft, "write", None)
    again = generate_to(space, pipe, people, made.folder, **OPTIONS)
    assert again.table.equals(made.table) and tree(made.folder) == want


def test_the_settings_of_a_job_are_recorded(space, pipe, whole):
    made, want = whole
    settings = verb.recorded(made.folder)
    assert settings.pop("dtype") == "float32"
    scheduler = named_scheduler(settings.pop("scheduler"), pipe)
    generate_to(space, pipe, out=made.folder, scheduler=scheduler, progress=False, **settings)
    assert tree(made.folder) == want


def test_two_processes_share_the_work(space, pipe, people, tmp_path, whole):
    """The same bytes, and each piece is made by one of them."""
    if torch.get_num_threads() > 1:
        pytest.skip("a forked process needs torch to have started no threads: run with -n2")
    context = multiprocessing.get_context("fork")
    report = context.Queue()

    def work():
        torch.set_num_threads(1)
        write, seen = Draft.write, []
        Draft.write = lambda self, piece, images: (seen.append(piece), write(self, piece, images))
        generate_to(space, pipe, people, tmp_path / "job", **OPTIONS)
        report.put(seen)

    workers = [context.Process(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    seen = [report.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert tree(tmp_path / "job") == whole[1]
    assert sorted(sum(seen, [])) == [0, 1, 2]


def test_a_piece_is_held_until_it_is_written(space, pipe, people, tmp_path, monkeypatch, whole):
    """While one writes its last piece another waits for it, and makes none again."""
    writing, go, write, written = threading.Event(), threading.Event(), Draft.write, []

    def slow(self, piece, images):
        if piece == 2:
            writing.set()
            go.wait(60)
        written.append(piece)
        write(self, piece, images)

    monkeypatch.setattr(Draft, "write", slow)
    other = copy.deepcopy(pipe)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(generate_to, space, pipe, people, tmp_path / "job", **OPTIONS)
        assert writing.wait(60)
        second = pool.submit(generate_to, space, other, people, tmp_path / "job", **OPTIONS)
        go.set()
        assert first.result(60).table.equals(second.result(60).table)
    assert written == [0, 1, 2] and tree(tmp_path / "job") == whole[1]


def test_no_more_than_two_batches_are_in_memory(space, pipe, people, tmp_path, monkeypatch):
    """One is denoised while the one before is written."""
    lock, alive, most = threading.Lock(), [0], [0]
    write, make = Draft.write, Prepared.make

    def made(self, requests):
        with lock:
            alive[0] += 1
            most[0] = max(most[0], alive[0])
        return make(self, requests)

    def wrote(self, piece, images):
        write(self, piece, images)
        with lock:
            alive[0] -= 1

    monkeypatch.setattr(Prepared, "make", made)
    monkeypatch.setattr(Draft, "write", wrote)
    generate_to(space, pipe, people, tmp_path / "job", **{**OPTIONS, "batch": 1})
    assert alive == [0] and most[0] <= 2


def test_a_disk_that_fills(space, pipe, people, tmp_path, monkeypatch, whole):
    """Writing fails half-way: one clear error; with space again the job ends as it would have."""
    import w2w_fast.files as writing

    sync, calls = writing._sync, []

    def full(path):
        calls.append(path)
        if len(calls) > 12 and path.suffix == ".tmp":
            raise OSError(28, "No space left on device")
        sync(path)

    with monkeypatch.context() as patch:
        patch.setattr(writing, "_sync", full)
        with pytest.raises(OSError, match="No space left"):
            generate_to(space, pipe, people, tmp_path / "job", **OPTIONS)
    generate_to(space, pipe, people, tmp_path / "job", **OPTIONS)
    assert tree(tmp_path / "job") == whole[1]


# --- other jobs, other folders ------------------------------------------------------------------


def test_another_job_does_not_resume(space, pipe, layout, people, whole):
    made, want = whole
    euler = named_scheduler("EulerDiscreteScheduler", pipe)
    respaced = type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing="leading")
    changed = [
        (people + 0.1, {}, "coefficients"),
        (people[:4], {}, "coefficients, images"),
        (people, {"edits": "beard=+3"}, "coefficients, edits"),
        (people, {"prompts": PROMPTS[:2]}, "prompts"),
        (people, {"seed": 8}, "seed"),
        (people, {"steps": 4}, "steps"),
        (people, {"guidance": 3.0}, "guidance"),
        (people, {"identity_guidance": True}, "identity_guidance"),
        (people, {"strength": 0.5}, "strength"),
        (people, {"start": 500}, "start"),
        (people, {"start": 500, "before": people}, "before, start"),
        (people, {"scheduler": euler}, "schedule, scheduler"),
        (people, {"scheduler": respaced}, "schedule"),
        (people, {"batch": 5}, "batch"),
        (people, {"format": "jpeg"}, "format"),
    ]
    for c, options, said in changed:
        with pytest.raises(InputError, match=f"made with another {said};"):
            generate_to(space, pipe, c, made.folder, **{**OPTIONS, **options})
    other = make_space(layout)
    other.mean = other.mean + 1.0
    with pytest.raises(InputError, match="another space;"):
        generate_to(other, pipe, people, made.folder, **OPTIONS)
    assert tree(made.folder) == want


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_another_base_does_not_resume(space, pipe, people, whole, part):
    made, _ = whole
    weight = next(getattr(pipe, part).parameters())
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.add_(1e-3)
        with pytest.raises(InputError, match="another base;"):
            generate_to(space, pipe, people, made.folder, **OPTIONS)
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_a_folder_of_other_things_is_left_alone(space, pipe, people, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(InputError, match="not empty and not a gallery"):
            generate_to(space, pipe, people, out, **OPTIONS)
    assert list(tmp_path.iterdir()) == [tmp_path / "thesis.txt"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("gallery.json", b"{", "not valid JSON"),
        ("gallery.json", b"[]", "not the record of a gallery"),
        ("gallery.json", b'{"format": "w2w_fast.gallery", "version": 9}', "version 9"),
        ("gallery.json", b'{"format": "w2w_fast.gallery", "version": 1, "job": 3}', "not the rec"),
        ("gallery.json", b'{"format": "w2w_fast.gallery", "version": 1}', "images, batch"),
        ("images.parquet", b"PAR1", "images.parquet"),
        ("image-000003.png", b"\x89PNG", "image-000003.png: differs"),
        ("image-000003.png", None, "image-000003.png: no such file"),
        ("coefficients.safetensors", None, "coefficients.safetensors: no such file"),
        ("manifest.json", b"{}", "not in the manifest"),
    ],
)
def test_damage_is_found(space, pipe, people, tmp_path, whole, name, content, said):
    folder = tmp_path / "gallery"
    shutil.copytree(whole[0].folder, folder)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=said):
        open_gallery(folder)
    if name != "coefficients.safetensors":  # which is there again then
        with pytest.raises(InputError):
            generate_to(space, pipe, people, folder, **OPTIONS)


def test_a_table_cannot_name_files_elsewhere(tmp_path, whole):
    folder = tmp_path / "gallery"
    shutil.copytree(whole[0].folder, folder)
    rows = whole[0].table.to_pylist()
    rows[0]["file"] = "../secret.png"
    parquet.write_table(whole[0].table.from_pylist(rows), folder / gallery.TABLE)
    gallery.write_manifest(folder)
    with pytest.raises(InputError, match="a row for each of 10 images"):
        open_gallery(folder)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prompts": []}, "a prompt"),
        ({"prompts": ["x" * 10_001]}, "10,000"),
        ({"prompts": ["x" * 9000] * 1000}, "8 MiB"),
        ({"per_identity": 0}, "1 to 1,000,000 images"),
        ({"per_identity": 10**6}, "1 to 1,000,000 images"),
        ({"edits": "wings=1"}, "wings"),
        ({"edits": "beard"}, "beard=\\+1.5"),
        ({"edits": "hold=age"}, "attribute=amount"),
        ({"seed": 2**63 - 3}, "seed"),
        ({"steps": 0}, "steps"),
        ({"batch": 0}, "batch"),
        ({"guidance": float("nan")}, "guidance"),
        ({"strength": float("inf")}, "strength"),
        ({"strength": torch.ones(10)}, "strength"),
        ({"format": "gif"}, "png, webp, jpeg, tar"),
        ({"edits": "", "start": 500}, "start"),
        ({"start": 0.5}, "start"),
        ({"start": [500] * 4}, "start: .* one of each of 5 people"),
        ({"before": torch.full((5, 6), torch.nan), "start": 5}, "before: wanted finite"),
        ({"before": torch.zeros(5, 6)}, "start"),
        ({"before": torch.zeros(4, 6), "start": 5}, "before"),
        ({"coefficients": torch.zeros(2, 3)}, "coefficients"),
        ({"coefficients": torch.zeros(0, 6)}, "coefficients"),
        ({"coefficients": torch.full((1, 6), torch.nan)}, "coefficients"),
    ],
)
def test_refusals_leave_no_folder(space, pipe, people, tmp_path, options, said):
    arguments = {"coefficients": people, **OPTIONS, **options}
    with pytest.raises(InputError, match=said):
        generate_to(space, pipe, out=tmp_path / "job", **arguments)
    assert not (tmp_path / "job").exists()


# --- formats ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("format", "suffix"), [("webp", "webp"), ("jpeg", "jpg")])
def test_smaller_formats(space, pipe, people, tmp_path, whole, format, suffix):
    made = generate_to(space, pipe, people, tmp_path / "job", **{**OPTIONS, "format": format})
    files = made.table["file"].to_pylist()
    assert files == [f"image-{i:06d}.{suffix}" for i in range(10)]
    for file in files:
        image = Image.open(made.folder / file)
        assert image.format == format.upper() and image.size == (SIZE, SIZE)
        png = Image.open((whole[0].folder / file).with_suffix(".png"))
        lost = np.abs(as_array(image) - as_array(png)).mean()  # of pixels that are mostly noise
        assert 0 < lost < 30
    assert open_gallery(made.folder).table.equals(made.table)


def test_tars(space, pipe, people, tmp_path, monkeypatch, whole):
    """Shards that webdataset reads: a .png and a .json of each image, in order."""
    monkeypatch.setattr(gallery, "_TOGETHER", 8)
    made = generate_to(space, pipe, people, tmp_path / "job", **{**OPTIONS, "format": "tar"})
    assert sorted(path.name for path in made.folder.glob("*.tar")) == [
        "images-00000.tar", "images-00001.tar"
    ]  # fmt: skip
    found = []
    for path in sorted(made.folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found += [
                (f"{path.name}/{m.name}", m.mode, tar.extractfile(m).read())
                for m in tar.getmembers()
            ]
    rows = made.table.to_pylist()
    assert [name for name, *_ in found[::2]] == [row["file"] for row in rows]
    assert all(mode == 0o644 for _, mode, _ in found)
    for row, (_, _, png), (name, _, told) in zip(rows, found[::2], found[1::2], strict=True):
        assert name == row["file"].replace(".png", ".json")
        assert row == {"file": row["file"], "sha256": row["sha256"], **json.loads(told)}
        own = whole[0].folder / row["file"].partition("/")[2]
        assert png == own.read_bytes() and Image.open(io.BytesIO(png)).size == (SIZE, SIZE)
    assert "images-00001.tar" in json.loads((made.folder / "manifest.json").read_text())
    assert open_gallery(made.folder).table.equals(made.table)


def test_many_pictures_are_put_into_folders(space, pipe, people, tmp_path, monkeypatch, whole):
    monkeypatch.setattr(gallery, "_TOGETHER", 6)
    monkeypatch.setattr(gallery, "_PAGE", 3)
    folder = tmp_path / "job"
    with monkeypatch.context() as patch:
        killing(patch, gallery, "encode", 9)
        with pytest.raises(Killed):
            generate_to(space, pipe, people, folder, **OPTIONS)
    (folder / "001" / ".image-000008.png.0123abcd.tmp").write_bytes(b"half")
    generate_to(space, pipe, people, folder, **OPTIONS)
    for i in range(10):
        name = f"image-{i:06d}.png"
        got = folder / f"{i // 6:03d}" / name
        assert got.read_bytes() == (whole[0].folder / name).read_bytes()
    assert len(list(folder.rglob("*"))) == 10 + 2 + 4 + 1 + 4  # sheets of three images each
    open_gallery(folder)
    draft = Draft(folder, 1_000_000, 32, "png")
    monkeypatch.undo()
    assert draft.name(999_999) == "999/image-999999.png"


def test_a_delayed_edit(space, pipe, people, tmp_path):
    """By default from who they are without the edits; else from `before`."""
    options = {**OPTIONS, "batch": 10, "start": 500}
    made = generate_to(space, pipe, people, tmp_path / "own", **options)
    rows = torch.arange(5).repeat_interleave(2)
    after = edit(space, people, beard=2.0, hold="age")[rows]
    prompts = PROMPTS[:2] * 5

    def wanted(before):
        return generate(
            space, pipe, after, prompts, seeds=7, before=before[rows], start=500, **SETTINGS
        )

    def pictures(gallery):
        return [Image.open(gallery.folder / f) for f in gallery.table["file"].to_pylist()]

    assert distance(pictures(made), wanted(people)) == 0
    assert set(made.table["start"].to_pylist()) == {500}
    others = sample(space, 5, seed=9)
    made = generate_to(space, pipe, people, tmp_path / "others", before=others, **options)
    assert distance(pictures(made), wanted(others)) == 0
    assert torch.equal(read_coefficients(made.folder / gallery.BEFORE), others)
    settings = verb.recorded(made.folder)
    assert torch.equal(settings["before"], others) and settings["start"] == 500


def test_a_delayed_edit_of_each_at_its_own_time(space, pipe, people, tmp_path):
    starts = [0, 300, 600, 900, 1000]
    options = {**OPTIONS, "batch": 10, "start": starts}
    made = generate_to(space, pipe, people, tmp_path / "job", **options)
    rows = torch.arange(5).repeat_interleave(2)
    after = edit(space, people, beard=2.0, hold="age")[rows]
    want = generate(
        space, pipe, after, PROMPTS[:2] * 5, seeds=7, before=people[rows],
        start=[starts[row] for row in rows], **SETTINGS,
    )  # fmt: skip
    files = made.table["file"].to_pylist()
    assert distance([Image.open(made.folder / file) for file in files], want) == 0
    assert made.table["start"].to_pylist() == [starts[row] for row in rows]
    assert verb.recorded(made.folder)["start"] == starts
    with pytest.raises(InputError, match="another start;"):
        generate_to(space, pipe, people, made.folder, **{**options, "start": 300})
