"""Pipelines of every kind that people are embedded in, each with the way it is called."""

from __future__ import annotations

import copy
from pathlib import Path

import awkward
import torch
from diffusers import (
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from PIL import Image
from tiny_pipes import (
    WIDTH,
    add_ip_adapter,
    make_cogview4,
    make_controlnet,
    make_pixart,
    make_sd3,
    make_xl,
)
from tiny_world import make_pipe, photographs
from unet_inputs import adapters, state_hash

from w2w_fast import Layout
from w2w_fast.testing import assert_close

PROMPTS = ["sks person, at the beach", "sks person", "sks person, at night"]
PICTURE = Image.fromarray(photographs(1)[0].permute(1, 2, 0).numpy())
MASK = Image.fromarray((photographs(1, seed=1)[0, 0] > 128).numpy())
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_v_proj")


def make_bases(folder: Path) -> dict:
    """One pipeline of each architecture; `make_case` copies them."""
    return {
        "sd": make_pipe(folder / "sd"),
        "xl": make_xl(folder / "xl"),
        "sd3": make_sd3(folder / "sd3"),
        "pixart": make_pixart(),
        "cogview4": make_cogview4(),
    }


class Case:
    """A pipeline and how it is called: ``draw(people, ...)`` gives latents [k, 4, 8, 8]."""

    def __init__(self, pipe, options=None, embeds=None):
        self.pipe, self.options, self.embeds = pipe, options or {}, embeds
        self.model = getattr(pipe, "unet", None) or pipe.transformer
        pipe.set_progress_bar_config(disable=True)

    def draw(self, people, each=1, guidance=3.0, **more):
        """Prompt, noise and embeddings i belong to person i, whoever else is in the batch."""
        if self.embeds is None:
            text = {"prompt": [PROMPTS[i] for i in people]}
        else:
            text = {name: t[people] for name, t in self.embeds.items()}
        options = {"num_inference_steps": 2, "output_type": "latent", **self.options, **more}
        for name, value in options.items():
            if isinstance(value, list):  # a picture a row: one for all uses the first row's noise
                options[name] = value * len(people) * each
            elif isinstance(value, torch.Tensor):  # IP-Adapter's [without, with]
                options[name] = [value.repeat_interleave(len(people), 0)]
        return self.pipe(
            **text,
            guidance_scale=guidance,
            num_images_per_prompt=each,
            generator=[torch.Generator().manual_seed(i) for i in people for _ in range(each)],
            **options,
        ).images


def embeds(mask):
    names = ["prompt_embeds", "negative_prompt_embeds"]
    made = {name: awkward.normal(3, 6, WIDTH, seed=i) for i, name in enumerate(names)}
    masks = ["prompt_attention_mask", "negative_prompt_attention_mask"] if mask else []
    return made | {name: torch.ones(3, 6) for name in masks}


KINDS = [
    "text", "img2img", "inpaint", "controlnet", "ip-adapter", "xl", "xl-img2img", "sd3", "pixart",
    "cogview4",
]  # fmt: skip


def make_case(kind, bases):
    """A copy of what a kind of pipeline is made of, ready to draw."""
    base = {"xl-img2img": "xl"}.get(kind, kind if kind in bases else "sd")
    pipe = copy.deepcopy(bases[base])
    if kind == "img2img":
        options = {"image": [PICTURE], "strength": 1.0}
        return Case(StableDiffusionImg2ImgPipeline.from_pipe(pipe), options)
    if kind == "inpaint":
        options = {"image": [PICTURE], "mask_image": [MASK], "height": 16, "width": 16}
        return Case(StableDiffusionInpaintPipeline.from_pipe(pipe), options)
    if kind == "controlnet":
        net = make_controlnet(pipe.unet)
        return Case(
            StableDiffusionControlNetPipeline.from_pipe(pipe, controlnet=net), {"image": PICTURE}
        )
    if kind == "ip-adapter":
        add_ip_adapter(pipe.unet)
        face = awkward.normal(2, 1, 12, seed=7)  # without, with
        return Case(pipe, {"ip_adapter_image_embeds": face})
    if kind == "xl-img2img":
        options = {"image": [PICTURE], "strength": 1.0}
        return Case(StableDiffusionXLImg2ImgPipeline.from_pipe(pipe), options)
    if kind in ("pixart", "cogview4"):
        size = {"height": 16, "width": 16, **({"prompt": None} if kind == "cogview4" else {})}
        if kind == "pixart":
            size |= {"use_resolution_binning": False, "negative_prompt": None}
        return Case(pipe, size, embeds(mask=kind == "pixart"))
    return Case(pipe)


def hung_on(model):
    """The hooks and the attributes of all modules."""
    return [
        (name, type(m), sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks))
        for name, m in model.named_modules()
    ]


def trace(model):
    """Everything that attaching could leave behind."""
    return state_hash(model), hung_on(model)


def near(name, got, want, part=2e-4):
    """Batches of other sizes sum in other orders, and two steps amplify it."""
    assert_close(name, got, want, part * float(want.abs().max()))


def style_lora(unet):
    """A LoRA that somebody else trained, of more modules and another rank, in diffusers' keys."""
    layout = Layout.discover(unet, ("to_q", "to_k", "to_v", "to_out.0"), rank=3, alpha=3.0)
    parts = layout.split(adapters(layout, 1, seed=8)[0])
    return {
        f"unet.{name}.lora_{letter}.weight": tensor.clone()
        for name, pair in parts.items()
        for letter, tensor in zip("AB", pair, strict=True)
    }
