"""`--ray`: two workers on one folder, of populate with one of them killed, and of generate."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image
from tiny_world import make_pipe, photographs, tree

from w2w_fast.cli.populate import job, on_ray

pytest.importorskip("ray")


@pytest.fixture
def call(tmp_path):
    """Six people, three shards, a training of some seconds; a state after every step."""
    make_pipe(tmp_path / "tokenizer").save_pretrained(tmp_path / "base")
    for i in range(6):
        folder = tmp_path / "photos" / f"person-{i}"
        folder.mkdir(parents=True)
        for j, photo in enumerate(photographs(2, seed=i)):
            Image.fromarray(photo.permute(1, 2, 0).numpy()).save(folder / f"{j}.png")
    recipe = {"steps": 60, "lr": 0.01, "eps": 1e-4, "prior": 0.0}
    settings = {
        "recipe": recipe, "start": None, "batch": 2, "vram": None, "shard": 2, "rank": 1,
        "alpha": 8.0, "prompt": "sks person", "save_every": 0.0,
    }  # fmt: skip
    return {
        "photos": tmp_path / "photos", "out": tmp_path / "out", "base": str(tmp_path / "base"),
        "labels": None, "cache": None, "device": "cpu", "settings": settings,
    }  # fmt: skip


def workers() -> list[int]:
    """The processes of Ray's workers that are at the job now."""
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"ray::Worker.work" in line.read_bytes():
                found.append(int(line.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds workers in /proc")
def test_a_killed_worker_loses_nothing(call, tmp_path):
    out = call["out"]
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(on_ray, "local", 2, call)
        end = time.monotonic() + 120
        while len(list(out.glob(".state-*.safetensors"))) < 2:  # both are in the middle of a shard
            assert time.monotonic() < end and not running.done(), running
            time.sleep(0.02)
        team = workers()
        assert len(team) == 2
        os.kill(team[0], signal.SIGKILL)
        made = running.result(300)
    assert len(made) == 6
    alone = job(**{**call, "out": tmp_path / "alone"}, progress=False)
    assert tree(out) == tree(alone.folder)


def test_generate_by_two_workers(run, tmp_path):
    line = "generate {}/space --sample 6 --per-identity 2 --batch 2 --out "
    assert "12 images of 6 people" in run(line + "spread --ray local --workers 2").stdout
    run(line + "alone")
    assert tree(tmp_path / "spread") == tree(tmp_path / "alone")
    run("generate {}/space --resume --out spread --ray local --workers 2")
    run(line + "spread --seed 1 --ray local --workers 1", code=2)
