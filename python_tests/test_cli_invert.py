"""`w2w invert` by the command line: masks, reports, memory, and bad input before any work."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_world import SIZE, tree

import w2w_fast as w2w


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> Path:
    """Pictures that are none, or not what they should be."""
    folder = tmp_path_factory.mktemp("odd")
    Image.new("1", (5000, 5000)).save(folder / "bomb.png")
    (folder / "text.png").write_text("not a picture")
    Image.new("L", (SIZE, 2 * SIZE), 255).save(folder / "tall.png")
    Image.new("L", (4 * SIZE, 4 * SIZE), 255).save(folder / "fine.png")
    for name in ("a", "b"):
        Image.new("RGB", (SIZE, SIZE), (90, 80, 70)).save(folder / f"{name}.png")
    Image.new("L", (SIZE, SIZE), 255).save(folder / "a.mask.png")
    return folder


BAD = [
    ("@/text.png", "PNG, JPEG or WebP"),
    ("@/bomb.png", "16 megapixels"),
    ("@/b.png --mask @/text.png", "PNG, JPEG or WebP"),
    ("@/b.png --mask @/tall.png", "wanted the shape of .* 16 x 16"),
    ("@/b.png --mask {}/black.png", "all black"),
    ("@/b.png --mask {}/mask.png --auto-mask", "either --mask FILE or --auto-mask"),
    ("@/a.png @/b.png", "wanted a mask of it too"),
    ("@/b.png --start {}/nan.safetensors", "NaN"),
    ("@/b.png --start {}/narrow.safetensors", "6 components"),
    ("@/b.png @/b.png --start {}/people.safetensors", r"wanted \[2, 6\]"),
    ("@/b.png --base demo", "module"),
    ("@/b.png --vram plenty", "--vram"),
    ("@/b.png --vram 1kB", "one subject needs"),
    ("@/b.png --check 9", "check=9"),
    ("@/b.png --check 2 --patience 0", "patience=0"),
    ("@/b.png --report {}/photos", "empty folder"),
]


@pytest.mark.parametrize(("line", "said"), BAD)
def test_bad_input_is_one_line_and_nothing_is_written(run, odd, line, said):
    result = run(f"invert {{}}/space {line.replace('@', str(odd))}", code=2)
    assert re.search(said, result.stderr) and len(result.stderr.splitlines()) == 1
    assert result.stdout == "" and list(Path().iterdir()) == []


def test_a_report_beside_the_people(run, odd, world):
    line = "invert {}/space {}/photos/person-0 {}/photos/person-1/2.png --out me.safetensors "
    result = run(line + "--auto-mask --report me --vram 1GiB --checkpointing --check 1")
    assert "2 people from 3 photos; see me/report.html" in result.stdout
    about = json.loads(Path("me/report.json").read_text())["people"]
    assert [person["name"] for person in about] == ["person-0", "2"]
    names = {"report.html", "report.json", "0000.png", "0000-loss.png", "0001.png", "0001-loss.png"}
    assert set(tree(Path("me"))) == names
    assert sorted(path.name for path in Path().iterdir()) == ["me", "me.safetensors"]


def test_masks_beside_photos_and_of_another_scale(run, odd):
    run(f"invert {{}}/space {odd}/a.png --out beside.safetensors")
    run(f"invert {{}}/space {odd}/a.png --mask {odd}/fine.png --out scaled.safetensors")
    run(f"invert {{}}/space {odd}/a.png --mask {{}}/mask.png --out given.safetensors")
    a, b, c = (
        w2w.read_coefficients(f"{name}.safetensors") for name in ("beside", "scaled", "given")
    )
    assert torch.equal(a, c) and torch.equal(a, b)


def test_bf16_and_a_start(run, world, odd):
    line = f"invert {{}}/space {odd}/b.png "
    run(line + "--bf16 --out half.safetensors")
    run(line + "--out whole.safetensors")
    half, whole = (w2w.read_coefficients(f"{name}.safetensors") for name in ("half", "whole"))
    space = w2w.WeightSpace.load(world / "space")
    assert 0 < ((half - whole) / space.sigma).abs().max() < 0.5
    run(line + "--start whole.safetensors --steps 1 --lr 0.000001 --out still.safetensors")
    assert torch.allclose(w2w.read_coefficients("still.safetensors"), whole, atol=1e-4)


def test_another_prompt_is_warned_of(run, odd):
    said = run(f"invert {{}}/space {odd}/b.png --prompt a~man").stderr
    assert "has no 'sks person' in it" in said
