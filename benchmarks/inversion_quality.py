"""Who `invert` finds, and is it they: ``python benchmarks/inversion_quality.py WORK``.

One photograph each of 64 people that the space has never seen, inverted in several ways (`ARMS`);
then pictures of them in new places and poses, with the same seeds in every arm, which the reader
compares with renderings of the real person. And pictures of kinds that neither the base nor the
space has seen (`ODD`): do they end up among the population? The coefficients of each arm are kept
in the folder WORK, and an inversion that was killed goes on. ``report.py`` makes docs/invert.md of
the newest result.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from w2w_fast import WeightSpace
from w2w_fast.benchmarks import machine
from w2w_fast.coefficients import read_coefficients, write_coefficients
from w2w_fast.demo import WORLD, pipeline, render, score
from w2w_fast.demo.build import load_for_training, persons
from w2w_fast.demo.reading import Reader
from w2w_fast.demo.score import held_out_photos
from w2w_fast.errors import InputError
from w2w_fast.files import atomic_path, read_tensors, write_json, write_tensors
from w2w_fast.pictures import contact_sheet
from w2w_fast.verbs.invert import PAPER, invert

FORMAT, VERSION = "w2w_fast.benchmark.inversion", 1
PEOPLE, IMAGES, RESAMPLES = 64, 2, 10_000
EACH = 16
"""Pictures of each odd kind, of the first of the same people."""

Measures = dict[str, Tensor]  # a number for each person

ARMS: dict[str, dict[str, Any]] = {
    "together": {},
    "one by one": {"batch": 1},
    "the paper's settings": {**PAPER},
    "70 steps": {"steps": 70, "lr": 0.2},
}
"""What each way of inverting sets besides the space's own settings."""
ODD = ("drawn", "recoloured", "occluded", "real")
LIKE = "together"
"""The arm whose settings the odd kinds are inverted with, and whose people are their twins."""


def drawn(photos: Tensor) -> Tensor:
    """Pen and three tones: edges in dark lines on a picture of few greys, uint8 [n, 3, 64, 64]."""
    grey = photos.float().mean(1, keepdim=True)
    tones = 90 + (grey / 255 * 2.999).floor() * 75
    across = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    kernels = torch.stack([across, across.T])[:, None]
    edges = F.conv2d(F.pad(grey, (1,) * 4, "replicate"), kernels)
    lines = (1 - edges.norm(dim=1, keepdim=True) / 240).clamp(0, 1)
    return (tones * lines).clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1).contiguous()


def recoloured(photos: Tensor) -> Tensor:
    """Red, green and blue change places, and every second picture is a negative."""
    turned = photos.roll(1, 1)
    turned[1::2] = 255 - turned[1::2]
    return turned


def occluded(photos: Tensor) -> Tensor:
    """A grey block over a quarter of the head: the eyes, the mouth, the left or the right."""
    covered = photos.clone()
    boxes = ((20, 34, 16, 48), (38, 52, 16, 48), (16, 54, 18, 31), (16, 54, 33, 46))
    for i in range(len(covered)):
        top, bottom, left, right = boxes[i % len(boxes)]
        covered[i, :, top:bottom, left:right] = 128
    return covered


def real() -> Tensor:
    """Photographs of real people that scikit-image ships: the portrait of an astronaut first, then
    faces of 25 x 25 grey pixels; uint8 [EACH, 3, 64, 64]."""
    import numpy as np
    import skimage

    from w2w_fast.demo.run import portrait
    from w2w_fast.sources import fitted

    faces = np.load(Path(skimage.__file__).parent / "data" / "lfw_subset.npy")[: EACH - 1]
    small = [Image.fromarray((face * 255).astype("uint8")).convert("RGB") for face in faces]
    small = [face.resize((render.SIZE,) * 2, Image.Resampling.BICUBIC) for face in small]
    return torch.stack([fitted(picture, render.SIZE) for picture in (portrait(), *small)])


def odd_photos() -> tuple[Tensor, Tensor]:
    """(photos uint8 [4 * EACH, 3, 64, 64], masks), in the order of `ODD`."""
    from w2w_fast.denoise import centre_mask

    _, photos, masks = held_out_photos(PEOPLE)
    photos, masks = photos[:EACH], masks[:EACH]
    pictures = torch.cat([drawn(photos), recoloured(photos), occluded(photos), real()])
    return pictures, torch.cat([masks] * 3 + [centre_mask(render.SIZE).expand(EACH, -1, -1, -1)])


