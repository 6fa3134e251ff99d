"""Fixtures shared by all tests: small and large random diffusion models, poisoned memory."""

from __future__ import annotations

import os

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

TINY_UNET = {
    "sample_size": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
}
SD15_UNET = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}


if "PYTEST_XDIST_WORKER" in os.environ:
    # Threads that wait for each other at every small op would halve what two processes gain.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def tiny_unet() -> UNet2DConditionModel:
    """A UNet of SD1.5's kind: 16 and 32 channels, 24 text features, 8 x 8 latents, float32."""
    torch.manual_seed(0)
    return UNet2DConditionModel(**TINY_UNET).eval().requires_grad_(False)


@pytest.fixture
def tiny_pipe(tiny_unet) -> StableDiffusionPipeline:
    """A StableDiffusionPipeline around tiny_unet that takes prompt_embeds (it has no tokenizer)."""
    torch.manual_seed(1)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    pipe = StableDiffusionPipeline(
        vae=vae.eval().requires_grad_(False),
        text_encoder=None,
        tokenizer=None,
        unet=tiny_unet,
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def sd15_unet() -> UNet2DConditionModel:
    """A UNet of SD1.5's size (860 M parameters, 3.4 GB) with random weights, float32.

    Shared by the session: leave it as it was. A test that asks for it should be marked slow.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD15_UNET)
    unet.to_empty(device="cpu")
    # Weights are windows on one pool of random numbers: drawing 860 M of them takes a minute.
    pool = torch.randn(1 << 25, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for i, (name, weight) in enumerate(unet.named_parameters()):
            if weight.ndim == 1:
                weight.fill_(1.0 if name.endswith("weight") else 0.0)
            else:
                start = 7919 * i % (pool.numel() - weight.numel() + 1)
                window = pool[start : start + weight.numel()].view_as(weight)
                torch.mul(window, weight[0].numel() ** -0.5, out=weight)
    return unet.eval().requires_grad_(False)


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that torch hands out uninitialised reads as NaN: a result left unwritten shows."""

    def poison(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            if tensor.is_floating_point() and not tensor.is_meta:
                with torch.no_grad():
                    tensor.fill_(torch.nan)
            return tensor

        return made

    for owner, name in [
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ]:
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
