"""`w2w demo`: a weight space at work, in under a minute on two cores, told in one HTML page."""

from __future__ import annotations

import base64
import html
import importlib.util
import io
import json
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from .. import formats
from ..coefficients import write_coefficients
from ..errors import InputError
from ..files import atomic_dir, read_image
from ..pictures import contact_sheet
from ..sources import photo_tensor
from ..verbs.edit import edit
from ..verbs.generate import generate
from ..verbs.invert import invert
from ..verbs.sample import sample
from . import WORLD, figures, pipeline, reader, render, space
from .score import held_out_photos

SLIDERS = ("glasses", "hat", "skin", "long_hair")
AMOUNTS = (-3.0, -1.5, 0.0, 1.5, 3.0)
POSES = (
    "sks person, blue background, looking ahead",
    "sks person, at the beach, looking left",
    "sks person, in the forest, looking right",
)
HELD_OUT = 4


def drawing() -> Image.Image:
    """A pencil drawing of a bearded man with glasses, a kind of picture the world never saw."""
    image = Image.new("RGB", (256, 256), (244, 238, 222))
    pen = ImageDraw.Draw(image)
    ink = (60, 55, 60)
    pen.ellipse((72, 60, 184, 216), outline=ink, width=5)
    for x in range(78, 180, 7):
        edge = ((x - 128) / 56) ** 2
        pen.line((x, 172 + 6 * edge, x + 3, 214 - 50 * edge**2), fill=ink, width=4)
        pen.line((x, 64 + 36 * edge, x + 5, 52 + 40 * edge), fill=ink, width=5)
    for x in (104, 152):
        pen.ellipse((x - 20, 104, x + 20, 140), outline=ink, width=5)
        pen.ellipse((x - 5, 116, x + 5, 127), fill=ink)
    pen.line((124, 120, 132, 120), fill=ink, width=5)
    pen.line((128, 134, 122, 158, 132, 160), fill=ink, width=4)
    pen.arc((106, 158, 150, 186), 20, 160, fill=(150, 60, 60), width=6)
    pen.line((100, 214, 92, 254), fill=ink, width=4)
    pen.line((156, 214, 164, 254), fill=ink, width=4)
    return image


# The score takes 400 steps to invert and 16 to a picture; the whole demo is to take a minute. Of
# twelve held-out people 87% of the attributes were right after this inversion, and 88% of the
# score's 64 after its own.
QUICK = {"steps": 70, "lr": 0.12}
PICTURE_STEPS = 12


