"""Training in batches: a row is what training alone makes of it, whoever comes and goes."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from tiny_world import SIZE, photographs

from w2w_fast import InputError
from w2w_fast.attach import attach
from w2w_fast.denoise import Photos, denoiser, encode_images, encode_prompts, losses
from w2w_fast.encoding import Encoded, Encoder
from w2w_fast.memory import largest_batch
from w2w_fast.sources import Subject
from w2w_fast.training import (
    Recipe,
    Training,
    adamw_,
    draw,
    initial_adapter,
    train,
)

RECIPE = Recipe(steps=4, lr=0.01, eps=1e-4, average=0.5, prior=0.0)


def person(i: int, photos: int = 2) -> Subject:
    prompts = ("sks person, at the beach", "sks person, at night", "sks person")[:photos]
    return Subject(f"person-{i}", photographs(photos, seed=100 + i), prompts)


@pytest.fixture(scope="module")
def class_photos(pipe):
    text = Encoder(pipe).text("person")
    latents = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return Encoded(latents, [text] * 5)


@pytest.fixture(scope="module")
def trained(pipe, layout):
    """Three people, of 2, 3 and 1 photos, in one batch."""
    subjects = [person(0), person(1, 3), person(2, 1)]
    return subjects, train(pipe, layout, subjects, RECIPE)


# --- the optimiser --------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_is_torchs_row_by_row(decay):
    """Rows that began at different times, against an optimiser each; large and tiny gradients."""
    recipe = Recipe(lr=0.01, eps=1e-8, weight_decay=decay)
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(3, 50, generator=generator)
    alone = [row.clone().requires_grad_() for row in w]
    adams = [torch.optim.AdamW([row], lr=0.01, eps=1e-8, weight_decay=decay) for row in alone]
    first, second = torch.zeros_like(w), torch.zeros_like(w)
    late = torch.tensor([0, 3, 17])
    for tick in range(40):
        grad = torch.randn(3, 50, generator=generator) * torch.tensor([1.0, 1e4, 1e-6])[:, None]
        here = [i for i in range(3) if tick >= late[i]]
        for i in here:
            alone[i].grad = grad[i].clone()
            adams[i].step()
        steps = (tick + 1 - late[here])[:, None].double()
        parts = [t[here] for t in (w, grad, first, second)]
        adamw_(*parts, steps, recipe, torch.ones(50))
        for t, part in zip((w, grad, first, second), parts, strict=True):
            t[here] = part
    want = torch.stack([row.detach() for row in alone])
    assert (w - want).abs().max() < 2e-6 * want.abs().max()


def test_adamw_leaves_alone_what_is_not_trained():
    recipe, trained = Recipe(lr=0.1, weight_decay=0.5), torch.tensor([1.0, 0.0])
    w, moments = torch.ones(1, 2), [torch.zeros(1, 2), torch.zeros(1, 2)]
    adamw_(w, torch.ones(1, 2), *moments, torch.ones(1, 1).double(), recipe, trained)
    assert w[0, 1] == 1 and w[0, 0] < 0.9


# --- common random numbers ------------------------------------------------------------------------


def test_draws_depend_on_seed_step_and_purpose_alone():
    one = draw(RECIPE, 3, 1000, (4, 8, 8), "photo")
    again = draw(dataclasses.replace(RECIPE, steps=9), 3, 1000, (4, 8, 8), "photo")
    assert torch.equal(one.noise, again.noise) and one.t == again.t and one.which == again.which
    others = [
        draw(RECIPE, 4, 1000, (4, 8, 8), "photo"),
        draw(RECIPE, 3, 1000, (4, 8, 8), "class"),
        draw(dataclasses.replace(RECIPE, seed=1), 3, 1000, (4, 8, 8), "photo"),
    ]
    for other in others:
        assert abs(float((one.noise * other.noise).mean())) < 0.3
    many = [draw(RECIPE, s, 1000, (1,), "photo") for s in range(2000)]
    values = torch.tensor([float(d.noise) for d in many])
    assert abs(values.mean()) < 0.08 and abs(values.std() - 1) < 0.06
    t, which = (torch.tensor([float(getattr(d, n)) for d in many]) for n in ("t", "which"))
    assert abs(t.mean() - 500) < 25 and abs(which.mean() - 0.5) < 0.03
    assert abs(float(torch.corrcoef(torch.stack([values[1:], values[:-1]]))[0, 1])) < 0.07


# --- rows -----------------------------------------------------------------------------------------


def test_row_i_of_a_batch_is_training_i_alone(pipe, layout, trained):
    subjects, together = trained
    start = initial_adapter(layout, RECIPE.seed)
    assert together.shape == (3, layout.size) and together.dtype == torch.float32
    for i, subject in enumerate(subjects):
        alone = train(pipe, layout, [subject], RECIPE)
        assert (alone[0] - together[i]).abs().max() < 1e-4
        assert (together[i] - start).abs().max() > 5e-3  # about steps x lr, so it was trained
    for i, j in ((0, 1), (1, 2), (0, 2)):
        assert (together[i] - together[j]).abs().max() > 1e-3


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_who_is_finished_leaves_and_the_next_one_enters(pipe, layout, trained, batch):
    subjects, together = trained
    w = train(pipe, layout, subjects, RECIPE, batch=batch)
    assert (w - together).abs().max() < 1e-4


def test_a_plain_loop_gives_the_same(pipe, layout):
    """Without any of the machinery: one person, torch's own AdamW, the same random numbers."""
    subject, recipe = person(0), dataclasses.replace(RECIPE, weight_decay=0.1, average=0.0)
    latents, text = encode_images(pipe, subject.images), encode_prompts(pipe, subject.prompts)
    w = initial_adapter(layout)[None].requires_grad_()
    adam = torch.optim.AdamW([w], lr=recipe.lr, eps=recipe.eps, weight_decay=0.1)
    denoiser(pipe).requires_grad_(False)
    with attach(denoiser(pipe), layout) as live:
        live.adapters = w
        for step in range(recipe.steps):
            d = draw(recipe, step, 1000, latents.shape[1:], "photo")
            i = int(d.which * 2)
            photo = Photos(latents[i : i + 1], text[i : i + 1])
            adam.zero_grad()
            losses(pipe, photo, d.noise[None], d.t).sum().backward()
            adam.step()
    got = train(pipe, layout, [subject], recipe)
    assert (got - w.detach()).abs().max() < 1e-5


