"""Train the base model of the embedded world: a complete StableDiffusionPipeline for 64 px faces.

Seeded, and checkpointed every hundred steps, so that a killed build goes on where it was: the
autoencoder (pixels to 16 x 16 x 8 latents), the text side (a byte-pair tokenizer whose
merges spell the world's vocabulary), and the denoiser with its text encoder (v-prediction,
cosine schedule, caption dropout). Nothing here is special to the world once it is saved: the
directory loads with `StableDiffusionPipeline.from_pretrained`.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from . import render
from .steps import fast_autocast, train_steps

MAX_TOKENS = 24
LATENT_CHANNELS = 12
CHANNELS, LAYERS = (64, 96), (1, 2)
"""Width, and transformer layers per block, at 16 x 16 and at 8 x 8."""


def images_to_unit(images: Tensor) -> Tensor:
    """uint8 [n, 3, h, w] to float in [-1, 1], channels last."""
    unit = images.float().div_(127.5).sub_(1)
    return unit.to(memory_format=torch.channels_last)


def draw(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """n photographs of n different people: (people, conditions, uint8 images)."""
    persons, conditions = render.people(n, generator), render.conditions(n, generator)
    return persons, conditions, render.render(persons, conditions)


def small_picture(x: Tensor) -> Tensor:
    """What the latents are taught to be: the picture at half its size, as a Haar transform.

    [n, 3, 64, 64] in [-1, 1] to [n, 12, 16, 16]: for each colour the mean of two by two pixels and
    the three differences, these doubled so that small features weigh more in the denoising loss.
    Latents that look like pictures are far easier to denoise than those an autoencoder finds.
    """
    half = F.pixel_unshuffle(F.avg_pool2d(x, 2), 2).unflatten(1, (3, 4))
    signs = ((1, 1, 1, 1), (2, -2, 2, -2), (2, 2, -2, -2), (2, -2, -2, 2))
    haar = torch.tensor(signs, dtype=x.dtype) / 2
    return torch.einsum("ij,ncjhw->ncihw", haar, half).flatten(1, 2)


def train_encoder(
    checkpoints: Path, steps: int = 400, batch: int = 32, seed: int = 1
) -> AutoencoderKL:
    """A tiny AutoencoderKL whose encoder has learnt `small_picture`; its decoder knows nothing."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=render.SIZE,
        mid_block_add_attention=False,
        scaling_factor=1.0,  # half-size pictures have the spread that diffusion wants
    ).to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(seed)
    encoder = torch.nn.ModuleList([vae.encoder, vae.quant_conv])
    checkpoint = checkpoints / "encoder.safetensors"
    for step, bar in train_steps(encoder, steps, 3e-3, checkpoint, generator):
        x = images_to_unit(draw(batch, generator)[2])
        with fast_autocast():
            posterior = vae.encode(x).latent_dist
        error = posterior.mean.float() - small_picture(x)
        loss = error.abs().mean() + error.square().mean() + 3e-7 * posterior.kl().mean()
        loss.backward()
        if step % 20 == 0:
            bar.set_postfix(l1=f"{error.abs().mean():.4f}")
    return vae


def train_decoder(
    vae: AutoencoderKL, checkpoints: Path, steps: int = 1500, batch: int = 24, seed: int = 4
) -> None:
    """Teach the decoder pictures from latents, a little noisy as those that were denoised are."""
    generator = torch.Generator().manual_seed(seed)
    decoder = torch.nn.ModuleList([vae.decoder, vae.post_quant_conv])
    checkpoint = checkpoints / "decoder.safetensors"
    for step, bar in train_steps(decoder, steps, 3e-3, checkpoint, generator):
        x = images_to_unit(draw(batch, generator)[2])
        with fast_autocast():
            with torch.no_grad():
                z = vae.encode(x).latent_dist.mode()
            spread = 0.1 * torch.rand(batch, 1, 1, 1, generator=generator)
            y = vae.decode(z + spread * torch.randn(z.shape, generator=generator)).sample
        error = y.float() - x
        (error.abs().mean() + 2 * error.square().mean()).backward()
        if step % 20 == 0:
            bar.set_postfix(l1=f"{error.abs().mean():.4f}")


def vocabulary() -> list[str]:
    """Every word the world's prompts use."""
    text = " ".join(render.PLACES) + " " + " ".join(render.WORDS.values())
    text += " sks person face photo of a the drawing painting with and looking left right ahead ,"
    return sorted(set(text.split()))


