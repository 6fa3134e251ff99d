"""A tiny random Stable Diffusion pipeline with a tokenizer, a space on its attentions, people."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from w2w_fast import Layout, WeightSpace
from w2w_fast.demo import base
from w2w_fast.population import begin, finish, write_shard

SIZE = 16
ATTRIBUTES = ["beard", "age", "glasses"]


def make_pipe(folder: Path) -> StableDiffusionPipeline:
    """16 px pictures, 8 x 8 latents, random weights; its tokenizer's files go to `folder`."""
    tokenizer = base.make_tokenizer(folder)
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIZE,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=base.MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=SIZE // 2,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    pipe = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=DDIMScheduler(
            prediction_type="v_prediction",
            clip_sample=False,
            timestep_spacing="trailing",
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_space(layout: Layout, meta: dict | None = None) -> WeightSpace:
    """40 people around one adapter, 6 components, three correlated attributes."""
    generator = torch.Generator().manual_seed(3)
    start = 0.3 * torch.randn(layout.size, generator=generator)
    factors = torch.randn(40, 8, generator=generator)
    loadings = torch.randn(8, layout.size, generator=generator)
    noise = torch.randn(40, layout.size, generator=generator)
    w = start + 0.1 * (factors @ loadings) + 0.02 * noise
    age = factors[:, 1] + 0.5 * factors[:, 0]
    labels = torch.stack([(factors[:, 0] > 0).float(), age, (factors[:, 2] > 0).float()], 1)
    return WeightSpace.from_population(
        w, layout, 6, labels=labels, attributes=ATTRIBUTES, dtype=torch.float32, meta=meta
    )


def photographs(n: int, seed: int = 0) -> torch.Tensor:
    """n smooth random pictures, uint8 [n, 3, 16, 16]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 4, 4, generator=generator) * 255
    return torch.nn.functional.interpolate(coarse, (SIZE, SIZE), mode="bilinear").to(torch.uint8)


def as_array(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), dtype=np.int16)


def distance(a, b) -> int:
    """The greatest difference of two lists of images, in 1/255."""
    assert len(a) == len(b)
    return max(int(np.abs(as_array(x) - as_array(y)).max()) for x, y in zip(a, b, strict=True))


def population(layout: Layout, n: int = 12, seed: int = 5) -> torch.Tensor:
    """w [n, d]: people around one adapter."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(layout.size, generator=generator)
    return start + 0.1 * torch.randn(n, layout.size, generator=generator)


def write_population(
    folder: Path, w: torch.Tensor, layout: Layout, batch: int = 5, who: str = "person"
) -> list[str]:
    """A finished population's folder, written without `populate`; the names, person-00 ..."""
    names = [f"{who}-{i:02d}" for i in range(len(w))]
    begin(folder, layout, {"verb": "test"})
    parts = w.split(batch)
    for i, part in enumerate(parts):
        write_shard(folder, i, part, names[i * batch : i * batch + len(part)])
    people = [
        {"name": name, "shard": i // batch, "row": i % batch, "reason": ""}
        for i, name in enumerate(names)
    ]
    finish(folder, len(parts), people)
    return names


def tree(folder: Path) -> dict[str, str]:
    """Name -> sha256 of every file below."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
