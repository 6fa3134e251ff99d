"""`invert` at work: killed and resumed, stopped early, on less memory, reported."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from PIL import Image
from tiny_world import SIZE, photographs
from torch.utils._python_dispatch import TorchDispatchMode

from w2w_fast import InputError, demo, invert, sample
from w2w_fast.denoise import centre_mask
from w2w_fast.files import read_tensors
from w2w_fast.inversion import Inversion
from w2w_fast.memory import largest_batch
from w2w_fast.recipe import Recipe
from w2w_fast.sources import Subject, fitted
from w2w_fast.verbs.invert_report import whereabouts

RECIPE = Recipe(steps=12, lr=0.1, prior=0.0, average=0.5)


def z_of(space, c):
    return (c - space.mu) / space.sigma


def people(n: int) -> list[Subject]:
    photos = photographs(n)
    return [Subject(f"p{i}", photos[i : i + 1], ("sks person",)) for i in range(n)]


def inversion(space, pipe, n=2, recipe=RECIPE, **options) -> Inversion:
    return Inversion(pipe, space, people(n), recipe, space.mu, **options)


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [2, 13, 20])
def test_a_killed_job_goes_on_to_the_same_bits(space, pipe, photos, tmp_path, at):
    """In the first batch, as the third person comes in, near the end."""
    options = {
        "steps": 10, "average": 0.5, "prior": 0.1, "batch": 2, "check": 5, "patience": 9,
        "progress": False,
    }  # fmt: skip
    want = invert(space, pipe, photos[:3], **options)
    state, seen = tmp_path / "state", []

    def kill(about):
        seen.append(about)
        if len(seen) == at:
            raise Killed

    with pytest.raises(Killed):
        invert(space, pipe, photos[:3], state=state, save_every=0, callback=kill, **options)
    assert state.exists()
    again = []
    found = invert(space, pipe, photos[:3], state=state, callback=again.append, **options)
    assert torch.equal(found, want) and not state.exists()
    assert len(again) == 20 - at + 1  # the step it was killed in had not been written


def test_a_state_of_another_job_is_refused(space, pipe, photos, tmp_path):
    state = tmp_path / "state"

    def kill(about):
        if about["steps"][0] == 2:
            raise Killed

    options = {"steps": 4, "state": state, "save_every": 0, "progress": False}
    with pytest.raises(Killed):
        invert(space, pipe, photos[:1], callback=kill, **options)
    before = state.read_bytes()
    for other, said in (({"lr": 0.5}, "lr"), ({"prior": 1.0}, "prior")):
        with pytest.raises(InputError, match=f"another {said}; remove it"):
            invert(space, pipe, photos[:1], **options, **other)
    with pytest.raises(InputError, match="another photographs"):
        invert(space, pipe, photos[1:2], **options)
    with pytest.raises(InputError, match="another space"):
        moved = copy.copy(space)
        moved.mean = space.mean + 1
        invert(moved, pipe, photos[:1], **options)
    assert state.read_bytes() == before
    state.write_bytes(b"not safetensors at all")
    with pytest.raises(InputError, match="safetensors"):
        invert(space, pipe, photos[:1], **options)


def test_no_better_held_out_loss_ends_it(space, pipe):
    """Who does not move has its first look as its best, then `patience` that are no better."""
    recipe = Recipe(steps=50, lr=1e-12, prior=0.0, check=3, patience=2)
    found, facts = inversion(space, pipe, recipe=recipe).find()
    assert [fact["steps"] for fact in facts] == [9, 9]
    assert torch.allclose(found, space.mu.expand(2, -1), atol=1e-5)


def test_who_is_done_stops_moving_and_the_others_go_on(space, pipe, monkeypatch):
    recipe = Recipe(steps=8, lr=0.1, prior=0.0, check=4)
    monkeypatch.setattr(
        Inversion, "_no_better", lambda self, looked: {i for i in looked if i == 1 < len(self.rows)}
    )
    found, facts = inversion(space, pipe, recipe=recipe).find()
    assert [fact["steps"] for fact in facts] == [8, 4]
    short = Recipe(steps=4, lr=0.1, prior=0.0)
    assert torch.equal(found[1], inversion(space, pipe, recipe=short).find()[0][1])
    alone = inversion(space, pipe, 1, recipe=Recipe(steps=8, lr=0.1, prior=0.0)).find()[0]
    assert (z_of(space, found[0]) - z_of(space, alone[0])).abs().max() < 1e-3


def test_held_out_noise_is_the_same_at_each_look_and_of_all_photos(space, pipe):
    job = inversion(space, pipe, recipe=Recipe(steps=3, check=1, patience=9, prior=0.0))
    looks = []
    inputs = job._inputs

    def seen(steps, what):
        made = inputs(steps, what)
        if what == "held-out":
            looks.append((made[1].clone(), made[2].clone()))
        return made

    job._inputs = seen
    job.find()
    n = job.held_out_draws
    assert len(looks) == 2 * n  # the last step ends it without a look
    for first, second in zip(looks[:n], looks[n:], strict=True):
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert len({float(t[0]) for _, t in looks}) > 1


def test_checkpointing_changes_memory_only(space, pipe, photos):
    options = {"steps": 6, "progress": False}
    plain = invert(space, pipe, photos[:2], **options)
    less = invert(space, pipe, photos[:2], checkpointing=True, **options)
    assert (z_of(space, less) - z_of(space, plain)).abs().max() < 1e-3
    assert not pipe.unet.is_gradient_checkpointing
    sizes = [
        largest_batch(lambda k, flag=flag: inversion(space, pipe, k, checkpointing=flag), 16 << 20)
        for flag in (False, True)
    ]
    assert sizes[1] > sizes[0] > 1
    fitted = invert(space, pipe, photos[:2], memory=16 << 20, **options)
    assert (z_of(space, fitted) - z_of(space, plain)).abs().max() < 1e-3


@pytest.mark.parametrize(("kind", "near"), [("int8", 0.05), ("int4", 0.5)])
def test_a_basis_of_integers(space, pipe, photos, kind, near):
    options = {"steps": 10, "progress": False}
    plain = invert(space, pipe, photos[:2], **options)
    small = invert(space.quantize(kind), pipe, photos[:2], **options)
    assert (z_of(space, small) - z_of(space, plain)).norm() < near * z_of(space, plain).norm()


def test_a_base_of_bfloat16(space, pipe, photos):
    half = copy.deepcopy(pipe).to(torch.bfloat16)
    options = {"steps": 10, "progress": False}
    plain, found = (invert(space, p, photos[:2], **options) for p in (pipe, half))
    assert found.dtype == torch.float32
    away = (z_of(space, found) - z_of(space, plain)).norm()
    assert 0 < away < 0.3 * z_of(space, plain).norm()


def test_the_gradient_goes_through_the_ops_once_a_step(space, pipe, photos):
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "w2w_fast":
                seen.append(func.name().partition("::")[2])
            elif any(a is space.basis for a in args):
                seen.append(func.name())
            return func(*args, **(kwargs or {}))

    with Watch():
        invert(space, pipe, photos[:2], steps=3, progress=False)
    mine = [name for name in seen if "low_rank" not in name and "adapted" not in name]
    # One more: where the adapters live is known after the first forward.
    assert mine.count("project") == 3 and 3 <= mine.count("reconstruct") <= 4
    assert set(mine) == {"reconstruct", "project"}


def test_who_diverges_is_named(space, pipe, photos):
    with pytest.raises(InputError, match="anna: diverged"):
        invert(space, pipe, photos[:1], names=["anna"], steps=30, lr=1e38, progress=False)


def test_a_prompt_without_the_spaces_own_is_warned_of(space, pipe, photos):
    told = copy.copy(space)
    told.meta = {"prompt": "sks person"}
    options = {"steps": 1, "progress": False}
    with pytest.warns(UserWarning, match="'a man' has no 'sks person'"):
        invert(told, pipe, photos[:1], prompt="a man", **options)
    invert(told, pipe, photos[:1], prompt="Photo of SKS person, smiling", **options)


def test_a_space_of_another_model_is_refused(pipe, photos):
    with pytest.raises(InputError, match="module"):
        invert(demo.space(), pipe, photos[:1], progress=False)


def test_the_masks_ellipse():
    mask = centre_mask(64)
    assert mask.shape == (1, 1, 64, 64) and mask.min() >= 0 and mask.max() <= 1
    assert mask[0, 0, 30, 32] > 0.99 and mask[0, 0, 0].max() < 0.2 and mask[0, 0, :, 0].max() < 0.01
    assert 0.3 < mask.mean() < 0.5


# --- the report -----------------------------------------------------------------------------------


def test_a_report(space, pipe, photos, tmp_path):
    told = copy.copy(space)
    told.meta = {"generate": {"steps": 2, "guidance": 2.0}}
    folder = tmp_path / "report"
    masks = torch.ones(3, 1, SIZE, SIZE)
    masks[:, :, :4] = 0
    found = invert(
        told, pipe, photos[:3], masks=masks, people=[0, 1, 0], names=["a<b>", "bert"], steps=7,
        report=folder, progress=False,
    )  # fmt: skip
    about = json.loads((folder / "report.json").read_text())["people"]
    assert [person["name"] for person in about] == ["a<b>", "bert"]
    assert [person["photos"] for person in about] == [2, 1]
    for person, z in zip(about, z_of(space, found), strict=True):
        assert person["distance"] == pytest.approx(float(z.norm()), rel=1e-4)
        assert len(person["curve"]) == 7 and person["curve"][0][0] == 0.5
        assert person["loss"] == pytest.approx(person["curve"][-1][1], rel=1e-5)
        for key in ("pictures", "loss_curve"):
            Image.open(folder / person[key]).verify()
    page = (folder / "report.html").read_text()
    assert "a&lt;b&gt;" in page and "a<b>" not in page
    with pytest.raises(InputError, match="empty folder"):
        invert(told, pipe, photos[:1], report=folder, progress=False)


def test_curves_of_many_steps_are_short_and_keep_the_mean(space, pipe):
    job = inversion(space, pipe, 1, recipe=Recipe(steps=250, lr=1e-12, prior=0.0))
    seen = []
    job.callback = lambda about: seen.append(float(about["loss"][0]))
    (fact,) = job.find()[1]
    assert len(fact["curve"]) == 200 and fact["curve"][0] == (1.0, pytest.approx(sum(seen[:2]) / 2))
    assert fact["curve"][-1] == (249.5, pytest.approx(seen[-1]))


def test_copies_are_told_from_strangers(space):
    copied = space.mu + 0.5 * (space.coefficients[3] - space.mu)  # the prior shortens
    mean = space.mu + 1e-3 * (sample(space, 1, seed=5)[0] - space.mu)
    a, b = whereabouts(space, torch.stack([copied, mean]))
    names = space.names or [f"row {i}" for i in range(space.n)]
    assert a["copy"] and a["nearest"][0] == (names[3], pytest.approx(1.0, abs=1e-4))
    assert not b["copy"] and b["farther"] == 1.0
    bare = copy.copy(space)
    bare.coefficients = None
    assert set(whereabouts(bare, copied[None])[0]) == {"distance", "rms"}


def test_a_stranger_to_the_world_lands_inside_the_population():
    """A real photograph, of a kind that the drawn world has never seen."""
    from w2w_fast.demo.run import portrait

    picture = portrait()
    if picture is None:
        pytest.skip("scikit-image, whose portrait this takes, is not installed")
    space, pipe = demo.space(), demo.pipeline()
    photo = fitted(picture, 64)[None]
    settings = space.meta["invert"] | {"steps": 30, "lr": 0.12, "progress": False}
    found = invert(space, pipe, photo, masks=centre_mask(64), **settings)
    (about,) = whereabouts(space, found)
    assert about["farther"] > 0.05 and not about["copy"]
    assert about["rms"] > 0.1


def test_the_state_is_small(space, pipe, tmp_path):
    state = tmp_path / "state"
    inversion(space, pipe, 2, state=state).find()
    tensors, _ = read_tensors(state)
    assert {"done.0", "done.1", "extra.curve"} <= set(tensors)
    assert tensors["done.0"].shape == (space.m,)