def find(work: Path, world: Path, arm: str, n: int, quick: bool = False) -> Tensor:
    """The coefficients of an arm, from WORK or made now; arm: a key of `ARMS`, or "odd".

    quick: in two steps, to see that everything works.
    """
    file = _file(work, arm)
    space = WeightSpace.load(world / "space")
    if file.exists():
        if _about(work, arm)["space"] != _key(space):
            raise InputError(f"{file}: people of another world; name another folder")
        return read_coefficients(file, space.m)
    if arm == "odd":
        photos, masks = odd_photos()
    else:
        _, photos, masks = held_out_photos(n)
    settings = {
        **space.meta["invert"],
        **ARMS.get(arm, ARMS[LIKE]),
        **({"steps": 2} if quick else {}),
    }
    work.mkdir(parents=True, exist_ok=True)
    commit = machine.commit()
    found = invert(
        space, load_for_training(world), photos, masks=masks, state=file.with_suffix(".state"),
        **settings,
    )  # fmt: skip
    about = {"settings": settings, "space": _key(space), **commit}
    write_coefficients(file, found, {"about": json.dumps(about)})
    return found


# --- judged by the reader -------------------------------------------------------------------------


def judged(people: Tensor, made: Tensor, reader: Any, gallery: Tensor, places: Tensor) -> Measures:
    """Of each of n people, from pictures [n * IMAGES] of it in a row and everybody's gallery."""
    n = len(people)
    rows = torch.arange(n).repeat_interleave(IMAGES)
    reading = reader.read(made)
    mine = F.normalize(reading.embedding.view(n, IMAGES, -1).mean(1))
    likeness = mine @ gallery.T
    own = likeness[torch.arange(n), torch.arange(n)]
    error = (reading.continuous - people[rows, score.NB :]).abs().mean(1)
    each = {
        "attributes": score.right(reading, people[rows]).float().mean(1),
        "continuous": error,
        "prompt": (reading.place.argmax(1) == places).float(),
        "face": (reading.face > 0.5).float(),
    }
    found = {name: value.view(n, IMAGES).mean(1) for name, value in each.items()}
    rank = (likeness > own[:, None]).sum(1) + 1.0
    return {**found, "similarity": own, "rank": rank, "top1": (rank == 1).float()}


