"""The pictures of docs/embed.md, from the world that ships: `python -m w2w_fast.demo.style docs`.

Two people blended, and people in a style that is another LoRA's. The style is trained here, by
what `populate` trains people with: photographs of many strangers, all redrawn in pencil. What they
have in common is no person, it is the style.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..files import atomic_path
from ..formats import export
from ..layout import Layout
from ..pictures import contact_sheet
from ..recipe import Recipe
from ..sources import Subject
from ..space import WeightSpace
from ..training import train
from ..verbs.generate import generate
from ..verbs.sample import sample
from . import pipeline, render, space

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
RECIPE = Recipe(steps=400, lr=0.005, eps=1e-4, average=0.3, prior=0.0, seed=7)
STRANGERS = 48
PARTS = (0.0, 0.25, 0.5, 0.75, 1.0)
WEIGHTS = (0.0, 0.5, 1.0)
PROMPTS = (
    "sks person, blue background, looking ahead",
    "sks person, at the beach, looking left",
    "sks person, in the forest, looking right",
    "sks person, white background, looking ahead",
)


def pencil(photos: Tensor) -> Tensor:
    """Photographs uint8 [n, 3, h, w] as drawings: dark lines where it is darker than around."""
    grey = (photos.float() / 255 * torch.tensor([0.3, 0.6, 0.1]).view(3, 1, 1)).sum(1, keepdim=True)
    around = torch.nn.functional.pad(grey, (2, 2, 2, 2), mode="replicate")
    lines = 6 * (torch.nn.functional.avg_pool2d(around, 5, 1) - grey)
    dark = (lines.clamp(0, 1) + 0.35 * (0.5 - grey).clamp(0, 1)).clamp(0, 1)
    paper, ink = (torch.tensor(rgb).view(3, 1, 1) for rgb in ((244, 238, 222), (40, 40, 60)))
    return (paper + (ink - paper) * dark).round().to(torch.uint8)


def style_lora(pipe, path: Path, recipe: Recipe = RECIPE) -> Path:
    """Train the pencil style, of rank 2 on all attentions, and write it as a kohya file."""
    generator = torch.Generator().manual_seed(40)
    strangers = render.people(STRANGERS, generator)
    conditions = render.conditions(STRANGERS, generator)
    drawings = pencil(render.render(strangers, conditions))
    captions = tuple(render.caption(condition) for condition in conditions)
    layout = Layout.discover(pipe.unet, TARGETS, rank=2, alpha=16.0)
    w = train(pipe, layout, [Subject("pencil", drawings, captions, None)], recipe)
    return export(layout, w, path)


def blended(world: WeightSpace, pipe) -> Image.Image:
    """Two rows, each from one person to another; prompt and seed stay the same."""
    people = sample(world, 4, seed=11, factor=1.3)
    rows = [torch.lerp(a, b, part) for a, b in people.view(2, 2, -1) for part in PARTS]
    images = generate(
        world, pipe, torch.stack(rows), PROMPTS[0], seeds=[5] * len(rows), progress=False,
        **world.meta["generate"],
    )  # fmt: skip
    labels = [f"{1 - part:.0%} + {part:.0%}" for part in PARTS] * 2
    return contact_sheet(images, len(PARTS), labels)


def styled(world: WeightSpace, pipe, style: Path) -> Image.Image:
    """Four people, each in a place; a row for each weight of the style."""
    people = sample(world, len(PROMPTS), seed=3)
    images = []
    pipe.load_lora_weights(style, adapter_name="style")
    for weight in WEIGHTS:
        pipe.set_adapters(["style"], [weight])
        images += generate(
            world, pipe, people, list(PROMPTS), seeds=1, progress=False, **world.meta["generate"]
        )
    pipe.unload_lora_weights()
    labels = [f"style {weight:g}" for weight in WEIGHTS for _ in PROMPTS]
    return contact_sheet(images, len(PROMPTS), labels)


def main(out: Path) -> None:
    world, pipe = space(), pipeline()
    with tempfile.TemporaryDirectory() as folder:
        style = style_lora(pipe, Path(folder, "pencil.safetensors"))
        sheets = {"embed-blend.png": blended(world, pipe)}
        sheets["embed-style.png"] = styled(world, pipe, style)
    for name, sheet in sheets.items():
        with atomic_path(out / name) as path:
            sheet.save(path, "PNG", optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="A folder for embed-blend.png and embed-style.png.")
    main(parser.parse_args().out)
