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
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from w2w_fast import WeightSpace
from w2w_fast.benchmarks import machine
from w2w_fast.coefficients import read_coefficients, write_coefficients
from w2w_fast.demo import WORLD, render
from w2w_fast.demo.build import load_for_training
from w2w_fast.demo.score import held_out_photos
from w2w_fast.verbs.invert import PAPER, invert

FORMAT, VERSION = "w2w_fast.benchmark.inversion", 1
PEOPLE = 64
EACH = 12
"""Pictures of each odd kind, of the first of the same people."""

ARMS: dict[str, dict[str, Any]] = {
    "together": {},
    "one by one": {"batch": 1},
    "the paper's settings": {**PAPER},
    "70 steps": {"steps": 70, "lr": 0.2},
}
"""What each way of inverting sets besides the space's own settings."""
ODD = ("drawn", "recoloured", "occluded", "real")


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


def real() -> tuple[Tensor, list[str]]:
    """Photographs of real people that scikit-image ships, and what they are: the portrait of an
    astronaut, and faces of 25 x 25 grey pixels."""
    import numpy as np
    import skimage
    from PIL import Image

    from w2w_fast.demo.run import portrait
    from w2w_fast.sources import fitted

    faces = np.load(Path(skimage.__file__).parent / "data" / "lfw_subset.npy")[: EACH - 1]
    small = [Image.fromarray((face * 255).astype("uint8")).convert("RGB") for face in faces]
    small = [face.resize((render.SIZE,) * 2, Image.Resampling.BICUBIC) for face in small]
    pictures = [fitted(picture, render.SIZE) for picture in (portrait(), *small)]
    return torch.stack(pictures), ["portrait", *["25 px grey"] * len(small)]


def odd_photos() -> tuple[Tensor, Tensor]:
    """(photos uint8 [4 * EACH, 3, 64, 64], masks), in the order of `ODD`."""
    from w2w_fast.denoise import centre_mask

    _, photos, masks = held_out_photos(PEOPLE)
    photos, masks = photos[:EACH], masks[:EACH]
    pictures = torch.cat([drawn(photos), recoloured(photos), occluded(photos), real()[0]])
    return pictures, torch.cat([masks] * 3 + [centre_mask(render.SIZE).expand(EACH, -1, -1, -1)])


def find(work: Path, world: Path, arm: str, n: int) -> Tensor:
    """The coefficients of an arm, from WORK or made now; arm: a key of `ARMS`, or "odd"."""
    file = work / f"{arm.replace(' ', '-')}.safetensors"
    space = WeightSpace.load(world / "space")
    if file.exists():
        return read_coefficients(file, space.m)
    if arm == "odd":
        photos, masks = odd_photos()
    else:
        _, photos, masks = held_out_photos(n)
    settings = {**space.meta["invert"], **ARMS.get(arm, {})}
    work.mkdir(parents=True, exist_ok=True)
    start, commit = time.perf_counter(), machine.commit()
    found = invert(
        space, load_for_training(world), photos, masks=masks, state=file.with_suffix(".state"),
        **settings,
    )  # fmt: skip
    about = {
        "settings": settings, "seconds": round(time.perf_counter() - start), "space": _key(space),
        "threads": torch.get_num_threads(), **commit,
    }  # fmt: skip
    write_coefficients(file, found, {"about": json.dumps(about)})
    return found


def _key(space: WeightSpace) -> str:
    return hashlib.sha256(space.mean.float().numpy().tobytes()).hexdigest()[:16]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--world", type=Path, default=WORLD)
    parser.add_argument("--arm", action="append", help="only invert, in this way; may be repeated")
    parser.add_argument("--people", type=int, default=PEOPLE, help="of them the first so many")
    args = parser.parse_args()
    for arm in args.arm or (*ARMS, "odd"):
        find(args.work, args.world, arm, args.people)
    return 0


if __name__ == "__main__":
    sys.exit(main())
