"""`invert`: people do not influence one another, masks, prior, the paper's settings, refusals."""

from __future__ import annotations

import pytest
import torch
from tiny_pipes import make_pixart, make_xl
from tiny_world import SIZE, make_space, photographs

from w2w_fast import InputError, Layout, attach, invert, sample
from w2w_fast.denoise import Photos, denoiser, encode_images, encode_prompts, losses, shrink_masks
from w2w_fast.verbs.invert import PAPER

OPTIONS = {"steps": 5, "progress": False}


def z_of(space, c):
    return (c - space.mu) / space.sigma


def mean_loss(space, pipe, photo, c, mask=None, draws=64):
    """The objective at c on fixed noise and timesteps."""
    generator = torch.Generator().manual_seed(99)
    latents = encode_images(pipe, photo)
    masks = None if mask is None else shrink_masks(mask, latents)
    one = Photos(latents, encode_prompts(pipe, ["sks person"]), masks)
    t = torch.randint(0, 1000, (draws,), generator=generator)
    noise = torch.randn(draws, *latents.shape[1:], generator=generator)
    rows = torch.zeros(draws, dtype=torch.long)
    with torch.no_grad(), attach(pipe.unet, space, identities=c.expand(draws, -1)):
        return float(losses(pipe, one.take(rows), noise, t).mean())


def test_three_together_are_three_alone(space, pipe, photos):
    together = invert(space, pipe, photos[:3], prior=0.1, average=0.5, **OPTIONS)
    assert together.shape == (3, space.m) and together.dtype == torch.float32
    for i in range(3):
        alone = invert(space, pipe, photos[i : i + 1], prior=0.1, average=0.5, **OPTIONS)
        assert (z_of(space, alone[0]) - z_of(space, together[i])).abs().max() < 1e-3
    assert (z_of(space, together[0]) - z_of(space, together[1])).abs().max() > 0.02
    split = invert(space, pipe, photos[:3], prior=0.1, average=0.5, batch=2, **OPTIONS)
    assert (z_of(space, split) - z_of(space, together)).abs().max() < 1e-3


@pytest.mark.parametrize("paper", [False, True])
def test_the_loss_goes_down(space, pipe, photos, paper):
    settings = {**PAPER, "steps": 60} if paper else {"steps": 60, "average": 0.5}
    found = invert(space, pipe, photos[:1], progress=False, **settings)
    start = mean_loss(space, pipe, photos[:1], space.mu[None])
    assert mean_loss(space, pipe, photos[:1], found) < 0.999 * start


def test_the_papers_settings_move_raw_coefficients(space, pipe, photos):
    """Adam's first step is lr in every coefficient, whatever its spread in the population."""
    assert (PAPER["steps"], PAPER["lr"], PAPER["weight_decay"]) == (400, 0.1, 1e-10)
    step = invert(space, pipe, photos[:1], **{**PAPER, "steps": 1}, progress=False)
    assert torch.allclose((step - space.mu).abs(), torch.full_like(step, 0.1), atol=1e-3)
    white = invert(space, pipe, photos[:1], steps=1, lr=0.1, progress=False)
    assert torch.allclose(z_of(space, white).abs(), torch.full_like(white, 0.1), atol=1e-3)


def test_the_prior_pulls_towards_the_mean(space, pipe, photos):
    sizes = [
        float(
            z_of(space, invert(space, pipe, photos[:2], prior=p, steps=25, progress=False)).norm()
        )
        for p in (0.0, 0.3, 30.0)
    ]
    assert sizes[0] > 1.05 * sizes[1] > 1.05**2 * sizes[2]


