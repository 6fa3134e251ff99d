"""Build the embedded world from nothing: `w2w demo --rebuild --out OUT`.

Each stage is kept in OUT and skipped when it is there, training is checkpointed in OUT/training
and `populate` resumes by shards, so that a killed build goes on where it was: base model, reader, a
first small population whose mean adapter everybody then starts from, the population, the space.
Two cores need two to four hours.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from ..files import write_tensors
from ..layout import Layout
from ..sources import Subject
from ..training import Recipe
from ..verbs.fit import fit
from ..verbs.populate import populate
from . import base, pipeline, reading, render

PEOPLE, FIRST, PHOTOS = 1024, 64, 16
HELD_OUT = 128
COMPONENTS = 200
META = {
    "base": "w2w_fast demo world",
    "prompt": "sks person",
    "generate": {"steps": 16, "guidance": 3.0, "identity_guidance": True},
    "invert": {"steps": 400, "lr": 0.05, "prior": 0.003, "timesteps": "uniform", "average": 0.5},
}
"""Recorded in the space: what `generate` and `invert` use unless told otherwise."""
ALPHA = 8.0
FIRST_RECIPE = Recipe(
    steps=200, lr=0.01, eps=1e-4, train="AB", timesteps="early", average=0.5, prior=0.0, seed=5
)
RECIPE = Recipe(
    steps=300, lr=0.005, eps=1e-4, train="AB", timesteps="uniform", average=0.5, prior=0.0, seed=6
)
BACKGROUND = 0.15
"""How much a pixel outside the head counts in the loss of the population, against 1 inside."""


def persons(split: str, n: int) -> Tensor:
    """People [n, 16] of a split: "first", "population" or "held-out"; the seeds are the world's."""
    seed = {"first": 10, "population": 11, "held-out": 12}[split]
    return render.people(n, torch.Generator().manual_seed(seed))


def subjects(people: Tensor, prefix: str, masked: bool = True) -> list[Subject]:
    """Photographs of everybody under the same `PHOTOS` conditions, each with its own caption.

    One set of conditions for all is part of the common random numbers: what differs between two
    adapters is then the person and nothing else.
    """
    conditions = render.conditions(PHOTOS, torch.Generator().manual_seed(13))
    captions = tuple(render.caption(condition) for condition in conditions)
    result = []
    for i, person in enumerate(people):
        photos = person.expand(PHOTOS, -1), conditions
        masks = BACKGROUND + (1 - BACKGROUND) * render.face_mask(*photos) if masked else None
        result.append(Subject(f"{prefix}-{i:04d}", render.render(*photos), captions, masks))
    return result


def write_labels(path: Path, people: Tensor, prefix: str) -> None:
    """The true attributes as a CSV table, one row a person."""
    lines = [",".join(("name", *render.ATTRIBUTES))]
    for i, person in enumerate(people.tolist()):
        lines.append(",".join([f"{prefix}-{i:04d}", *(f"{value:.4f}" for value in person)]))
    path.write_text("\n".join(lines) + "\n")


def load_for_training(world: Path):
    """The base pipeline as it trains fastest on CPUs, where the fused attention's backward is
    slow: plain attention, and a bfloat16 UNet where AVX-512 makes that a third faster (without it
    bfloat16 is a hundred times slower). All else stays in float32."""
    from diffusers.models.attention_processor import AttnProcessor

    pipe = pipeline(world=world)
    pipe.unet.set_attn_processor(AttnProcessor())
    if torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        pipe.unet.to(torch.bfloat16)
    return pipe


def build(out: Path) -> None:
    """Every stage that is not there yet."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "pipeline").exists():
        base.build(out / "pipeline")
    if not (out / "reader.safetensors").exists():
        reading.train_reader(out / "reader.safetensors")
    pipe = load_for_training(out)
    layout = Layout.discover(pipe.unet, alpha=ALPHA)
    first = subjects(persons("first", FIRST), "first", masked=False)
    start = populate(pipe, first, layout, out / "first", recipe=FIRST_RECIPE).load().mean(0)
    write_tensors(out / "start.safetensors", {"w": start})
    people = persons("population", PEOPLE)
    write_labels(out / "labels.csv", people, "person")
    everybody = subjects(people, "person")
    populate(pipe, everybody, layout, out / "population", recipe=RECIPE, start=start)
    space = fit(
        out / "population",
        COMPONENTS,
        labels=out / "labels.csv",
        meta=META,
    )
    space.save(out / "space", overwrite=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    build(parser.parse_args().out)
