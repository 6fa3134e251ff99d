"""The denoising objective, with everything that does not change from step to step computed once.

    loss = mean( mask * (target - model(z_t, t, text))^2 ),   z_t = a_t z + s_t noise

(w2w paper, sections 3.1 and 3.4; the target is the noise, or the velocity for v-prediction
models). `populate` and `invert` differ only in what they optimise.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import InputError

MOST_CHARACTERS = 10_000


def check_prompts(prompts: Sequence[str]) -> None:
    """InputError unless all are texts of at most 10,000 characters; tokenizers are slow on more."""
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise InputError(f"prompt: wanted text, got {prompt!r}")
        if len(prompt) > MOST_CHARACTERS:
            raise InputError(
                f"prompt: wanted at most {MOST_CHARACTERS:,} characters, got {len(prompt):,}"
            )


def warn_of_prompts(own: object, prompts: Sequence[str], stacklevel: int = 3) -> None:
    """Warn, once, of prompts without the one that a space's people were trained with."""
    odd = [text for text in prompts if isinstance(own, str) and own.lower() not in text.lower()]
    if odd:
        warnings.warn(
            f"prompt: {odd[0]!r} has no {own!r} in it, which this space's people were trained "
            "with: they may not answer to it",
            stacklevel=stacklevel,
        )


def check_seed(seed: int) -> None:
    """InputError unless it is a whole number that a torch.Generator takes."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise InputError(f"seed: wanted a whole number from 0 to 2**63 - 1, got {seed!r}")


@dataclass(frozen=True)
class Photos:
    """Encoded photographs: latents [p, c, h, w] f32, text states [p, s, e], masks [p, 1, h, w]."""

    latents: Tensor
    text: Tensor
    masks: Tensor | None = None

    def __len__(self) -> int:
        return self.latents.shape[0]

    def take(self, index: Tensor) -> Photos:
        """Rows `index` (int64 [b]) of every part."""
        masks = None if self.masks is None else self.masks[index]
        return Photos(self.latents[index], self.text[index], masks)

    @classmethod
    def joined(cls, parts: Sequence[Photos]) -> Photos:
        """One batch of several, with masks all or none of them."""
        masks = [part.masks for part in parts if part.masks is not None]
        return cls(
            torch.cat([part.latents for part in parts]),
            torch.cat([part.text for part in parts]),
            torch.cat(masks) if masks else None,
        )


def device_of(pipe) -> torch.device:
    """Where the pipeline's denoiser lives."""
    return next(denoiser(pipe).parameters()).device


def denoiser(pipe) -> torch.nn.Module:
    """The pipeline's UNet or, for a DiT, its transformer."""
    model = getattr(pipe, "unet", None)
    if model is None:
        model = getattr(pipe, "transformer", None)
    if model is None:
        raise InputError(f"pipe: wanted a pipeline with a unet or transformer, got {type(pipe)}")
    return model


def check_trains(pipe) -> None:
    """InputError unless `losses` can be computed with the pipeline: see `encode_prompts`."""
    unet = getattr(pipe, "unet", None)
    several = getattr(pipe, "text_encoder_2", None) is not None
    if unet is None or several or getattr(pipe, "text_encoder", None) is None:
        raise InputError(
            "pipe: wanted a Stable Diffusion 1 or 2 pipeline, a UNet that reads one text encoder, "
            f"to train or invert with; got a {type(pipe).__name__}"
        )
    wanted, got = pipe.vae.config.latent_channels, unet.config.in_channels
    if got != wanted:
        raise InputError(
            f"pipe: wanted a UNet of {wanted} channels, as the VAE's latents have, got {got}: one "
            "for inpainting or editing? Its plain base is what people are trained on"
        )


@contextmanager
def frozen(*modules: torch.nn.Module | None) -> Iterator[None]:
    """Evaluation mode and no gradient for any weight inside; both restored after."""
    present = [module for module in modules if module is not None]
    modes = [(m, m.training) for module in present for m in module.modules()]
    wanted = [(p, p.requires_grad) for module in present for p in module.parameters()]
    try:
        for module in present:
            module.eval().requires_grad_(False)
        yield
    finally:
        for m, training in modes:
            m.training = training
        for p, requires_grad in wanted:
            p.requires_grad_(requires_grad)


