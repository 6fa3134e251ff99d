"""Real pipelines of diffusers to load files into, and files made without the package."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file

from w2w_fast.layout import Layout


def _unet_inputs(unet: UNet2DConditionModel, batch: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "sample": torch.randn(batch, 4, 8, 8, generator=generator),
        "timestep": torch.tensor(300),
        "encoder_hidden_states": torch.randn(
            batch, 5, unet.config.cross_attention_dim, generator=generator
        ),
    }


@pytest.fixture
def big_pipe(sd15_unet) -> StableDiffusionPipeline:
    """A pipeline around a UNet of SD1.5's size; only the UNet matters to a LoRA of the UNet."""
    return StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=sd15_unet,
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture
def unet_inputs():
    """unet_inputs(unet, batch=1): the same random latents, timestep and text states each time."""
    return _unet_inputs


@pytest.fixture
def layouts(tiny_unet):
    """layouts(rank, alpha): the layout of to_q and to_v in the small UNet."""
    return lambda rank, alpha: Layout.discover(tiny_unet, rank=rank, alpha=alpha)


@pytest.fixture
def weights():
    """weights(layout): w [d] whose effect on a UNet's output is far above rounding."""

    def make(layout: Layout, seed: int = 1) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(layout.size, generator=generator) * 0.3

    return make


@pytest.fixture
def write_lora():
    """write_lora(spelling, path, modules, alpha=None, rslora=False): a LoRA file by other hands.

    modules: name -> (A, B), as stored. Returns (path to read, scale in front of B A).
    """
    return _write_lora


SUFFIXES = {
    "kohya": ("lora_unet_{flat}.lora_down.weight", "lora_unet_{flat}.lora_up.weight"),
    "diffusers": ("unet.{name}.lora_A.weight", "unet.{name}.lora_B.weight"),
    "diffusers-old": ("unet.{name}.lora.down.weight", "unet.{name}.lora.up.weight"),
    "diffusers-processor": (
        "unet.{block}.processor.{last}_lora.down.weight",
        "unet.{block}.processor.{last}_lora.up.weight",
    ),
    "peft": ("base_model.model.{name}.lora_A.weight", "base_model.model.{name}.lora_B.weight"),
}


def _write_lora(spelling, path: Path, modules, *, alpha=None, rslora=False):
    tensors, metadata = {}, None
    rank = next(iter(modules.values()))[0].shape[0]
    for name, pair in modules.items():
        block, _, last = name.rpartition(".")
        for suffix, tensor in zip(SUFFIXES[spelling], pair, strict=True):
            key = suffix.format(name=name, flat=name.replace(".", "_"), block=block, last=last)
            tensors[key] = tensor.contiguous()
        if spelling == "kohya" and alpha is not None:
            tensors[f"lora_unet_{name.replace('.', '_')}.alpha"] = torch.tensor(alpha)
    config = {"r": rank, "lora_alpha": rank if alpha is None else alpha, "use_rslora": rslora}
    config["target_modules"] = sorted(modules)
    if spelling == "diffusers" and alpha is not None:
        fields = {f"unet.{key}": value for key, value in config.items()}
        metadata = {"lora_adapter_metadata": json.dumps(fields)}
    if spelling == "peft":
        path.mkdir()
        config |= {"peft_type": "LORA", "bias": "none"}
        (path / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
    else:
        path = path.with_suffix(".safetensors")
        save_file(tensors, path, metadata)
    scale = 1.0 if alpha is None else alpha / (math.sqrt(rank) if rslora else rank)
    return path, scale