def test_random_numbers_are_common(pipe, layout):
    """Two people with the same photos end at the same adapter: nothing else differs."""
    twins = [person(0), dataclasses.replace(person(0), name="twin")]
    w = train(pipe, layout, twins, RECIPE, batch=1)
    assert torch.equal(w[0], w[1])


def test_one_step_is_adams(pipe, layout):
    """At the start B = 0, so A has no gradient and every number of B moves by lr."""
    w = train(pipe, layout, [person(0)], Recipe(steps=1, lr=0.01, eps=1e-12, prior=0.0))
    moved = w[0] - initial_adapter(layout)
    for a, b in layout.slices():
        assert not moved[a].any()
        assert torch.allclose(moved[b].abs(), torch.full_like(moved[b], 0.01), rtol=1e-3)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_training_b_leaves_a_untouched(pipe, layout, decay):
    start = torch.randn(layout.size, generator=torch.Generator().manual_seed(0))
    recipe = dataclasses.replace(RECIPE, train="B", weight_decay=decay)
    w = train(pipe, layout, [person(0)], recipe, start)
    free = train(pipe, layout, [person(0)], RECIPE, start)
    for a, b in layout.slices():
        assert torch.equal(w[0, a], start[a])
        assert not torch.equal(free[0, a], start[a])
        assert (w[0, b] != start[b]).all()


def test_no_gradient_of_frozen_weights(pipe, layout, trained):
    assert all(p.grad is None for p in denoiser(pipe).parameters())


def test_checkpointing_changes_memory_and_nothing_else(pipe, layout, trained):
    subjects, together = trained
    assert not denoiser(pipe).is_gradient_checkpointing
    w = train(pipe, layout, subjects, RECIPE, checkpointing=True)
    assert not denoiser(pipe).is_gradient_checkpointing
    assert (w - together).abs().max() < 1e-5

    def measured(checkpointing):
        return lambda k: Training(
            pipe, layout, subjects[:1] * k, RECIPE, initial_adapter(layout), batch=k,
            checkpointing=checkpointing,
        )  # fmt: skip

    room = 64 << 20
    plain, less = (largest_batch(measured(flag), room) for flag in (False, True))
    assert less > plain > 1


def test_the_batch_fits_itself_to_the_memory(pipe, layout):
    def training(k):
        return Training(pipe, layout, [person(0)] * k, RECIPE, initial_adapter(layout), batch=k)

    sizes = [largest_batch(training, room << 20) for room in (8, 16, 32)]
    assert sizes[0] < sizes[1] < sizes[2]
    assert sizes[2] - sizes[1] == pytest.approx(2 * (sizes[1] - sizes[0]), abs=2)
    assert largest_batch(training, 1 << 40, most=7) == 7
    with pytest.raises(InputError, match="one subject needs"):
        largest_batch(training, 1000)


# --- the loss -------------------------------------------------------------------------------------