def interval(values: Tensor, what: str = "mean") -> list[float]:
    """[the figure, 2.5% and 97.5% of it over resampled people]; what: "mean" or "median"."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    figure = {"mean": lambda x: x.mean(-1), "median": lambda x: x.median(-1).values}[what]
    ends = figure(values[drawn]).quantile(torch.tensor([0.025, 0.975]))
    return [float(figure(values)), *ends.tolist()]


def summary(found: Measures, first: Measures | None = None) -> dict[str, list[float]]:
    """Each measure with its interval; first: those of the arm that differences are taken from.

    Differences are of the same people, prompts and seeds: those that both arms have.
    """
    told = {k: interval(v, "median" if k == "rank" else "mean") for k, v in found.items()}
    if first is not None:
        n = min(len(found["rank"]), len(first["rank"]))
        told |= {f"{k} less": interval(v[:n] - first[k][:n]) for k, v in found.items()}
    return told


def distances(space: WeightSpace, c: Tensor) -> dict[str, Any]:
    """Mahalanobis distances from the population's mean, and where they lie in the population's."""
    z, own = ((x - space.mu) / space.sigma for x in (c, space.coefficients))
    far, population = z.norm(dim=1), own.norm(dim=1)
    levels = torch.tensor([0.0, 0.5, 0.95, 0.99, 1.0])
    return {
        "each": far.tolist(),
        "population": population.quantile(levels).tolist(),
        "inside": float((far <= population.max()).float().mean()),
        "within 99%": float((far <= population.quantile(0.99)).float().mean()),
    }


def pictures(work: Path, space: WeightSpace, pipe: Any, arm: str, c: Tensor) -> Tensor:
    """IMAGES pictures of each person of an arm, kept in WORK; the same prompts and seeds in all."""
    file = _file(work, arm).with_suffix(f".{len(c)}.pictures")
    if not file.exists():
        rows = torch.arange(len(c)).repeat_interleave(IMAGES)
        made = score.pictures(space, pipe, c[rows], score.prompts(len(rows), 51)[0], 3000)
        write_tensors(file, {"pictures": made}, {})
    return read_tensors(file, mmap=False)[0]["pictures"]


def measure(
    work: Path, world: Path, n: int, docs: Path | None, quick: bool = False, kept: bool = False
) -> dict[str, Any]:
    """Everything: the arms, the odd kinds, real renderings as the ceiling; sheets into docs.

    What WORK does not hold is inverted first or, with kept, left out.
    """
    space = WeightSpace.load(world / "space")
    reader, pipe = Reader.load(world / "reader.safetensors"), pipeline(world=world)
    people, photos, _ = held_out_photos(n)
    everybody = torch.cat([people, persons("population", space.n)])
    gallery = score.gallery(reader, everybody)
    places = score.prompts(max(n, len(ODD) * EACH) * IMAGES, 51)[1]
    c = {
        arm: find(work, world, arm, n, quick)[: None if arm == "odd" else n]
        for arm in (*ARMS, "odd") if not kept or _file(work, arm).exists()
    }  # fmt: skip
    made = {arm: pictures(work, space, pipe, arm, mine) for arm, mine in c.items()}
    found: dict[str, Measures] = {}
    arms: dict[str, Any] = {}
    for arm in (name for name in ARMS if name in c):
        k = len(c[arm])
        found[arm] = judged(people[:k], made[arm], reader, gallery, places[: k * IMAGES])
        apart = (c[arm] - c["together"][:k]) / space.sigma
        arms[arm] = {
            "people": k, **_about(work, arm), "distance": distances(space, c[arm]),
            "apart": float(apart.square().mean().sqrt()),
            **summary(found[arm], None if arm == "together" else found["together"]),
        }  # fmt: skip
    conditions = render.conditions(n * IMAGES, torch.Generator().manual_seed(51))
    real = render.render(people.repeat_interleave(IMAGES, 0), conditions)
    ceiling = summary(judged(people, real, reader, gallery, places[: n * IMAGES]))
    odd: dict[str, Any] = {}
    if "odd" in c:
        twins = {name: value[:EACH] for name, value in found[LIKE].items()}
        odd["twins"] = {"people": EACH, **summary(twins)}
        for i, kind in enumerate(ODD):
            rows = slice(i * EACH * IMAGES, (i + 1) * EACH * IMAGES)
            about = judged(people[:EACH], made["odd"][rows], reader, gallery, places[rows])
            told = summary(about, twins) if kind != "real" else {"face": interval(about["face"])}
            far = distances(space, c["odd"][i * EACH : (i + 1) * EACH])
            odd[kind] = {"people": EACH, "distance": far, **told}
    if docs is not None:
        sheets(docs, photos, made)
    return {
        "format": FORMAT, "version": VERSION, "quick": quick,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": "cpu", "machine": machine.describe("cpu"), "versions": machine.versions(),
        **machine.commit(), "space": _key(space), "components": space.m, "n": space.n,
        "images": IMAGES, "gallery": len(everybody), "own": space.meta["invert"],
        "arms": arms, "ceiling": ceiling, "odd": odd,
    }  # fmt: skip


def sheets(docs: Path, photos: Tensor, made: dict[str, Tensor]) -> None:
    """Two pictures: eight people as each arm found them; the odd kinds before and after."""

    def sheet(rows: list[tuple[str, Tensor]], name: str) -> None:
        columns = len(rows[0][1])
        cells = [Image.fromarray(x.permute(1, 2, 0).numpy()) for _, row in rows for x in row]
        labels = [label for label, row in rows for _ in row]
        with atomic_path(docs / name) as temporary:
            contact_sheet(cells, columns, labels).quantize(192).save(temporary, "PNG")

    docs.mkdir(parents=True, exist_ok=True)
    most = min(8, len(photos))
    rows = [("the photo", photos[:most])]
    shown = [arm for arm in ARMS if arm in made and len(made[arm]) >= most * IMAGES]
    rows += [(arm, made[arm][: most * IMAGES : IMAGES]) for arm in shown]
    sheet(rows, "invert-people.png")
    if "odd" in made:
        before, after = odd_photos()[0].split(EACH), made["odd"][::IMAGES].split(EACH)
        rows = []
        for kind, photo, found in zip(ODD[:-1], before, after, strict=False):
            rows += [(kind, photo[:8]), ("found", found[:8])]
        # Of the real ones the portrait alone: it was published to be shown, the faces were not.
        rows += [(ODD[-1], before[-1][:1]), ("found", after[-1][:1])]
        sheet(rows, "invert-odd.png")


def _file(work: Path, arm: str) -> Path:
    return work / f"{arm.replace(' ', '-')}.safetensors"


def _about(work: Path, arm: str) -> dict[str, Any]:
    """What is kept beside an arm's coefficients: settings, commit."""
    about = json.loads(read_tensors(_file(work, arm))[1]["about"])
    return {name: about[name] for name in ("settings", "space", "commit", "dirty")}


def _key(space: WeightSpace) -> str:
    return hashlib.sha256(space.mean.float().numpy().tobytes()).hexdigest()[:16]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--world", type=Path, default=WORLD)
    parser.add_argument("--arm", action="append", help="only invert, in this way; may be repeated")
    parser.add_argument("--kept", action="store_true", help="judge what WORK holds, no more")
    parser.add_argument("--quick", action="store_true", help="two steps: does it work?")
    parser.add_argument("--people", type=int, default=PEOPLE, help="of them the first so many")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--docs", type=Path, help="a folder for sheets of pictures")
    args = parser.parse_args()
    for arm in args.arm or ():
        find(args.work, args.world, arm, args.people, args.quick)
    if not args.arm:
        found = measure(args.work, args.world, args.people, args.docs, args.quick, args.kept)
        if args.out:
            write_json(args.out, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
