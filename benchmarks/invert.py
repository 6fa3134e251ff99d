"""Inversion in batches against the published method: ``python benchmarks/invert.py``.

Ours is `w2w.invert`'s own engine, each person with a photo and a mask; the published method finds
one person at a time, by autograd through V c in every module (published.py). Photograph and text
are encoded beforehand for both, which favours the published method: it encodes them at every step.
Every line is a process of its own, so that its peak memory is its own; lines take turns for several
rounds, and medians count. ``--what memory`` has SD1.5's real size, 64 x 64 latents, for one step;
a line that takes longer than ``--limit`` seconds is stopped, and says so.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch

from w2w_fast.benchmarks import machine, published
from w2w_fast.benchmarks.cases import _inputs
from w2w_fast.benchmarks.models import Model, alone, forget_peak, model, peak, record, seconds
from w2w_fast.encoding import Encoded
from w2w_fast.files import write_json
from w2w_fast.inversion import Inversion
from w2w_fast.recipe import Recipe, draw

FORMAT, VERSION = "w2w_fast.benchmark.invert", 1
PUBLISHED = 55.0  # seconds a person on an A100, 400 steps (w2w paper, section 4.3)
Line = tuple[str, str, int, int, str, int]  # base, who, people at once, steps, dtype, latents' side


def photographs(of: Model, n: int) -> list[Encoded]:
    """n people, each with one photo of random latents, which is what inversion sees."""
    device, dtype = of.place["device"], of.place["dtype"]
    text = _inputs.normal(*of.text, seed=1, device=device, dtype=dtype)
    latents = _inputs.normal(n, *of.latents, seed=0, device=device)
    masks = torch.ones(n, 1, *of.latents[1:], device=device)
    return [Encoded(latents[i : i + 1], [text], masks[i : i + 1]) for i in range(n)]


def ours(of: Model, people: list[Encoded], recipe: Recipe, checkpointing: bool) -> None:
    subjects = [
        SimpleNamespace(name=str(i), prompts=("",), encoded=e) for i, e in enumerate(people)
    ]
    Inversion(
        of.pipe, of.space, subjects, recipe, of.space.mu, batch=len(people), prior=0.003,
        encoder=lambda subject: subject.encoded, checkpointing=checkpointing,
    ).find()  # fmt: skip


def theirs(of: Model, people: list[Encoded], recipe: Recipe) -> None:
    train_steps = of.pipe.scheduler.config.num_train_timesteps
    for person in people:
        draws = (draw(recipe, i, train_steps, of.latents, "photo") for i in range(recipe.steps))
        published.invert(of.pipe, of.space, person.photo(0), draws)


def one(
    base: str, who: str, k: int, steps: int, dtype: str, side: int, device: str
) -> dict[str, Any]:
    """One line, measured in this process: sample-steps a second and the peak memory."""
    of = model(base, device, getattr(torch, dtype), side)
    people = photographs(of, k)
    call = {
        "ours": partial(ours, of, people, checkpointing=False),
        "ours, checkpointing": partial(ours, of, people, checkpointing=True),
        "published": partial(theirs, of, people),
    }[who]
    before = peak(device)
    forget_peak(device)
    recipe = {"lr": 0.05, "prior": 0.0}
    if steps > 1:  # one alone is for its memory
        call(recipe=Recipe(steps=1, **recipe))
    took = seconds(partial(call, recipe=Recipe(steps=steps, **recipe)))
    return {"rate": k * steps / took, "seconds": took, "peak": peak(device), "built": before}


def lines(what: str, device: str) -> Iterator[Line]:
    """A quarter of a minute each, at most, on two cores."""
    if what == "tiny":
        yield "tiny", "published", 1, 2, "float32", 8
        yield "tiny", "ours", 2, 2, "float32", 8
        yield "tiny", "ours, checkpointing", 2, 2, "bfloat16", 8
        return
    dtype, side = ("float32", 8) if device == "cpu" else ("bfloat16", 64)
    if what == "memory":
        # CPUs without instructions for bfloat16 convolve a hundred times slower in it: small there.
        slow = device == "cpu" and machine.model_dtype(device) == torch.float32
        for dtype, side in (("float32", 64), ("bfloat16", 8 if slow else 64)):
            for who in ("published", "ours", "ours, checkpointing"):
                yield "sd15", who, 1, 1, dtype, side
        return
    steps = {"world": {1: 60, 4: 30, 16: 15}, "sd15": {1: 8, 4: 4, 16: 2}}[what]
    if device != "cpu":
        steps = dict.fromkeys(steps, 50)
    yield what, "published", 1, steps[1], dtype, side
    yield from ((what, "ours", k, n, dtype, side) for k, n in steps.items())
    yield what, "ours, checkpointing", 16, steps[16], dtype, side


def table(wanted: list[Line], found: list[list[dict]], notes: list[str]) -> list[dict[str, Any]]:
    """The rows of a result: of each line its medians, and the rate of every round."""
    rows = []
    names = ("base", "who", "k", "steps", "dtype", "side")
    for line, got, note in zip(wanted, found, notes, strict=True):
        row = {**dict(zip(names, line, strict=True)), "note": note}
        for key in ("rate", "peak"):
            row[key] = median(x[key] for x in got) if got else None
        rows.append({**row, "rates": [x["rate"] for x in got]})
    return rows


def measure(
    what: str, device: str, rounds: int, limit: float, save: Callable[[list], None]
) -> None:
    """Every line in turn, `rounds` times, saved after each; a line that fails says so."""
    wanted = list(lines(what, device))
    found: list[list[dict[str, Any]]] = [[] for _ in wanted]
    notes = ["not run"] * len(wanted)
    for _ in range(rounds):
        for i, line in enumerate(wanted):
            got = alone(__file__, [*map(str, line), device], limit)
            notes[i] = got.get("note", "")
            if not notes[i]:
                found[i].append(got)
                print(*line, f"{got['rate']:.3f} sample-steps/s", f"{got['peak'] / 2**30:.2f} GiB",
                      flush=True)  # fmt: skip
            save([{"what": what, **row} for row in table(wanted, found, notes)])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--what", choices=("world", "sd15", "memory", "tiny"), default="world")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=600.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--one", nargs=7, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        base, who, k, steps, dtype, side, device = args.one
        print(json.dumps(one(base, who, int(k), int(steps), dtype, int(side), device)))
        return 0

    def save(rows: list) -> None:
        if args.out:
            write_json(args.out, record(FORMAT, VERSION, args.what == "tiny", args.device, rows))

    measure(args.what, args.device, args.rounds, args.limit, save)
    return 0


if __name__ == "__main__":
    sys.exit(main())
