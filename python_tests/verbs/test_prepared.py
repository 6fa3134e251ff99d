"""What makes room and time for pictures: batches that fit memory, tiling, compilation."""

from __future__ import annotations

import copy
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from tiny_world import SIZE, distance

from w2w_fast import InputError, edit, generate, generate_to, sample
from w2w_fast.gallery import open_gallery
from w2w_fast.memory import peak_of
from w2w_fast.prepared import Prepared
from w2w_fast.verbs import generate_to as verb
from w2w_fast.verbs.generate import checked_requests, fitting_batch

OPTIONS = {"steps": 4, "guidance": 2.0, "progress": False}
JOB = {
    "prompts": ["sks person", "sks person, at night"], "steps": 3, "guidance": 2.0, "batch": 4,
    "progress": False,
}  # fmt: skip


@pytest.fixture
def people(space):
    return sample(space, 3, seed=2, factor=2.0)


@pytest.fixture
def five(space):
    return sample(space, 5, seed=2, factor=2.0)


def batches_of(monkeypatch):
    """How many pictures each batch had, from now on."""
    sizes, make = [], Prepared.make

    def made(self, requests):
        sizes.append(len(requests))
        return make(self, requests)

    monkeypatch.setattr(Prepared, "make", made)
    return sizes


def test_the_batch_fits_itself_to_memory(space, pipe, people, monkeypatch):
    request = checked_requests(space, people[:1], "sks person", 0, 1.0, None, 0)
    options = {"steps": 4, "guidance": 2.0}

    def peak(k):
        with Prepared(space, pipe, **options) as prepared:
            return peak_of(pipe, lambda: prepared.make(request.take([0] * k)))

    one, two, five = peak(1), peak(2), peak(5)
    weights = sum(
        p.nbytes for m in (pipe.unet, pipe.vae, pipe.text_encoder) for p in m.parameters()
    )
    assert weights < one < two and abs(five - one - 4 * (two - one)) < 0.1 * (five - one)
    for wanted in (1, 5):
        room = int(one + (wanted - 0.5) * (two - one))
        assert fitting_batch(space, pipe, request, room, 100, **options) == wanted
    assert fitting_batch(space, pipe, request, room, 2, **options) == 2
    with pytest.raises(InputError, match="one picture needs"):
        fitting_batch(space, pipe, request, one - 1, 100, **options)
    sizes = batches_of(monkeypatch)
    got = generate(space, pipe, people, memory=int(one + 1.5 * (two - one)), **OPTIONS)
    assert sizes == [1, 2, 2, 1]  # two to try, then all three
    assert distance(got, generate(space, pipe, people, **OPTIONS)) <= 1


def test_tiling_and_slicing(space, pipe, people):
    """Picture by picture, large ones in tiles; the pipeline's own choice comes back."""
    vae, seen = pipe.vae, []
    options = {**OPTIONS, "height": 2 * SIZE, "width": 2 * SIZE}
    hook = vae.decoder.register_forward_hook(lambda m, args, out: seen.append(args[0].shape))
    try:
        whole = generate(space, pipe, people, **options)
        assert [shape[0] for shape in seen] == [3]
        seen.clear()
        tiled = generate(space, pipe, people, tiling=True, **options)
    finally:
        hook.remove()
    assert {shape[0] for shape in seen} == {1} and len(seen) > 3
    assert max(shape[-1] for shape in seen) <= SIZE // 2
    assert not vae.use_tiling and not vae.use_slicing
    assert [image.size for image in tiled] == [(2 * SIZE, 2 * SIZE)] * 3
    assert distance(tiled, whole) > 0
    vae.enable_slicing()
    try:
        generate(space, pipe, people, tiling=True, **OPTIONS)
        assert vae.use_slicing and not vae.use_tiling
    finally:
        vae.disable_slicing()


def test_tiling_needs_less_memory(space, pipe):
    latents = torch.zeros(3, 4, 64, 64)

    @torch.no_grad()
    def peak(**options):
        with Prepared(space, pipe, steps=1, guidance=2.0, **options):
            return peak_of(pipe, lambda: pipe.vae.decode(latents))

    assert peak(tiling=True) < 0.7 * peak()


def test_a_vae_without_tiling_is_refused(space, pipe, people):
    class Vae(torch.nn.Module):
        config, dtype = pipe.vae.config, torch.float32

    own = pipe.vae
    try:
        pipe.vae = Vae()
        with pytest.raises(InputError, match="tiling: Vae has none"):
            generate(space, pipe, people, tiling=True, **OPTIONS)
    finally:
        pipe.vae = own


