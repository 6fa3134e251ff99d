"""The embedded world as something to evaluate: its judge, prompts and people are all known."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..evaluate import FULL, HeldOut, Sight, Size, Study
from ..space import WeightSpace
from . import WORLD, ablations, houses, pipeline, render
from .build import PEOPLE, persons
from .reading import Reader
from .score import gallery

REFERENCE = 8
"""Further photos of a held-out person, to compare with."""


class WorldJudge:
    """The world's reader, which was trained on rendered photographs only."""

    attributes = render.ATTRIBUTES

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def read(self, images: Tensor) -> Sight:
        reading = self.reader.read(images)
        features = torch.cat([self._features(part) for part in images.split(128)])
        return Sight(reading.attributes, reading.embedding, reading.face, features)

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        """Every convolution block's output with unit channels, weighted so that a block's squared
        distance is the mean over its places."""
        x, parts = images.float() / 127.5 - 1, []
        for i, layer in enumerate(self.reader.body):
            x = layer(x)
            if i % 6 == 5:  # after the second convolution of a width
                parts.append(F.normalize(x, dim=1).flatten(1) / x[0, 0].numel() ** 0.5)
        return torch.cat(parts, 1) / len(parts) ** 0.5


def study(world: Path = WORLD, size: Size = FULL, seed: int = 0) -> Study:
    """The world in folder `world`, to be measured with `evaluate`."""
    from diffusers.models.attention_processor import AttnProcessor

    space = WeightSpace.load(world / "space")
    reader = Reader.load(world / "reader.safetensors")
    pipe = pipeline(world=world)
    pipe.unet.set_attn_processor(AttnProcessor())  # the fused one's backward is slow on CPUs
    pipe.set_progress_bar_config(disable=True)

    def prompts(n: int, number: int) -> list[str]:
        conditions = render.conditions(n, torch.Generator().manual_seed(1000 * seed + number))
        return [render.caption(condition, subject="{who}") for condition in conditions]

    return Study(
        space=space,
        pipe=pipe,
        judge=WorldJudge(reader),
        prompts=prompts,
        who="sks person",
        words=dict(render.WORDS),
        settings=dict(space.meta["generate"]),
        inversion=dict(space.meta["invert"]),
        held_out=lambda n, number: held_out(n, size.photos, number),
        identities=lambda: gallery(reader, persons("population", PEOPLE)),
        photos_of=_photos,
        more={"ablations": ablations, "houses": houses},
        size=size,
        seed=seed,
    )


def held_out(n: int, photos: int, seed: int) -> HeldOut:
    """n people the space never saw; nothing stands in front of those who have one photo."""
    people = persons("held-out", n)
    generator = torch.Generator().manual_seed(seed)
    conditions = render.conditions(photos, generator)
    mine = conditions.expand(n, -1, -1).flatten(0, 1).clone()
    first = render.conditions(n, generator)
    first[:, render.CONDITIONS.index("bar")] = 0
    mine.view(n, photos, -1)[:, 0] = first
    who = people.repeat_interleave(photos, 0)
    others = render.conditions(n * REFERENCE, generator)
    return HeldOut(
        labels=people,
        photos=render.render(who, mine).unflatten(0, (n, photos)),
        masks=render.face_mask(who, mine).unflatten(0, (n, photos)),
        captions=tuple(render.caption(condition) for condition in conditions),
        others=render.render(people.repeat_interleave(REFERENCE, 0), others).unflatten(
            0, (n, REFERENCE)
        ),
    )


def _photos(rows: Tensor) -> Tensor:
    people = persons("population", PEOPLE)[rows]
    conditions = render.conditions(len(rows), torch.Generator().manual_seed(90))
    conditions[:, render.CONDITIONS.index("bar")] = 0
    return render.render(people, conditions)