def test_prior_preservation_adds_the_class_loss(pipe, layout, class_photos):
    """One step from a common start: the update is that of the sum of the two losses."""
    recipe = dataclasses.replace(RECIPE, steps=3, prior=0.7, average=0.0)
    with pytest.raises(InputError, match="class_photos"):
        train(pipe, layout, [person(0)], recipe)
    got = train(pipe, layout, [person(0), person(1)], recipe, class_photos=class_photos)
    subject = person(0)
    latents, text = encode_images(pipe, subject.images), encode_prompts(pipe, subject.prompts)
    w = initial_adapter(layout)[None].requires_grad_()
    adam = torch.optim.AdamW([w], lr=recipe.lr, eps=recipe.eps, weight_decay=0)
    denoiser(pipe).requires_grad_(False)
    with attach(denoiser(pipe), layout) as live:
        live.adapters = w
        for step in range(recipe.steps):
            adam.zero_grad()
            for what, photos, weight in (
                ("photo", Photos(latents, text), 1.0),
                ("class", Photos(class_photos.latents, torch.stack(class_photos.text)), 0.7),
            ):
                d = draw(recipe, step, 1000, latents.shape[1:], what)
                row = photos.take(torch.tensor([int(d.which * len(photos))]))
                (weight * losses(pipe, row, d.noise[None], d.t)).sum().backward()
            adam.step()
    assert (got[0] - w.detach()).abs().max() < 1e-5
    without = train(pipe, layout, [person(0)], dataclasses.replace(recipe, prior=0.0))
    assert (got[0] - without).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_snr_weights(pipe, kind, monkeypatch):
    config = {**pipe.scheduler.config, "prediction_type": kind}
    monkeypatch.setattr(pipe, "scheduler", type(pipe.scheduler).from_config(config))
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    photos = Photos(latents, encode_prompts(pipe, ["sks person"] * 3))
    t, noise = torch.tensor([1, 400, 990]), torch.randn_like(latents)
    with torch.no_grad():
        plain = losses(pipe, photos, noise, t)
        weighted = losses(pipe, photos, noise, t, snr_gamma=5.0)
    a = pipe.scheduler.alphas_cumprod[t]
    snr = a / (1 - a)
    want = torch.minimum(snr, torch.tensor(5.0)) / (snr if kind == "epsilon" else snr + 1)
    assert torch.allclose(weighted / plain, want, rtol=1e-5)