@pytest.mark.slow
def test_compiled_once_and_put_back(space, pipe, people, monkeypatch):
    """Live identities, delayed edits and a last batch that is not full: one graph for all."""
    from torch._dynamo.utils import counters

    edited, own = edit(space, people, beard=6.0), pipe.unet
    options = {
        **OPTIONS, "batch": 2, "before": people, "start": [900, 600, 300],
        "identity_guidance": True,
    }  # fmt: skip
    want = generate(space, pipe, edited, **options)
    torch.compiler.reset()
    counters.clear()
    rows, call = [], StableDiffusionPipeline.__call__

    def counted(self, prompts, **rest):
        rows.append(len(prompts))
        return call(self, prompts, **rest)

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", counted)
    got = generate(space, pipe, edited, compile=True, **options)
    assert distance(got, want) <= 1 and rows == [2, 2]
    assert counters["stats"]["unique_graphs"] == 1
    assert pipe.unet is own and distance(generate(space, pipe, edited, **options), want) == 0


def test_a_compiler_that_fails_is_one_message(space, pipe, people, monkeypatch):
    def fails(graph, inputs):
        raise RuntimeError("no C++ compiler")

    real, own = torch.compile, pipe.unet
    monkeypatch.setattr(torch, "compile", lambda model, **rest: real(model, backend=fails))
    with pytest.raises(InputError, match=r"compile: .*no C\+\+ compiler$"):
        generate(space, pipe, people, compile=True, **OPTIONS)
    assert pipe.unet is own


# --- galleries ----------------------------------------------------------------------------------


def test_who_begins_a_gallery_fits_its_batch(space, pipe, five, tmp_path, monkeypatch):
    """Others wait for that, and take it."""
    options, fitted, go = {**JOB, "memory": 1 << 30}, [], threading.Event()

    def fitting(*args, **kwargs):
        fitted.append(args)
        go.wait(60)
        return 3

    monkeypatch.setattr(verb, "fitting_batch", fitting)
    other = copy.deepcopy(pipe)
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(generate_to, space, p, five, tmp_path / "job", **options)
            for p in (pipe, other)
        ]
        while not fitted:
            time.sleep(0.01)
        go.set()
        assert jobs[0].result(60).table.equals(jobs[1].result(60).table)
    assert len(fitted) == 1
    made = open_gallery(tmp_path / "job")
    assert made.job["batch"] == 3 and len(made) == 10
    assert not list(made.folder.glob(".*"))
    generate_to(space, pipe, five, made.folder, **{**JOB, "batch": 3})
    with pytest.raises(InputError, match="another batch;"):
        generate_to(space, pipe, five, made.folder, **JOB)


def test_too_little_memory_leaves_what_was_there(space, pipe, five, tmp_path):
    for there in (False, True):
        if there:
            (tmp_path / "job").mkdir()
        with pytest.raises(InputError, match="one picture needs"):
            generate_to(space, pipe, five, tmp_path / "job", **{**JOB, "memory": 1000})
        assert [path.name for path in tmp_path.iterdir()] == ["job"] * there
        assert list(tmp_path.rglob("job/*")) == []
    (tmp_path / "job").rmdir()
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty and not a gallery"):
        generate_to(space, pipe, five, tmp_path, **{**JOB, "memory": 1 << 30})
    assert list(tmp_path.iterdir()) == [tmp_path / "thesis.txt"]


def test_a_compiled_job_compiles_once_and_fills_its_last_batch(
    space, pipe, five, tmp_path, monkeypatch
):
    """Without a compiler here: the backend is eager."""
    real, compiled, rows = torch.compile, [], []

    def eager(model, mode, dynamic):
        compiled.append((mode, dynamic))
        return real(model, backend="eager", dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", eager)
    own, call = pipe.unet, type(pipe).__call__

    def counted(self, prompts, **rest):
        rows.append((len(prompts), self.unet is own))
        return call(self, prompts, **rest)

    monkeypatch.setattr(type(pipe), "__call__", counted)
    options = {**JOB, "compile": True}
    made = generate_to(space, pipe, five, tmp_path / "job", **options)
    assert compiled == [("default", False)] and rows == [(4, False)] * 3 and pipe.unet is own
    assert len(made) == 10 and made.job["compile"] is True
    with pytest.raises(InputError, match="another compile;"):
        generate_to(space, pipe, five, made.folder, **JOB)
    plain = generate_to(space, pipe, five, tmp_path / "plain", **JOB)
    pairs = [[Image.open(g.folder / f) for f in g.table["file"].to_pylist()] for g in (made, plain)]
    assert distance(*pairs) <= 1
