"""What `invert` found, told: a page, its pictures, and the same as JSON.

Two questions about each person, see `whereabouts`: is it one that the population could hold, and is
it more than a copy of somebody in it?
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..files import atomic_dir, write_json
from ..pictures import contact_sheet, curve
from ..sources import Subject
from ..space import WeightSpace
from ..whereabouts import whereabouts
from .generate import generate

_PICTURES = 2  # generated of each person


def write_report(
    folder: Path,
    space: WeightSpace,
    pipe: Any,
    people: Sequence[Subject],
    found: Tensor,
    facts: Sequence[dict[str, Any]],
) -> None:
    """Make `folder`: report.html, report.json and two PNGs a person, whole or not at all.

    found: c [k, m]; facts: what `Inversion.find` tells of each. Pictures are generated as the space
    says (meta "generate"), with each person's first prompt. InputError if the folder is not empty.
    """
    own = space.meta.get("generate", {})
    settings = {key: own[key] for key in ("steps", "guidance", "identity_guidance") if key in own}
    rows = torch.arange(len(found)).repeat_interleave(_PICTURES)
    prompts = [people[i].prompts[0] for i in rows.tolist()]
    seeds = list(range(_PICTURES)) * len(found)
    made = generate(space, pipe, found[rows], prompts, seeds=seeds, progress=False, **settings)
    told = [{**fact, **where} for fact, where in zip(facts, whereabouts(space, found), strict=True)]
    with atomic_dir(folder) as temporary:
        sections = []
        for i, (person, about) in enumerate(zip(people, told, strict=True)):
            about["pictures"], about["loss_curve"] = f"{i:04d}.png", f"{i:04d}-loss.png"
            mine = made[i * _PICTURES : (i + 1) * _PICTURES]
            _sheet(person, mine).save(temporary / about["pictures"])
            curve(temporary / about["loss_curve"], about["curve"], ("step", "loss"))
            sections.append(_section(about))
        write_json(temporary / "report.json", {"people": told})
        page = _PAGE.format(body="\n".join(sections), n=space.n, m=space.m)
        (temporary / "report.html").write_text(page, encoding="utf-8")


def _sheet(person: Subject, made: Sequence[Image.Image]) -> Image.Image:
    """Each photo, what the mask leaves of it, and the generated pictures, a row a photo."""
    pictures, labels = [], []
    for i, photo in enumerate(person.images):
        pictures.append(_image(photo))
        labels.append("photo")
        if person.masks is not None:
            mask = person.masks[i].float().cpu()
            pictures.append(_image((photo.cpu() * mask + 255 * (1 - mask)).to(torch.uint8)))
            labels.append("what counts of it")
    pictures += made
    labels += ["generated"] * len(made)
    return contact_sheet(pictures, len(pictures) if len(person.images) == 1 else 4, labels)


def _image(photo: Tensor) -> Image.Image:
    return Image.fromarray(photo.permute(1, 2, 0).contiguous().cpu().numpy())


def _section(about: dict[str, Any]) -> str:
    loss = f"{about['steps']} steps on {about['photos']} photo(s), loss {about['loss']:.4f}"
    far = f"Mahalanobis distance {about['distance']:.2f}, {about['rms']:.2f} sd a component"
    lines = [loss, far]
    if "nearest" in about:
        lines[1] += f"; {about['farther']:.0%} of the population lie farther out"
        near = ", ".join(f"{name} ({cosine:.2f})" for name, cosine in about["nearest"])
        lines.append(f"nearest people, by the cosine of their coefficients: {near}")
        lines.append(
            "perhaps a copy of the nearest: closer to it than 99% of the population are to anybody"
            if about["copy"]
            else f"no copy: {about['closer']:.0%} of the population are closer to somebody"
        )
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return (
        f'<h2>{html.escape(about["name"])}</h2><img src="{about["pictures"]}" alt="pictures">'
        f'<ul>{items}</ul><img src="{about["loss_curve"]}" alt="loss">'
    )


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>w2w invert</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em }}
img {{ max-width: 100%; display: block }}
</style>
<h1>Found in weight space</h1>
<p>A space of {m} components; coefficients of {n} people are held in it.</p>
{body}
</html>
"""