def portrait() -> Image.Image | None:
    """The public-domain portrait photograph that scikit-image ships, where that is installed."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "data" / "astronaut.png"
    # Head and shoulders, framed as the world's photographs are.
    return read_image(path).crop((112, 0, 336, 224)) if path.exists() else None


def _tensor(image: Image.Image) -> Tensor:
    data = io.BytesIO()
    image.save(data, "PNG")
    return photo_tensor(data.getvalue(), render.SIZE)


def _centre_mask() -> Tensor:
    """Where the head of a portrait is: an ellipse in the middle, float [1, 1, 64, 64]."""
    conditions = torch.zeros(1, len(render.CONDITIONS))
    conditions[:, render.CONDITIONS.index("zoom")] = 1.0
    return render.face_mask(torch.zeros(1, len(render.ATTRIBUTES)), conditions)


def run(out: Path, photo: Path | None = None, *, seed: int = 0, overwrite: bool = False) -> Path:
    """Make the demo's folder `out` and return the path of its report.html.

    photo: a portrait photograph to invert beside the others (PNG, JPEG or WebP).
    Raises InputError if `out` holds something already or the photo cannot be read.
    """
    began = time.perf_counter()
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise InputError(f"{out}: not empty; give another folder or --overwrite")
    real = portrait() if photo is None else read_image(photo)
    world, pipe, judge = space(), pipeline(), reader()
    settings = {**world.meta["generate"], "steps": PICTURE_STEPS, "batch": 32}
    with atomic_dir(out, overwrite=overwrite) as folder:
        sections = [_sampled(folder, world, pipe, judge, settings, seed)]
        sections.append(_edited(folder, world, pipe, settings, seed))
        sections.append(_inverted(folder, world, pipe, judge, settings, real))
        sections.append(_batch(folder, world, pipe, settings, seed))
        sections.append(_exported(folder, world, pipe, seed))
        sections.append(_figures())
        seconds = time.perf_counter() - began
        page = _PAGE.format(seconds=seconds, body="\n".join(sections), n=world.n, m=world.m)
        (folder / "report.html").write_text(page, encoding="utf-8")
    return out / "report.html"


def _sampled(folder, world, pipe, judge, settings, seed) -> str:
    people = sample(world, 16, seed=seed)
    write_coefficients(folder / "sampled.safetensors", people)
    images = generate(world, pipe, people, POSES[0], seeds=seed, **settings)
    said = [_says(row) for row in judge.read(images).binary]
    sheet = contact_sheet(images, 8)
    return _section(
        "Sixteen people who do not exist",
        "Coefficients drawn from the population's Gaussian, one adapter each, one batch.",
        _picture(folder, "sampled.png", sheet, "; ".join(said)),
    )


def _edited(folder, world, pipe, settings, seed) -> str:
    person = sample(world, 1, seed=seed + 7)
    rows = [edit(world, person, {name: amount}) for name in SLIDERS for amount in AMOUNTS]
    people = torch.cat(rows)
    write_coefficients(folder / "edited.safetensors", people)
    images = generate(world, pipe, people, POSES[0], seeds=[seed] * len(people), **settings)
    labels = [f"{name} {amount:+g}" for name in SLIDERS for amount in AMOUNTS]
    sheet = contact_sheet(images, len(AMOUNTS), labels)
    return _section(
        "One person along four sliders",
        "Amounts are standard deviations of the population along the slider; 0 is the person. "
        "Prompt and seed stay the same.",
        _picture(folder, "edited.png", sheet, "rows: " + ", ".join(SLIDERS)),
    )


def _inverted(folder, world, pipe, judge, settings, real) -> str:
    truth, photos, masks = held_out_photos(HELD_OUT)
    outside = [drawing()] + ([real] if real is not None else [])
    photos = torch.cat([photos, *(_tensor(image)[None] for image in outside)])
    masks = torch.cat([masks, *([_centre_mask()] * len(outside))])
    found = invert(world, pipe, photos, masks=masks, **{**world.meta["invert"], **QUICK})
    write_coefficients(folder / "inverted.safetensors", found)
    rows = torch.arange(len(found)).repeat_interleave(len(POSES))
    images = generate(world, pipe, found[rows], list(POSES) * len(found), seeds=100, **settings)
    names = [f"held out {i + 1}" for i in range(HELD_OUT)] + ["drawing", "portrait photo"]
    pictures, labels = [], []
    for i in range(len(found)):
        pictures.append(Image.fromarray(photos[i].permute(1, 2, 0).numpy()))
        pictures += images[3 * i : 3 * i + 3]
        labels += [f"{names[i]}: photo", "blue background", "beach, left", "forest, right"]
    sheet = contact_sheet(pictures, 4, labels)
    reading = judge.read(images).binary.view(len(found), 3, -1).mean(1)
    lines = ["<table><tr><th></th><th>true</th><th>read after inversion</th><th>right</th></tr>"]
    for i in range(HELD_OUT):
        known = truth[i, : len(render.BINARY)]
        share = ((reading[i] > 0.5) == (known > 0.5)).float().mean()
        cells = (names[i], _says(known), _says(reading[i]), f"{share:.0%}")
        lines.append("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in cells) + "</tr>")
    distance = ((found - world.mu) / world.sigma).square().mean(1).sqrt()
    far = ", ".join(f"{n} {d:.2f}" for n, d in zip(names, distance.tolist(), strict=False))
    lines.append(f"</table><p>Distance from the population's mean (rms sd): {far}.</p>")
    return _section(
        "One photo in, new pictures out",
        "Nobody here was in the population. Each photo was inverted into the space (masked loss, "
        "Gaussian prior) and generated again in other places and poses.",
        _picture(folder, "inverted.png", sheet, "left: the photo") + "".join(lines),
    )


def _batch(folder, world, pipe, settings, seed) -> str:
    people = sample(world, 32, seed=seed + 1)
    began = time.perf_counter()
    images = generate(world, pipe, people, POSES[1], seeds=500, **settings)
    seconds = time.perf_counter() - began
    return _section(
        "Thirty-two identities in one batch",
        f"Every row of the batch is another model of the same base: {seconds:.1f} s, "
        f"{32 / seconds:.1f} images a second on this machine.",
        _picture(folder, "batch.png", contact_sheet(images, 8), "at the beach, looking left"),
    )


def _exported(folder, world, pipe, seed) -> str:
    person = sample(world, 1, seed=seed)
    path = formats.export(world, person, folder / "person.safetensors", format="kohya")
    check = formats.verify(path, pipe, world.reconstruct(person), world.layout)
    return _section(
        "Out into the world",
        f"The first sampled person as a kohya LoRA file, <code>{path.name}</code>, loaded back by "
        f"diffusers' own loader: greatest difference of the UNet's output {check.max_error:.1e} "
        f"on outputs of size {check.scale:.2g}.",
        "",
    )


def _figures() -> str:
    path = WORLD / "score.json"
    if not path.exists():
        return ""
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for row in figures.rows(json.loads(path.read_text()))
    )
    return _section(
        "How good is this world?",
        "Measured when the world was built, by a reader trained on rendered photographs only, on "
        "pictures with fresh seeds.",
        f"<table><tr><th></th><th>measured</th><th>goal</th></tr>{body}</table>",
    )


def _says(probabilities: Tensor) -> str:
    words = [
        n.replace("_", " ") for n, p in zip(render.BINARY, probabilities, strict=True) if p > 0.5
    ]
    return ", ".join(words) or "none of them"


def _section(title: str, text: str, body: str) -> str:
    return f"<h2>{title}</h2><p>{text}</p>{body}"


def _picture(folder: Path, name: str, image: Image.Image, alt: str) -> str:
    data = io.BytesIO()
    image.save(data, "PNG")
    (folder / name).write_bytes(data.getvalue())
    code = base64.b64encode(data.getvalue()).decode()
    return f'<img src="data:image/png;base64,{code}" alt="{html.escape(alt)}">'


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>w2w_fast demo</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em }}
img {{ max-width: 100%; display: block }}
table {{ border-collapse: collapse; margin: 1em 0 }}
td, th {{ border: 1px solid #ccc; padding: .25em .7em; text-align: left }}
</style>
<h1>A weight space at work</h1>
<p>{n} fine-tuned models, {m} principal components: every point is a model of a person.
This page took {seconds:.0f} s.</p>
{body}
</html>
"""
