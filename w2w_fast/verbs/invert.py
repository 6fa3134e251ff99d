"""`invert`: find the person of a photograph in weight space (w2w paper, section 3.4).

    min over z of  E_{t, noise} [ masked denoising loss of the photo ] + prior * |z|^2 / 2
    c = mu + sigma * z

Only the coefficients are optimised: the photo is encoded once, the base is frozen, and many
people share a batch, each with an Adam state of its own. One photo leaves much open: the mask
takes the background out of the loss, and the Gaussian prior (the paper has neither a prior nor
whitening: `whiten=False, prior=0`) keeps the answer a plausible person instead of a copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..attach import attach
from ..denoise import (
    Photos,
    check_seed,
    denoiser,
    device_of,
    draw_timesteps,
    encode_images,
    encode_prompts,
    frozen,
    losses,
    shrink_masks,
)
from ..errors import InputError
from ..space import WeightSpace

PAPER = {
    "steps": 400,
    "lr": 0.1,
    "weight_decay": 1e-10,
    "prior": 0.0,
    "whiten": False,
    "timesteps": "uniform",
    "average": 0.0,
}
"""The published settings: `invert(space, pipe, photo, **PAPER)`."""


def invert(
    space: WeightSpace,
    pipe,
    photos: Tensor,
    *,
    masks: Tensor | None = None,
    people: Sequence[int] | None = None,
    prompt: str | Sequence[str] = "sks person",
    steps: int = 400,
    lr: float = 0.1,
    weight_decay: float = 1e-10,
    prior: float = 0.0,
    whiten: bool = True,
    timesteps: str = "uniform",
    average: float = 0.0,
    start: Tensor | None = None,
    seed: int = 0,
    batch: int = 64,
    callback: Callable[[dict], None] | None = None,
    progress: bool = True,
) -> Tensor:
    """The coefficients [k, m] f32 of the k people in the photographs.

    photos: uint8 [p, 3, h, w] at the pipeline's size. masks: [p, 1, h, w] in [0, 1], 1 on the face.
    people: who is on photo i, 0..k-1; by default everybody has one photo. At each step a photo of
        each person is drawn.
    prompt: the prompt of all photos, or of each.
    lr, weight_decay: Adam's. With `whiten` they act on z, without on c (the paper's setting).
    prior: weight of |z|^2 / 2, divided by m; 0 as in the paper.
    average: the share of the last steps whose iterates are averaged.
    start: coefficients [k, m] to start from; the population's mean (the paper: zeros) by default.
    callback: given {"step", "loss" [k], "coefficients" [k, m]} after each step.

    All people see the same noise and timesteps, and nobody's result depends on who else is in the
    batch. Raises InputError for shapes, masks and numbers that do not fit.
    """
    for name, value, low in (("lr", lr, 0), ("prior", prior, 0), ("weight_decay", weight_decay, 0)):
        if not math.isfinite(value) or value < low:
            raise InputError(f"{name}: wanted a finite number >= {low}, got {value!r}")
    if not 1 <= steps <= 100_000:
        raise InputError(f"steps: wanted 1 to 100,000, got {steps}")
    if not 1 <= batch <= 4096:
        raise InputError(f"batch: wanted 1 to 4096, got {batch}")
    check_seed(seed)
    if not 0 <= average < 1:
        raise InputError(f"average: wanted a share in [0, 1), got {average}")
    owner = torch.arange(len(photos)) if people is None else torch.as_tensor(people)
    if len(owner) != len(photos) or not len(photos):
        raise InputError(f"people: wanted one number for each of {len(photos)} photos (at least 1)")
    k = int(owner.max()) + 1
    if sorted(set(owner.tolist())) != list(range(k)):
        raise InputError("people: wanted every number from 0 to k - 1 to have a photo")
    prompts = [prompt] * len(photos) if isinstance(prompt, str) else list(prompt)
    if len(prompts) != len(photos):
        raise InputError(f"prompt: wanted one, or one for each of {len(photos)} photos")
    if start is not None and start.shape != (k, space.m):
        raise InputError(f"start: wanted [{k}, {space.m}], got {tuple(start.shape)}")
    if start is not None and not torch.isfinite(start).all():
        raise InputError("start: holds NaN or infinite numbers")
    space.layout.check(denoiser(pipe))

    latents = encode_images(pipe, photos)
    small = None if masks is None else shrink_masks(masks, latents)
    encoded = Photos(latents, encode_prompts(pipe, prompts), small)
    groups = torch.arange(k).split(batch)
    found = []
    with tqdm(total=k * steps, unit="step", desc="invert", disable=not progress) as bar:
        for group in groups:
            mine = [torch.nonzero(owner == i).flatten() for i in group.tolist()]
            found.append(
                _invert_batch(
                    space, pipe, encoded, mine, None if start is None else start[group],
                    steps, lr, weight_decay, prior, whiten, timesteps, average, seed, callback, bar,
                )
            )  # fmt: skip
    return torch.cat(found)


def _invert_batch(
    space, pipe, encoded, mine, start, steps, lr, weight_decay, prior, whiten, timesteps, average,
    seed, callback, bar,
) -> Tensor:  # fmt: skip
    """The people whose photos are the rows `mine` (a list of int64 [p_i]) of `encoded`."""
    device, k = device_of(pipe), len(mine)
    generator = torch.Generator().manual_seed(seed)
    mu, sigma = space.mu.float().to(device), space.sigma.float().to(device)
    origin, scale = (mu, sigma) if whiten else (torch.zeros_like(mu), torch.ones_like(sigma))
    first = mu.expand(k, -1) if start is None else start.to(device)
    # A component without spread has nothing to find: it stays where it is.
    z = torch.where(scale > 0, (first - origin) / scale.clamp_min(1e-12), 0).clone()
    z.requires_grad_()
    optimiser = torch.optim.Adam([z], lr=lr, weight_decay=weight_decay)
    keep_from = steps - max(1, round(average * steps))
    total = torch.zeros_like(z, dtype=torch.float64)
    shape = encoded.latents.shape[1:]
    counts = torch.tensor([len(rows) for rows in mine])
    model = denoiser(pipe)
    train_steps = pipe.scheduler.config.num_train_timesteps
    with frozen(model), attach(model, space) as live:
        for step in range(steps):
            t = draw_timesteps(1, train_steps, timesteps, generator).to(device)
            noise = torch.randn(1, *shape, generator=generator).to(device)
            u = (torch.rand(1, generator=generator) * counts).long().tolist()
            which = torch.stack([rows[i] for rows, i in zip(mine, u, strict=True)]).to(device)
            coefficients = origin + scale * z
            live.identities = coefficients
            photos = encoded.take(which)
            loss = losses(pipe, photos, noise.expand(k, *shape), t.expand(k))
            whitened = torch.where(sigma > 0, (coefficients - mu) / sigma.clamp_min(1e-12), 0)
            penalty = prior * whitened.square().mean(1) / 2
            optimiser.zero_grad(set_to_none=True)
            (loss + penalty).sum().backward()
            optimiser.step()
            now = z.detach()
            if step >= keep_from:
                total += now
            bar.update(k)
            if step % 10 == 0:
                bar.set_postfix(loss=f"{loss.detach().mean():.4f}")
            if callback is not None:
                found = origin + scale * now
                callback({"step": step, "loss": loss.detach(), "coefficients": found})
    z = (total / (steps - keep_from)).float()
    return origin + scale * z