@torch.no_grad()
def encode_images(pipe, images: Tensor, batch: int = 32) -> Tensor:
    """uint8 [p, 3, h, w] to scaled latents (the mode of the posterior), f32 [p, c, h', w']."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        shape = tuple(images.shape)
        raise InputError(f"images: wanted uint8 [p, 3, h, w], got {images.dtype} {shape}")
    vae, config = pipe.vae, pipe.vae.config
    parts = []
    for part in images.split(batch):
        x = part.to(vae.device, vae.dtype).div_(127.5).sub_(1)
        parts.append(vae.encode(x).latent_dist.mode().float())
    latents = torch.cat(parts)
    shift = getattr(config, "shift_factor", None) or 0.0
    return ((latents - shift) * config.scaling_factor).to(device_of(pipe))


@torch.no_grad()
def encode_prompts(pipe, prompts: Sequence[str]) -> Tensor:
    """Text states [p, s, e] of a pipeline with one CLIP text encoder (Stable Diffusion 1 and 2)."""
    check_prompts(prompts)
    distinct = sorted(set(prompts))
    states, _ = pipe.encode_prompt(distinct, device_of(pipe), 1, False)
    where = {prompt: i for i, prompt in enumerate(distinct)}
    return states[[where[prompt] for prompt in prompts]].to(denoiser(pipe).dtype)


def check_masks(masks: Tensor, photos: int) -> None:
    """InputError unless masks are [photos, 1, h, w] in [0, 1] and none is empty."""
    if not isinstance(masks, Tensor) or masks.ndim != 4 or masks.shape[:2] != (photos, 1):
        got = list(masks.shape) if isinstance(masks, Tensor) else type(masks).__name__
        raise InputError(f"masks: wanted [{photos}, 1, h, w], got {got}")
    if not (torch.isfinite(masks).all() and masks.min() >= 0 and masks.max() <= 1):
        raise InputError("masks: wanted numbers in [0, 1]")
    if not bool((masks > 0).flatten(1).any(1).all()):
        raise InputError("masks: a mask is empty, nothing of that photo would be used")


def centre_mask(size: int) -> Tensor:
    """A soft ellipse where the head of a portrait mostly is, f32 [1, 1, size, size] in [0, 1].

    It knows nothing of the picture: a mask that was drawn, or made by a segmenter, is better.
    """
    y, x = ((torch.arange(size) + 0.5) / size - centre for centre in (0.47, 0.5))
    radius = ((y[:, None] / 0.42).square() + (x[None] / 0.32).square()).sqrt()
    return torch.sigmoid((1 - radius) / 0.06)[None, None]


def shrink_masks(masks: Tensor, latents: Tensor) -> Tensor:
    """Masks [p, 1, h, w] in [0, 1] at the size of the latents, each with mean one.

    With mean one a masked loss has the scale of an unmasked one, whatever the mask's area.
    """
    check_masks(masks, latents.shape[0])
    small = F.interpolate(masks.float(), latents.shape[-2:], mode="area").to(latents.device)
    mean = small.mean(dim=(1, 2, 3), keepdim=True)
    return small / mean


@contextmanager
def checkpointed(model: torch.nn.Module, wanted: bool = True) -> Iterator[None]:
    """Gradient checkpointing inside, if wanted: less memory, a third more work."""
    if not wanted or model.is_gradient_checkpointing:
        yield
        return
    model.enable_gradient_checkpointing()
    try:
        yield
    finally:
        model.disable_gradient_checkpointing()


def losses(
    pipe, photos: Photos, noise: Tensor, t: Tensor, *, bf16: bool = False, snr_gamma: float = 0.0
) -> Tensor:
    """The denoising loss of each row, f32 [b]; noise as the latents, t int64 [b].

    snr_gamma: weights a timestep by min(SNR, gamma) / SNR of the predicted noise (Hang et al.,
    2023, "Min-SNR weighting", eq. 7), which for v is min(SNR, gamma) / (SNR + 1); 0: by nothing.
    """
    scheduler, clean = pipe.scheduler, photos.latents
    model = denoiser(pipe)
    noisy = scheduler.add_noise(clean, noise, t).to(model.dtype)
    with torch.autocast(clean.device.type, torch.bfloat16, enabled=bf16):
        prediction = model(noisy, t, photos.text).sample.float()
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        target = noise
    elif kind == "v_prediction":
        target = scheduler.get_velocity(clean, noise, t)
    else:
        raise InputError(f"pipe.scheduler: prediction_type {kind!r} is not known here")
    error = (prediction - target).square()
    if photos.masks is not None:
        error = error * photos.masks
    loss = error.mean(dim=(1, 2, 3))
    if snr_gamma:
        a = scheduler.alphas_cumprod.to(t.device, torch.float32)[t]
        snr = a / (1 - a)
        loss = loss * snr.clamp(max=snr_gamma) / (snr if kind == "epsilon" else snr + 1)
    return loss


def draw_timesteps(n: int, train_steps: int, law: str, generator: torch.Generator) -> Tensor:
    """n timesteps, int64. "uniform" as in DreamBooth; "early" favours high noise, T (1 - u^2)."""
    u = torch.rand(n, generator=generator)
    if law == "early":
        u = 1 - u.square()
    elif law != "uniform":
        raise InputError(f"timesteps: wanted 'uniform' or 'early', got {law!r}")
    return (u * train_steps).long().clamp_(max=train_steps - 1)
