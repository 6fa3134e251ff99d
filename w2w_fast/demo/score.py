"""How good the embedded world is, measured by its reader on pictures with fresh seeds.

`python -m w2w_fast.demo.score WORLD` writes score.json there, which the demo's report shows;
`--only inversion` measures that part anew and keeps the others.
Every figure is a share between 0 and 1 unless its name says otherwise.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..evaluate import study
from ..files import read_json, write_json
from ..pictures import stack
from ..sources import Subject
from ..space import WeightSpace
from ..training import Recipe, train
from ..verbs.edit import direction
from ..verbs.generate import generate
from ..verbs.invert import invert
from ..verbs.sample import sample
from . import pipeline, render
from .reading import Reader, Reading

NB = len(render.BINARY)
STRENGTHS = (2.0, 3.0, 4.0, 5.0, 6.0)
PARTS = ("reader", "populated", "edits", "inversion", "sampled")


def prompts(n: int, seed: int) -> tuple[list[str], Tensor]:
    """n prompts with places and looks drawn at random, and the places' numbers [n]."""
    conditions = render.conditions(n, torch.Generator().manual_seed(seed))
    places = conditions[:, render.CONDITIONS.index("place")].long()
    return [render.caption(condition) for condition in conditions], places


def pictures(space: WeightSpace, pipe, coefficients: Tensor, texts, seeds) -> Tensor:
    """Generate with the space's own settings: uint8 [k, 3, 64, 64]."""
    settings = space.meta["generate"]
    return stack(generate(space, pipe, coefficients, texts, seeds=seeds, batch=64, **settings))


def right(reading: Reading, people: Tensor) -> Tensor:
    """Which binary attributes were read as they are, bool [n, 8]."""
    return (reading.binary > 0.5) == (people[:, :NB] > 0.5)