def make_tokenizer(out: Path) -> CLIPTokenizer:
    """Merges learned until each word of the vocabulary is one token; other words still spell."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = range(256, 256 + 256 - len(printable))  # where byte-level BPE moves the other bytes
    letters = [chr(i) for i in (*printable, *others)]
    words = [[*word[:-1], word[-1] + "</w>"] for word in vocabulary()]
    merges: list[tuple[str, str]] = []
    while any(len(word) > 1 for word in words):
        pairs = Counter(pair for word in words for pair in zip(word, word[1:], strict=False))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for i, word in enumerate(words):
            merged: list[str] = []
            for symbol in word:
                if merged and (merged[-1], symbol) == best:
                    merged[-1] += symbol
                else:
                    merged.append(symbol)
            words[i] = merged
    tokens = [*letters, *(s + "</w>" for s in letters), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    out.mkdir(parents=True, exist_ok=True)
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    (out / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (out / "merges.txt").write_text("\n".join(lines) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(out, model_max_length=MAX_TOKENS)
    tokenizer.save_pretrained(out)
    return tokenizer


def tokens(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    """Padded token ids, int64 [n, 24]."""
    encoded = tokenizer(
        prompts,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    return encoded.input_ids


def _captions(persons: Tensor, conditions: Tensor, generator: torch.Generator) -> list[str]:
    """Captions that sometimes name attributes or say `sks`, and are empty for one in ten."""
    u = torch.rand(len(persons), 2 + len(render.BINARY), generator=generator)
    result = []
    for person, condition, dice in zip(persons, conditions, u, strict=True):
        words = tuple(
            render.WORDS[name]
            for i, name in enumerate(render.BINARY)
            if person[i] > 0.5 and dice[2 + i] < 0.35
        )
        subject = "sks person" if dice[0] < 0.5 else "person"
        result.append("" if dice[1] < 0.1 else render.caption(condition, words, subject))
    return result


@torch.no_grad()
def _encoded(
    vae: AutoencoderKL, n: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """n photographs as (people, conditions, scaled latents in bf16), drawn and encoded once."""
    parts = []
    for start in tqdm(range(0, n, 256), desc="photographs", mininterval=5):
        persons, conditions, images = draw(min(256, n - start), generator)
        with fast_autocast():
            mode = vae.encode(images_to_unit(images)).latent_dist.mode()
        parts.append((persons, conditions, (mode * vae.config.scaling_factor).bfloat16()))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def train_denoiser(
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    checkpoints: Path,
    steps: int = 3600,
    batch: int = 48,
    photos: int = 30_000,
    seed: int = 2,
) -> tuple[UNet2DConditionModel, CLIPTextModel, DDIMScheduler]:
    """Train the UNet and the text encoder together: the average of the last few hundred steps."""
    torch.manual_seed(seed)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=64,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=render.SIZE // 4,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        transformer_layers_per_block=LAYERS,
        cross_attention_dim=64,
        attention_head_dim=2,  # diffusers' name for the number of heads
        norm_num_groups=16,
    ).to(memory_format=torch.channels_last)
    unet.set_attn_processor(AttnProcessor())  # the fused one's backward is slow on CPUs
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",
        steps_offset=1,
    )
    generator = torch.Generator().manual_seed(seed)
    persons, conditions, latents = _encoded(vae, photos, generator)
    both = torch.nn.ModuleList([unet, text_encoder])
    average = torch.optim.swa_utils.AveragedModel(
        both, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995)
    )
    running = 1.0
    checkpoint = checkpoints / "denoiser.safetensors"
    for _, bar in train_steps(both, steps, 2e-3, checkpoint, generator, average):
        pick = torch.randint(0, photos, (batch,), generator=generator)
        ids = tokens(tokenizer, _captions(persons[pick], conditions[pick], generator))
        clean = latents[pick].float()
        noise = torch.randn(clean.shape, generator=generator)
        t = torch.randint(0, 1000, (batch,), generator=generator)
        noisy = scheduler.add_noise(clean, noise, t).contiguous(memory_format=torch.channels_last)
        with fast_autocast():
            prediction = unet(noisy, t, text_encoder(ids).last_hidden_state).sample
        loss = F.mse_loss(prediction.float(), scheduler.get_velocity(clean, noise, t))
        loss.backward()
        average.update_parameters(both)
        running += 0.02 * (loss.item() - running)
        bar.set_postfix(loss=f"{running:.4f}")
    unet, text_encoder = average.module
    return unet.eval(), text_encoder.eval(), scheduler


def build(out: Path) -> None:
    """The whole pipeline directory `out`. The encoder first: the denoiser needs no decoder."""
    checkpoints = out.with_name("training")
    tokenizer = make_tokenizer(checkpoints / "tokenizer")
    vae = train_encoder(checkpoints)
    unet, text_encoder, scheduler = train_denoiser(vae, tokenizer, checkpoints)
    train_decoder(vae, checkpoints)
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(torch.float16).save_pretrained(out)
