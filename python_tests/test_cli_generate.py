"""`w2w generate`: galleries by the command line; its bad input is in test_cli.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from pyarrow import parquet
from tiny_world import SIZE, distance, tree

import w2w_fast as w2w


def rows(folder: str) -> list[dict]:
    return parquet.read_table(Path(folder, "images.parquet")).to_pylist()


def test_generate(run):
    line = "generate {}/space --identities {}/people.safetensors --prompts {}/text.txt --seed 7"
    assert "6 images of 3 people" in run(line + " --batch 4").stdout
    table = rows("images")
    assert [row["row"] for row in table] == [0, 0, 1, 1, 2, 2]
    assert [row["seed"] for row in table] == list(range(7, 13))
    assert table[1]["prompt"] == "sks person, at night" and table[1]["steps"] == 2
    assert (table[1]["guidance"], table[1]["scheduler"]) == (2.0, "DDIMScheduler")
    assert Image.open("images/contact-sheets/00000.jpg").size[0] > 128
    # Image 3 again, alone: its row, prompt and seed are all in the table.
    people = w2w.read_coefficients("images/coefficients.safetensors")
    w2w.write_coefficients("one.safetensors", people[1:2])
    row = table[3]
    prompt = row["prompt"].replace(" ", "~")
    run(
        "generate {}/space --identities one.safetensors --out again "
        f"--prompts {prompt} --seed {row['seed']}"
    )
    pair = [Image.open(Path("images", row["file"])), Image.open("again/image-000000.png")]
    assert pair[0].size == (SIZE, SIZE) and distance(pair[:1], pair[1:]) <= 1
    text = run("info images").stdout
    assert "gallery" in text and "6 of 3 people" in text and "sks person, at the beach" in text


def test_a_second_call_resumes_and_another_one_is_refused(run):
    line = "generate {}/space --sample 3 --per-identity 2 --batch 2 --edits beard=+2 --out job"
    run(line)
    want = tree(Path("job"))
    assert "6 images of 3 people" in run(line).stdout
    # As if it had been killed earlier.
    for name in ("manifest.json", "images.parquet", "contact-sheets/00000.jpg"):
        Path("job", name).unlink()
    run(line)
    assert tree(Path("job")) == want
    for name in ("manifest.json", "images.parquet"):
        Path("job", name).unlink()
    run("generate {}/space --resume --out job")
    assert tree(Path("job")) == want
    for more in ("--steps 3", "--seed 1", "--edits beard=+1", "--dtype bfloat16"):
        assert "made with another" in run(f"{line} {more}", code=2).stderr
    assert tree(Path("job")) == want


def test_schedulers_and_formats(run):
    line = "generate {}/space --identities {}/people.safetensors --per-identity 1 "
    run(line + "--scheduler DPMSolverMultistepScheduler --format webp --out a")
    assert {row["scheduler"] for row in rows("a")} == {"DPMSolverMultistepScheduler"}
    assert len(list(Path("a").glob("image-*.webp"))) == 3
    run("generate {}/space --resume --out a")
    run(line + "--format tar --dtype bfloat16 --out b")
    assert [path.name for path in Path("b").glob("*.tar")] == ["images-00000.tar"]


def test_generate_delayed(run):
    run("edit {}/space {}/people.safetensors --set beard=5 --out edited.safetensors")
    line = "generate {}/space --identities edited.safetensors --steps 3 --out "
    run(line + "after")
    run(line + "early --before {}/people.safetensors --start 1000")
    run(line + "late --before {}/people.safetensors --start 0")
    line = "generate {}/space --identities {}/people.safetensors --edits beard=5 --steps 3 --out "
    run(line + "edits")
    run(line + "edits-late --start 0")
    after, early, late, edits, edits_late = (
        Image.open(f"{name}/image-000000.png").tobytes()
        for name in ("after", "early", "late", "edits", "edits-late")
    )
    assert after == early == edits != late == edits_late


def test_a_batch_that_fits_memory_is_the_jobs(run):
    """Who resumes takes the recorded batch, however much memory it is told of."""
    line = "generate {}/space --sample 5 --out job --tiling --vram "
    assert "5 images of 5 people" in run(line + "1GiB").stdout
    record = json.loads(Path("job/gallery.json").read_text())["job"]
    assert record["batch"] == 5 and record["tiling"] is True and record["compile"] is False
    want = tree(Path("job"))
    Path("job/manifest.json").unlink()
    run(line + "100MiB")
    assert tree(Path("job")) == want
    run("generate {}/space --out job --resume")
    assert "made with another tiling" in run(
        "generate {}/space --sample 5 --out job --vram 1GiB", code=2
    ).stderr  # fmt: skip
    assert "made with another batch" in run(
        "generate {}/space --sample 5 --out job --tiling --batch 4", code=2
    ).stderr  # fmt: skip


def test_warns_of_prompts_without_the_spaces_own(run):
    result = run("generate {}/space --sample 2 --prompts a~beach --prompts a~tree")
    said = [line for line in result.stderr.splitlines() if line.startswith("w2w: ")]
    assert len(said) == 1 and "'a beach' has no 'sks person' in it" in said[0]


@pytest.mark.parametrize("more", ["", " --resume"])
def test_one_folder_is_not_asked_for_two_spaces(run, more):
    run("generate {}/space --sample 1 --out job")
    line = "generate {}/narrow --out job" + (more or " --sample 1")
    assert "coefficients" in run(line, code=2).stderr
