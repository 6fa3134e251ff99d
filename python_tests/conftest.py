"""Fixtures shared by all tests: small and large random models, poisoned memory, `w2w`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from tiny_world import SIZE, make_pipe, make_space, photographs, population, write_population
from typer.testing import CliRunner

import w2w_fast as w2w
from w2w_fast.cli import app
from w2w_fast.files import write_tensors

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


# --- the command line ---------------------------------------------------------------------------


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A base, a space that names it, a population, photos, people and files that are none."""
    root = tmp_path_factory.mktemp("world")
    pipe = make_pipe(root / "tokenizer")
    pipe.save_pretrained(root / "base")
    layout = w2w.Layout.discover(pipe.unet, alpha=8.0)
    meta = {
        "base": str(root / "base"),
        "prompt": "sks person",
        "generate": {"steps": 2, "guidance": 2.0, "identity_guidance": True},
        "invert": {"steps": 3, "prior": 0.1},
    }
    space = make_space(layout, meta)
    space.save(root / "space")
    make_space(layout).save(root / "homeless")  # does not say which base
    space.cut(3).save(root / "narrow")
    make_space(layout, {**meta, "invert": {"steps": "many"}}).save(root / "odd")
    write_population(root / "population", population(layout), layout)
    w2w.write_coefficients(root / "people.safetensors", w2w.sample(space, 3, seed=1))
    w2w.write_coefficients(root / "narrow.safetensors", torch.zeros(2, 3))
    w2w.export(space, space.mu, root / "lora.safetensors")
    write_tensors(root / "nan.safetensors", {"coefficients": torch.full((1, 6), torch.nan)})
    for i, photo in enumerate(photographs(4)):
        folder = root / "photos" / f"person-{i // 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    (root / "nobody").mkdir()
    Image.new("L", (SIZE, SIZE), 255).save(root / "mask.png")
    Image.new("L", (SIZE, SIZE), 0).save(root / "black.png")
    (root / "text.txt").write_text("sks person, at the beach\n\nsks person, at night\n")
    (root / "long.txt").write_text("x" * 10_001)
    (root / "huge.txt").write_text("x" * 10_000_000)
    (root / "latin.txt").write_bytes("M\xfcller".encode("latin-1"))
    (root / "empty.txt").write_text("\n")
    (root / "junk.safetensors").write_bytes(b"not safetensors at all")
    (root / "pickle.pt").write_bytes(b"\x80\x04N.")
    (root / "labels.csv").write_text(
        "name,hat\n" + "".join(f"person-{i:02d},{i % 2}\n" for i in range(12))
    )
    (root / "few.csv").write_text("name,hat\nperson-00,1\n")
    broken = root / "broken"
    broken.mkdir()
    (broken / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    return root


@pytest.fixture
def run(world, tmp_path, monkeypatch):
    """Run `w2w` in an empty folder, `{}` in the arguments being the world."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("W2W_HOME", str(tmp_path / "no-home"))

    def run(line: str, code: int = 0):
        arguments = [part.replace("{}", str(world)).replace("~", " ") for part in line.split()]
        result = CliRunner().invoke(app, arguments)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        return result

    return run