def test_a_mask_weighs_the_error(space, pipe, photos):
    """By hand: mean of (mask / mean mask) * error^2 over latents."""
    mask = torch.zeros(1, 1, SIZE, SIZE)
    mask[..., : SIZE // 4] = 1
    latents = encode_images(pipe, photos[:1])
    photo = Photos(latents, encode_prompts(pipe, ["sks person"]), shrink_masks(mask, latents))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([400])
    with torch.no_grad():
        got = losses(pipe, photo, noise, t)
        noisy = pipe.scheduler.add_noise(latents, noise, t)
        error = pipe.unet(noisy, t, photo.text).sample - pipe.scheduler.get_velocity(
            latents, noise, t
        )
    assert got[0] == pytest.approx(float(error[..., : SIZE // 8].square().mean()), rel=1e-5)


def test_masks_change_the_answer_and_a_full_one_does_not(space, pipe, photos):
    plain = invert(space, pipe, photos[:2], **OPTIONS)
    full = invert(space, pipe, photos[:2], masks=torch.ones(2, 1, SIZE, SIZE), **OPTIONS)
    assert (z_of(space, full) - z_of(space, plain)).abs().max() < 1e-4
    half = torch.ones(2, 1, SIZE, SIZE)
    half[0, :, SIZE // 2 :] = 0
    masked = invert(space, pipe, photos[:2], masks=half, **OPTIONS)
    assert (z_of(space, masked[1]) - z_of(space, plain[1])).abs().max() < 1e-3
    assert (z_of(space, masked[0]) - z_of(space, plain[0])).abs().max() > 1e-2


def test_several_photos_of_a_person(space, pipe, photos):
    people = [0, 1, 0]
    both = invert(space, pipe, photos[:3], people=people, steps=8, progress=False)
    assert both.shape == (2, space.m)
    alone = invert(space, pipe, photos[1:2], steps=8, progress=False)
    assert (z_of(space, both[1]) - z_of(space, alone[0])).abs().max() < 1e-3
    for i in (0, 2):  # neither of the two photos alone
        one = invert(space, pipe, photos[i : i + 1], steps=8, progress=False)
        assert (z_of(space, both[0]) - z_of(space, one[0])).abs().max() > 1e-3
    pair = photos[[0, 2]]
    together = invert(space, pipe, pair, people=[0, 0], steps=8, progress=False)
    assert (z_of(space, both[0]) - z_of(space, together[0])).abs().max() < 3e-4


def test_start_seed_and_callback(space, pipe, photos):
    start = sample(space, 1, seed=8)
    still = invert(space, pipe, photos[:1], start=start, lr=1e-12, **OPTIONS)
    assert torch.allclose(still, start, atol=1e-5)
    seen = []
    found = invert(space, pipe, photos[:1], seed=1, callback=seen.append, **OPTIONS)
    assert [x["steps"] for x in seen] == [[i + 1] for i in range(5)]
    assert seen[0]["loss"].shape == (1,) and seen[0]["people"] == [0]
    assert torch.allclose(seen[-1]["coefficients"], found)
    assert not torch.equal(found, invert(space, pipe, photos[:1], seed=2, **OPTIONS))


def test_the_pipeline_is_left_as_it_was(space, pipe, photos):
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    flags = [p.requires_grad for p in pipe.unet.parameters()]
    invert(space, pipe, photos[:1], **OPTIONS)
    assert all(torch.equal(v, before[k]) for k, v in pipe.unet.state_dict().items())
    assert [p.requires_grad for p in pipe.unet.parameters()] == flags


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 10**6}, "steps"),
        ({"steps": 0}, "steps"),
        ({"lr": float("nan")}, "lr"),
        ({"lr": -1.0}, "lr"),
        ({"prior": -1.0}, "prior"),
        ({"average": 1.0}, "average"),
        ({"batch": 0}, "batch"),
        ({"seed": -1}, "seed"),
        ({"timesteps": "late"}, "timesteps"),
        ({"prompt": "x" * 10_001}, "10,000"),
        ({"prompt": ["a"]}, "prompt"),
        ({"people": [0]}, "people"),
        ({"people": [0, 2]}, "people"),
        ({"people": [-1, 0]}, "people"),
        ({"masks": torch.ones(1, 1, SIZE, SIZE)}, "masks"),
        ({"masks": torch.ones(2, 1, SIZE, 2 * SIZE)}, "the photos' size"),
        ({"names": ["anna"]}, "names"),
        ({"check": 6}, "check"),
        ({"memory": 1000}, "memory"),
        ({"masks": torch.zeros(2, 1, SIZE, SIZE)}, "empty"),
        ({"masks": torch.full((2, 1, SIZE, SIZE), 255.0)}, r"\[0, 1\]"),
        ({"start": torch.zeros(2, 1)}, "start"),
        ({"start": torch.full((2, 6), float("nan"))}, "start"),
    ],
)
def test_refusals(space, pipe, options, said):
    with pytest.raises(InputError, match=said):
        invert(space, pipe, photographs(2), **{**OPTIONS, **options})


def test_refuses_photos_of_another_kind(space, pipe):
    one = photographs(1)
    kinds = (one.float(), one[0], one[:, :1], one.numpy(), [one[0]])
    empty = (photographs(0), one[..., :0])
    uneven = (one[..., :1], one[..., 1:, :])  # two pixels a latent here
    for bad in (*kinds, *empty, *uneven):
        with pytest.raises(InputError, match="^photos: wanted"):
            invert(space, pipe, bad, **OPTIONS)
    with pytest.raises(InputError, match="^masks: wanted"):
        invert(space, pipe, one, masks=torch.ones(1, 1, SIZE, SIZE).numpy(), **OPTIONS)


def test_refuses_pipelines_that_people_are_not_trained_on(pipe, tmp_path, monkeypatch):
    """SDXL and DiTs take people, but have no training here; said before anything is encoded."""
    for other in (make_xl(tmp_path), make_pixart()):
        space = make_space(Layout.discover(denoiser(other), alpha=8.0))
        with pytest.raises(InputError, match=f"^pipe: wanted .* got a {type(other).__name__}"):
            invert(space, other, photographs(1), **OPTIONS)
    space = make_space(Layout.discover(pipe.unet, alpha=8.0))
    inpainting = type(pipe.unet).from_config({**pipe.unet.config, "in_channels": 9})
    monkeypatch.setattr(pipe, "unet", inpainting)
    with pytest.raises(InputError, match="^pipe: wanted a UNet of 4 channels, .* got 9: .*inpaint"):
        invert(space, pipe, photographs(1), **OPTIONS)
