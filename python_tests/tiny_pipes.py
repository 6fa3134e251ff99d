"""Tiny random pipelines of many kinds, for the tests that embed people in them.

All draw 16-pixel pictures from 8 x 8 latents of 4 channels and read prompts with one small CLIP
tokenizer; ``tiny_world.make_pipe`` makes the Stable Diffusion pipeline that others are made from.
"""

from __future__ import annotations

from pathlib import Path

import awkward
import torch
from diffusers import (
    AutoencoderKL,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    ControlNetModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from w2w_fast.demo import base

WIDTH = 16  # of every text encoder


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        shift_factor=0.0,
    ).eval()


def _text(tokenizer) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=base.MAX_TOKENS,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config).eval()


def _ready(pipe):
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_xl(folder: Path) -> StableDiffusionXLPipeline:
    """Two text encoders, pooled text and sizes beside the timestep."""
    tokenizer = base.make_tokenizer(folder)
    torch.manual_seed(2)
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=2 * WIDTH,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
    )
    return _ready(
        StableDiffusionXLPipeline(
            vae=_vae(),
            text_encoder=_text(tokenizer),
            text_encoder_2=_text(tokenizer),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            unet=unet,
            scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
            add_watermarker=False,
        )
    )


def make_sd3(folder: Path) -> StableDiffusion3Pipeline:
    """A DiT that joins picture and text tokens; its pipeline stacks both halves of guidance."""
    tokenizer = base.make_tokenizer(folder)
    torch.manual_seed(3)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=8,
    )
    return _ready(
        StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=_vae(),
            text_encoder=_text(tokenizer),
            tokenizer=tokenizer,
            text_encoder_2=_text(tokenizer),
            tokenizer_2=tokenizer,
            text_encoder_3=None,
            tokenizer_3=None,
        )
    )


def make_pixart() -> PixArtSigmaPipeline:
    """A DiT with cross-attention that takes prompt_embeds and does not tell whether it guides."""
    torch.manual_seed(4)
    transformer = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        out_channels=8,
    )
    return _ready(
        PixArtSigmaPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=_vae(),
            transformer=transformer,
            scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        )
    )


def make_cogview4() -> CogView4Pipeline:
    """A DiT whose pipeline calls it once for each half of guidance; takes prompt_embeds."""
    torch.manual_seed(5)
    transformer = CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=WIDTH,
        time_embed_dim=16,
        condition_dim=4,
        pos_embed_max_size=8,
        sample_size=8,
        rope_axes_dim=(16, 16),
    )
    return _ready(
        CogView4Pipeline(
            tokenizer=None,
            text_encoder=None,
            vae=_vae(),
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(),
        )
    )


def make_controlnet(unet: UNet2DConditionModel) -> ControlNetModel:
    """A ControlNet of this UNet whose zero convolutions have been trained, so to speak."""
    torch.manual_seed(6)
    # The picture is twice as wide as the latents: two widths, one step between.
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8))
    zero = ("controlnet_down_blocks", "controlnet_mid_block", "controlnet_cond_embedding.conv_out")
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if name.startswith(zero):
                weight.normal_(0, 0.1)
    return net.eval().requires_grad_(False)


def add_ip_adapter(unet: UNet2DConditionModel) -> None:
    """A random IP-Adapter, that reads image embeddings of 12 numbers."""
    width = unet.config.cross_attention_dim
    cross = {  # numbers count attn1 too, which gets no weights
        f"{2 * i + 1}.to_{letter}_ip.weight": awkward.normal(
            unet.get_submodule(name.removesuffix(".processor")).to_k.out_features, width, seed=i
        )
        / width**0.5
        for i, name in enumerate(n for n in unet.attn_processors if "attn2" in n)
        for letter in "kv"
    }
    projection = {
        "proj.weight": awkward.normal(4 * width, 12, seed=90),
        "proj.bias": torch.zeros(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": cross}])