def head(photos: int) -> torch.Tensor:
    mask = torch.full((photos, 1, SIZE, SIZE), 0.1)
    mask[..., SIZE // 4 : SIZE // 2, SIZE // 4 : SIZE // 2] = 1
    return mask


def test_masks_say_which_pixels_count(pipe, layout, trained):
    subjects, plain = trained
    masked = [dataclasses.replace(s, masks=head(len(s.prompts))) for s in subjects]
    assert (train(pipe, layout, masked, RECIPE) - plain).abs().max() > 1e-3
    even = [dataclasses.replace(s, masks=torch.ones_like(head(len(s.prompts)))) for s in subjects]
    assert (train(pipe, layout, even, RECIPE) - plain).abs().max() < 1e-4
    # Those without a mask beside those with one are trained as they would be alone.
    mixed = train(pipe, layout, [subjects[0], masked[1]], RECIPE)
    assert (mixed[0] - plain[0]).abs().max() < 1e-4


# --- early stopping -------------------------------------------------------------------------------


def test_early_stopping_looks_at_a_photo_that_is_not_trained_on(pipe, layout):
    """Photo 3 is held out: with it or without, training until the end gives the same."""
    three = person(1, 3)
    two = dataclasses.replace(three, images=three.images[:2], prompts=three.prompts[:2])
    recipe = dataclasses.replace(RECIPE, check=1, patience=1000)
    watched, plain = (train(pipe, layout, [s], r) for s, r in ((three, recipe), (two, RECIPE)))
    assert (watched - plain).abs().max() < 1e-5


def test_early_stopping_ends_a_row_and_lets_the_next_one_in(pipe, layout):
    recipe = dataclasses.replace(RECIPE, steps=12, lr=0.3, check=1, patience=1, average=0.0)
    subjects = [person(i, 3) for i in range(4)]
    w, facts = Training(pipe, layout, subjects, recipe, initial_adapter(layout), batch=2).run()
    steps = [fact["steps"] for fact in facts]
    assert len(w) == 4 and min(steps) < 12 and len(set(steps)) > 1
    for i, subject in enumerate(subjects):
        _, (alone,) = Training(pipe, layout, [subject], recipe, initial_adapter(layout)).run()
        assert alone["steps"] == steps[i]
        short = dataclasses.replace(recipe, steps=steps[i], check=min(1, steps[i]))
        again = train(pipe, layout, [subject], short)
        # On average: steps of .3 magnify the rounding of numbers with next to no gradient.
        assert (again[0] - w[i]).abs().mean() < 2e-3


def test_early_stopping_needs_a_photo_to_hold_out(pipe, layout):
    recipe = dataclasses.replace(RECIPE, check=2)
    subjects = [person(0, 1), person(1, 2)]
    w, facts = Training(pipe, layout, subjects, recipe, initial_adapter(layout)).run()
    assert len(w) == 1 and "one photo" in facts[0]["reason"] and facts[1]["reason"] == ""


# --- the state ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 3, 5, 9])
def test_a_training_goes_on_from_its_state_with_the_same_bits(pipe, layout, tmp_path, stop):
    recipe = dataclasses.replace(RECIPE, steps=6, check=2, patience=1, lr=0.1)
    subjects = [person(i, 2 + i % 2) for i in range(5)]

    def training(**options):
        return Training(pipe, layout, subjects, recipe, initial_adapter(layout), batch=2, **options)

    whole, facts = training().run()
    state = tmp_path / "state.safetensors"
    killed = training(state=state, save_every=0.0)
    step = killed._step

    def until(*_):
        if killed.tick == stop:
            raise KeyboardInterrupt
        step()

    killed._step = until
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    assert state.exists()
    resumed = training(state=state)
    assert resumed.tick == stop
    w, again = resumed.run()
    assert torch.equal(w, whole) and again == facts


def test_who_diverges_is_set_aside(pipe, layout, trained, monkeypatch):
    """One row becomes NaN in the middle of a batch: the others are what they would have been."""
    subjects, together = trained
    poison = Encoder(pipe)

    def encoder(subject):
        encoded = poison(subject)
        bad = subject.name == "person-1"
        return Encoded(encoded.latents * (math.nan if bad else 1), encoded.text, encoded.masks)

    start = initial_adapter(layout)
    w, facts = Training(pipe, layout, subjects, RECIPE, start, encoder=encoder).run()
    assert (w - together[[0, 2]]).abs().max() < 1e-4
    assert [bool(fact["reason"]) for fact in facts] == [False, True, False]
    assert "not finite" in facts[1]["reason"]
    with pytest.raises(InputError, match="person-1: diverged"):
        train(pipe, layout, subjects, RECIPE, encoder=encoder)


def test_photographs_of_another_size_are_set_aside(pipe, layout, trained):
    subjects, together = trained
    large = photographs(2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    odd = Subject("odd", large, ("sks person",) * 2)
    start = initial_adapter(layout)
    w, facts = Training(pipe, layout, [subjects[0], odd], RECIPE, start).run()
    assert (w[0] - together[0]).abs().max() < 1e-4 and "another size" in facts[1]["reason"]


# --- encoding -------------------------------------------------------------------------------------


def test_encoded_photographs_are_kept_and_never_stale(pipe, tmp_path, monkeypatch):
    import w2w_fast.encoding as module

    calls = []
    for name in ("encode_images", "encode_prompts"):
        plain = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, plain=plain, **k: calls.append(plain) or plain(*a, **k)
        )
    first = Encoder(pipe, tmp_path)(person(0))
    assert len(calls) == 3  # the photos, two prompts
    again = Encoder(pipe, tmp_path)(person(0))
    assert len(calls) == 3 and torch.equal(first.latents, again.latents)
    assert all(torch.equal(a, b) for a, b in zip(first.text, again.text, strict=True))
    damaged = next(tmp_path.glob("latents-*"))
    damaged.write_bytes(damaged.read_bytes()[:-5])
    assert torch.equal(Encoder(pipe, tmp_path)(person(0)).latents, first.latents)
    weight = next(pipe.vae.parameters())
    with torch.no_grad():
        weight.mul_(1.5)
        other = Encoder(pipe, tmp_path)(person(0))  # another VAE: not what is kept
        weight.div_(1.5)
    assert not torch.equal(other.latents, first.latents)
    texts = first.text + Encoder(pipe, tmp_path)(person(1)).text
    assert all(a is not b for a, b in pairwise(texts))


def test_equal_prompts_share_a_state(pipe):
    encoder = Encoder(pipe)
    one, two = encoder(person(0)), encoder(person(1, 3))
    assert one.text[0] is two.text[0] and one.text[1] is two.text[1]


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 0},
        {"steps": 10**6},
        {"lr": float("nan")},
        {"lr": 0.0},
        {"eps": -1.0},
        {"weight_decay": -0.1},
        {"train": "A"},
        {"timesteps": "late"},
        {"average": 1.0},
        {"prior": -1.0},
        {"class_images": 0},
        {"snr_gamma": float("inf")},
        {"check": 801},
        {"patience": 0},
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
    for bad, message in (
        (head(3), r"wanted \[2, 1, h, w\]"),
        (2 * head(2), r"in \[0, 1\]"),
        (0 * head(2), "empty"),
    ):
        with pytest.raises(InputError, match=message):
            dataclasses.replace(person(0), masks=bad)
