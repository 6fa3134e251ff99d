"""The rival of an edit in weight space: one adapter that moves everybody, trained on words alone.

    loss = | v_slider(z, t, "person") - (v("person") + eta * (v("person with X") - v("person"))) |^2

(Gandikota et al., 2023, "Concept Sliders", eq. 5, here for one positive prompt, in the layout and
rank of the space.) It is fused into the base, so that people are attached on top of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..attach import attach
from ..denoise import denoiser, device_of, encode_images, encode_prompts, frozen
from ..ops import merge
from ..training import initial_adapter
from .study import Study, draw

ETA = 3.0
BATCH = 16
DRAWS = 8
"""Noises that each picture is looked at under; the contrast of a batch is computed once."""


def train_slider(study: Study, words: str, seed: int) -> Tensor:
    """w [1, d] of a slider towards `words`, an adapter like a person's but nobody's."""
    pipe, space, model = study.pipe, study.space, denoiser(study.pipe)
    generator = study.generator(seed)
    nobody = torch.zeros(BATCH, space.d)
    texts = [t.format(who="person") for t in study.prompts(BATCH, seed)]
    clean = encode_images(pipe, draw(study, nobody, texts, range(seed, seed + BATCH)))
    plain, wished = encode_prompts(pipe, texts), encode_prompts(pipe, [
        t.format(who=f"person with {words}") for t in study.prompts(BATCH, seed)
    ])  # fmt: skip
    batches = []
    with torch.no_grad():
        for _ in range(DRAWS):
            t = torch.randint(0, pipe.scheduler.config.num_train_timesteps, (BATCH,),
                              generator=generator).to(clean.device)  # fmt: skip
            noise = torch.randn(clean.shape, generator=generator).to(clean)
            z = pipe.scheduler.add_noise(clean, noise, t).to(model.dtype)
            base = model(z, t, plain).sample
            batches.append((z, t, base + ETA * (model(z, t, wished).sample - base)))
    w = initial_adapter(space.layout, seed).to(device_of(pipe))[None].requires_grad_()
    optimiser = torch.optim.Adam([w], lr=0.005, eps=1e-4)
    with frozen(model), attach(model, space.layout, adapters=w) as live:
        for step in range(study.size.slider_steps):
            live.adapters = w
            z, t, target = batches[step % DRAWS]
            loss = (model(z, t, plain).sample - target).float().square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return w.detach()


@contextmanager
def fused(study: Study, w: Tensor, amount: float) -> Iterator[None]:
    """The base with `amount` of the adapter w [1, d] in its weights, put back exactly after."""
    layout = study.space.layout
    modules = layout.check(denoiser(study.pipe))
    weights = [module.weight.detach() for module in modules.values()]
    pristine = [weight.clone() for weight in weights]
    parts = list(layout.split(w[0].to(weights[0])).values())
    A, B = [a for a, _ in parts], [b for _, b in parts]
    try:
        merge(pristine, A, B, amount * layout.scale, weights)
        yield
    finally:
        for weight, before in zip(weights, pristine, strict=True):
            weight.copy_(before)