def gallery(reader: Reader, people: Tensor, photos: int = 8, seed: int = 21) -> Tensor:
    """The mean embedding [n, 32] of rendered photographs of everybody, in fresh conditions."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(len(people), 32)
    for _ in range(photos):
        images = render.render(people, render.conditions(len(people), generator))
        total += reader.read(images).embedding
    return torch.nn.functional.normalize(total)


def score_populated(space, pipe, reader, people: Tensor, n: int = 48, images: int = 8) -> dict:
    """Populated people from their coefficients: attributes, and who among all of them it is."""
    who = torch.randperm(len(people), generator=torch.Generator().manual_seed(30))[:n]
    rows = who.repeat_interleave(images)
    texts, places = prompts(len(rows), 31)
    made = reader.read(pictures(space, pipe, space.coefficients[rows], texts, 1000))
    mean = made.embedding.view(n, images, -1).mean(1)
    found = (mean @ gallery(reader, people).T).argmax(1)
    continuous = (made.continuous - people[rows, NB:]).abs().mean()
    return {
        "attributes_right": float(right(made, people[rows]).float().mean()),
        "by_attribute": by_name(right(made, people[rows]).float().mean(0)),
        "continuous_error": float(continuous),
        "retrieval_top1": float((found == who).float().mean()),
        "prompt_followed": float((made.place.argmax(1) == places).float().mean()),
        "face": float((made.face > 0.5).float().mean()),
    }


def score_edits(space, pipe, reader, people: Tensor, n: int = 12) -> dict:
    """For each attribute the least strength that flips it in 90% of cases, and what else changes.

    Edits go away from what the unedited picture shows; a random direction of the same length is
    the null.
    """
    who = torch.randperm(len(people), generator=torch.Generator().manual_seed(40))[:n]
    c = space.coefficients[who]
    texts, _ = prompts(n, 41)
    before = reader.read(pictures(space, pipe, c, texts, 2000)).binary > 0.5
    result = {}
    random = torch.randn(space.m, generator=torch.Generator().manual_seed(42)) * space.sigma
    for j, name in enumerate(render.BINARY):
        v = direction(space, name)
        sign = torch.where(before[:, j], -1.0, 1.0)[:, None]
        rows = []
        for strength in STRENGTHS:
            made = reader.read(pictures(space, pipe, c + strength * sign * v, texts, 2000))
            changed = (made.binary > 0.5) != before
            flips = float(changed[:, j].float().mean())
            others = torch.cat([changed[:, :j], changed[:, j + 1 :]], 1)
            rows.append(
                {
                    "strength": strength,
                    "flips": flips,
                    "others_changed": float(others.float().mean()),
                    "face": float((made.face > 0.5).float().mean()),
                }
            )
            if flips >= 0.9:
                break
        step = rows[-1]["strength"] * sign * random * (v.norm() / random.norm())
        null = (reader.read(pictures(space, pipe, c + step, texts, 2000)).binary > 0.5) != before
        result[name] = {
            "curve": rows,
            "at": rows[-1],
            "random_direction_flips": float(null[:, j].float().mean()),
        }
    reached = [edit["at"] for edit in result.values() if edit["at"]["flips"] >= 0.9]
    return {
        "attributes": result,
        "reached": len(reached),
        "others_changed": _mean(edit["others_changed"] for edit in reached),
        "face": _mean(edit["face"] for edit in reached),
    }


def held_out_photos(n: int, seed: int = 50) -> tuple[Tensor, Tensor, Tensor]:
    """n people the space never saw: (people [n, 16], photos uint8, masks), one photo each."""
    from .build import persons

    people = persons("held-out", n)
    conditions = render.conditions(n, torch.Generator().manual_seed(seed))
    conditions[:, render.CONDITIONS.index("bar")] = 0
    return people, render.render(people, conditions), render.face_mask(people, conditions)


def score_inversion(space, pipe, reader, training_pipe, n: int = 64, images: int = 3) -> dict:
    """One photo of a held-out person, then new poses and prompts; the rival has no space.

    The rival is a one-photo adapter with the same number of steps, from the start that PEFT gives.
    """
    people, photos, masks = held_out_photos(n)
    c = invert(space, training_pipe, photos, masks=masks, **space.meta["invert"])
    rows = torch.arange(n).repeat_interleave(images)
    texts, places = prompts(len(rows), 51)
    ours = reader.read(pictures(space, pipe, c[rows], texts, 3000))

    subjects = [Subject(str(i), photo[None], ("sks person",)) for i, photo in enumerate(photos)]
    recipe = Recipe(
        steps=space.meta["invert"]["steps"], lr=0.005, eps=1e-4, timesteps="early", average=0.5,
        prior=0.0,
    )  # fmt: skip
    w = train(training_pipe, space.layout, subjects, recipe)
    rival = reader.read(adapter_pictures(space, pipe, w[rows], texts, 3000))
    z = (c - space.mu) / space.sigma
    return {
        "w2w": _person_and_prompt(ours, people[rows], places),
        "one_photo_adapter": _person_and_prompt(rival, people[rows], places),
        "rms_of_whitened_coefficients": float(z.square().mean().sqrt()),
    }


def adapter_pictures(space: WeightSpace, pipe, w: Tensor, texts: list[str], seed: int) -> Tensor:
    """As `pictures`, for adapters [k, d] that are no points of the space."""
    settings = {**space.meta["generate"], "identity_guidance": True}
    return study.pictures(space, pipe, settings, w, texts, range(seed, seed + len(w)))


def score_sampled(space, pipe, reader, n: int = 24, images: int = 3) -> dict:
    """People who do not exist: whole faces, and the same person whatever the seed and prompt."""
    rows = torch.arange(n).repeat_interleave(images)
    texts, _ = prompts(len(rows), 61)
    made = reader.read(pictures(space, pipe, sample(space, n, seed=60)[rows], texts, 4000))
    likeness = made.embedding @ made.embedding.T
    same = (rows[:, None] == rows[None]) & ~torch.eye(len(rows), dtype=torch.bool)
    other = rows[:, None] != rows[None]
    steady = (made.binary.view(n, images, NB) > 0.5).float().mean(1)
    return {
        "face": float((made.face > 0.5).float().mean()),
        "similarity_within": float(likeness[same].mean()),
        "similarity_between": float(likeness[other].mean()),
        "nearest_is_same_person": float(
            (rows[(likeness - 2 * torch.eye(len(rows))).argmax(1)] == rows).float().mean()
        ),
        "attributes_steady": float(torch.maximum(steady, 1 - steady).mean()),
    }


def score_reader(reader, n: int = 512) -> dict:
    """The judge itself, on rendered photographs it has not seen."""
    generator = torch.Generator().manual_seed(70)
    people, conditions = render.people(n, generator), render.conditions(n, generator)
    made = reader.read(render.render(people, conditions))
    places = conditions[:, render.CONDITIONS.index("place")].long()
    return {
        "attributes_right": float(right(made, people).float().mean()),
        "continuous_error": float((made.continuous - people[:, NB:]).abs().mean()),
        "place_right": float((made.place.argmax(1) == places).float().mean()),
        "face": float((made.face > 0.5).float().mean()),
    }


def by_name(values: Tensor) -> dict[str, float]:
    return {name: float(value) for name, value in zip(render.BINARY, values, strict=True)}


def _person_and_prompt(reading: Reading, people: Tensor, places: Tensor) -> dict:
    attributes = right(reading, people).float().mean(1)
    followed = (reading.place.argmax(1) == places).float()
    return {
        "attributes_right": float(attributes.mean()),
        "prompt_followed": float(followed.mean()),
        "both": float((attributes * followed).mean()),
        "face": float((reading.face > 0.5).float().mean()),
    }


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None


def score(world: Path, only: Sequence[str] = PARTS) -> dict:
    """The figures of the world in folder `world`: all of them, or those parts only."""
    from .build import PEOPLE, load_for_training, persons

    space = WeightSpace.load(world / "space")
    reader = Reader.load(world / "reader.safetensors")
    pipe = pipeline(world=world)
    people = persons("population", PEOPLE)
    parts = {
        "reader": lambda: score_reader(reader),
        "populated": lambda: score_populated(space, pipe, reader, people),
        "edits": lambda: score_edits(space, pipe, reader, people),
        "inversion": lambda: score_inversion(space, pipe, reader, load_for_training(world)),
        "sampled": lambda: score_sampled(space, pipe, reader),
    }
    return {"people": PEOPLE, **{name: parts[name]() for name in only}}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("world", type=Path)
    parser.add_argument(
        "--only", choices=PARTS, action="append", help="measure this part anew; may be repeated"
    )
    given = parser.parse_args(arguments)
    file = given.world / "score.json"
    known = read_json(file) if given.only else {}
    write_json(file, {**known, **score(given.world, given.only or PARTS)})


if __name__ == "__main__":
    main()
