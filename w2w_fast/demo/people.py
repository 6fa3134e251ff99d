"""The pictures and figures of docs/people.md, from the world that ships.

`python -m w2w_fast.demo.people docs` draws docs/people-*.png and writes the figures between the
marks of docs/people.md. Seeded; the judge is the world's reader, trained on drawn pictures only.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import torch
from scipy.stats import spearmanr
from torch import Tensor

from ..attach import attach
from ..attributes import read_attributes
from ..explore import independent, reader, resembles
from ..files import atomic_path
from ..layout import Layout
from ..pictures import contact_sheet
from ..readers import fit_readers
from ..space import WeightSpace
from ..verbs.blend import blend
from ..verbs.calibrate import calibrate
from ..verbs.edit import edit
from ..verbs.generate import generate
from ..verbs.read import draw_map, read
from ..verbs.sample import sample
from ..verbs.slider import slider
from ..whereabouts import novelty, whitened
from . import pipeline, render, space
from . import reader as judge
from .reading import measure

PROMPT = "sks person, blue background"
NB = len(render.BINARY)
SLIDERS = ("glasses", "beard", "skin")


class World:
    """The space, the pipeline and the judge, and pictures of people."""

    def __init__(self) -> None:
        self.space: WeightSpace = space()
        self.pipe = pipeline()
        self.judge = judge()

    def draw(self, c: Tensor, seeds: list[int]) -> list:
        own = self.space.meta["generate"]
        return generate(self.space, self.pipe, c, PROMPT, seeds=seeds, progress=False, **own)

    def draw_adapters(self, layout: Layout, w: Tensor, seeds: list[int]) -> list:
        own, made = self.space.meta["generate"], []
        with torch.no_grad(), attach(self.pipe, layout, identity_guidance=True) as live:
            for rows in torch.arange(len(w)).split(32):
                live.adapters = w[rows]
                made += self.pipe(
                    [PROMPT] * len(rows),
                    num_inference_steps=own["steps"],
                    guidance_scale=own["guidance"],
                    generator=[torch.Generator().manual_seed(seeds[i]) for i in rows],
                ).images
        return made


def sampled(world: World, docs: Path, n: int = 32) -> list[str]:
    seeds = list(range(n))
    wanted = {"beard": 1, "glasses": 0}
    plain = sample(world.space, n, seed=5)
    given = sample(world.space, n, seed=5, given=wanted)
    images = [world.draw(c, seeds) for c in (plain, given)]
    save(docs / "people-sample.png", contact_sheet(images[0][:8] + images[1][:8], 8))
    columns = [render.BINARY.index(name) for name in wanted]
    lines = table("the judge sees", "a beard", "glasses", "a whole face")
    for name, made in zip(("sampled", "given beard=1, glasses=0"), images, strict=True):
        seen = world.judge.read(made)
        shares = (seen.binary[:, columns] > 0.5).float().mean(0).tolist()
        face = float((seen.face > 0.5).float().mean())
        lines.append(f"| {name} ({n}) | {shares[0]:.0%} | {shares[1]:.0%} | {face:.0%} |")
    lines += ["", f"Novelty of 500 sampled: {novelty(world.space, sample(world.space, 500))}."]
    z = whitened(world.space, sample(world.space, 64, method="latin")).mean(0).abs().mean()
    rough = whitened(world.space, sample(world.space, 64)).mean(0).abs().mean()
    lines += [
        f"In a component the mean of 64 people is {z:.3f} sd from the population's where they come "
        f"from a Latin hypercube, {rough:.3f} where they are drawn at random."
    ]
    return lines


def explored(world: World) -> list[str]:
    own = world.space
    names = [f"ica{i + 1}" for i in range(len(independent(own)))]
    rows = dict(zip(names, independent(own), strict=True))
    rows |= {f"pc{i + 1}": reader(own, f"pc{i + 1}") for i in range(10)}
    found = {name: resembles(own, row, 1)[0] for name, row in rows.items()}
    told = [
        ", ".join(f"{name} {other} ({r:+.2f})" for name, (other, r) in found.items()
                  if name.startswith(kind) and abs(r) > 0.7)
        for kind in ("ica", "pc")
    ]  # fmt: skip
    lines = [
        "Here, where the labels are known, of ten of each these go along with one of them "
        f"(correlation beyond .7 either way): {told[0]}; {told[1]}. The others are mixtures."
    ]
    c, labels = own.coefficients, own.labels
    heads = ("people labelled", "glasses", "beard", "fringe", "skin, R2", "age, R2")
    lines += ["", *table(*heads)]
    names = ("glasses", "beard", "fringe", "skin", "age")
    columns = [own.attributes.index(name) for name in names]
    order = torch.randperm(own.n, generator=torch.Generator().manual_seed(0))
    rest = order[600:]
    for n in (30, 100, 300, 600):
        some = order[:n]
        weights, report = fit_readers(
            c[some], labels[some][:, columns], names, permutations=0, origin=own.mu
        )
        made = dataclasses.replace(own, attributes=list(names), classifiers=weights, labels=None,
                                   directions=weights, meta={"readers": report})  # fmt: skip
        cells = []
        for name, column in zip(names, columns, strict=True):
            truth = labels[rest, column].double()
            shown = read_attributes(made, c[rest])[name]
            if "probability" in shown:
                right = ((shown["probability"] > 0.5) == (truth > 0.5)).double().mean()
                cells.append(f"{float(right):.0%}")
            else:
                gone = 1 - (shown["value"] - truth).square().mean() / truth.var(correction=0)
                cells.append(f"{float(gone):.2f}")
        lines.append(f"| {n} | " + " | ".join(cells) + " |")
    return lines


def calibrated(world: World, docs: Path, people: int = 4) -> list[str]:
    lines = table("slider", "steps", "Spearman", "largest step", "farthest from even")
    fresh = sample(world.space, people, seed=77)
    sheets = []
    for name in ("skin",):  # a row of pictures a kind of steps
        scale = calibrate(
            world.space, world.pipe, name, measure(world.judge, name), people=6, seed=3,
            prompt=PROMPT, amounts=range(-5, 6), progress=False,
        )  # fmt: skip
        low, high = scale.range
        even = scale.amount(torch.linspace(low, high, 9))
        raw = torch.linspace(scale.amounts[0], scale.amounts[-1], 9)
        for kind, amounts in (("plain", raw), ("calibrated", even)):
            each = amounts.repeat_interleave(people)
            moved = edit(world.space, fresh.repeat(9, 1), {name: each})
            images = world.draw(moved, list(range(1000, 1000 + people)) * 9)
            mean = measure(world.judge, name)(images).view(9, people).mean(1).double()
            step = (mean[-1] - mean[0]) / 8
            line = torch.linspace(float(mean[0]), float(mean[-1]), 9, dtype=torch.float64)
            off = float((mean - line).abs().max() / (mean[-1] - mean[0]).abs())
            rho = spearmanr(range(9), mean.numpy()).statistic
            most = float(mean.diff().max() / step)
            lines.append(f"| {name} | {kind} | {rho:.3f} | {most:.1f} | {off:.0%} |")
            sheets += images[::people]
    save(docs / "people-calibrate.png", contact_sheet(sheets, 9))
    return [
        *lines,
        "",
        f"Measured on 6 people and tested on {people} others with other seeds, in nine steps from",
        "end to end of one range. The largest step is that of the mean reading, 1 being even; the",
        "farthest from even is its distance from a straight line, as a share of all change.",
        "",
        "![Two rows of nine faces](people-calibrate.png)",
        "",
        "Above plain steps, below calibrated ones.",
    ]


def told(world: World, docs: Path) -> list[str]:
    own = world.space
    people = sample(own, 4, seed=9)
    facts = read(own, people)
    for i, fact in enumerate(facts):
        fact["name"] = f"sampled {i + 1}"
    draw_map(own, facts, docs / "people-map.png", "hat")
    order = torch.randperm(own.n, generator=torch.Generator().manual_seed(1))
    train, rest = order[:700], order[700:]
    weights, report = fit_readers(
        own.coefficients[train], own.labels[train], own.attributes, permutations=0, origin=own.mu
    )
    made = dataclasses.replace(own, classifiers=weights, labels=None, meta={"readers": report})
    shown = read_attributes(made, own.coefficients[rest])
    sure, right, inside = [], [], []
    for column, (name, found) in enumerate(shown.items()):
        truth = own.labels[rest, column]
        if "probability" in found:
            p = found["probability"]
            right.append((p > 0.5) == (truth > 0.5))
            sure.append(torch.maximum(p, 1 - p))
        else:
            within = ((truth > found["low"]) & (truth < found["high"])).double().mean()
            inside.append((name, float(within)))
    right, sure = torch.cat(right).double(), torch.cat(sure)
    least, most = min(inside, key=lambda x: x[1]), max(inside, key=lambda x: x[1])
    unsure = sure < 0.9
    return [
        f"Readers fitted to 700 people, read on the other {len(rest)}: the eight attributes of two "
        f"values are right in {float(right.mean()):.1%}, where the probabilities promise "
        f"{float(sure.mean()):.1%}; of the {int(unsure.sum())} readings less than 90% sure "
        f"{float(right[unsure].mean()):.0%} are right where {float(sure[unsure].mean()):.0%} is "
        f"promised. The intervals of the other eight, which promise 90%, hold {least[1]:.0%} "
        f"({least[0]}) to {most[1]:.0%} ({most[0]})."
    ]


def blended(world: World, docs: Path) -> list[str]:
    a, b = sample(world.space, 2, seed=31)
    lines, rows = [], []
    for method in ("linear", "spherical"):
        people = blend(world.space, a, b, 9, method=method)
        rows += world.draw(people, [4] * 9)
        rms = whitened(world.space, people).square().mean(1).sqrt().tolist()
        far = f"{rms[0]:.2f}, {rms[4]:.2f} half way, {rms[8]:.2f}"
        lines.append(f"- {method}: {far} sd a component from the mean.")
    save(docs / "people-blend.png", contact_sheet(rows, 9))
    return lines


def exported(world: World, docs: Path, people: int = 8) -> list[str]:
    own = world.space
    c = sample(own, people, seed=90)
    misses = ("misses at 1 sd", "at 3 sd", "for one in twenty")
    lines = table("slider", *misses, "the judge's change, edited", "by the slider")
    seeds, sheet = list(range(people)), []
    wide = Layout(own.layout.modules, 3 * own.layout.rank, 3 * own.layout.alpha)
    plain = own.reconstruct(c)
    for name in SLIDERS:
        one, three = (slider(own, {name: float(t)}) for t in (1, 3))
        a = {n: x for n, (x, _) in one.layout.split(one.w).items()}
        b = {n: 3 * x for n, (_, x) in one.layout.split(one.w).items()}
        parts = own.layout.split(plain)
        both = wide.flatten({
            n: (torch.cat([x, a[n].expand(people, -1, -1)], 1),
                torch.cat([y, b[n].expand(people, -1, -1)], 2))
            for n, (x, y) in parts.items()
        })  # fmt: skip
        look = measure(world.judge, name)
        before = world.draw(c, seeds)
        exact = world.draw(edit(own, c, {name: 3.0}), seeds)
        first = world.draw_adapters(wide, both, seeds)
        change = [float((look(x) - look(before)).mean()) for x in (exact, first)]
        # The slider of 3 sd is that of 1 sd times 3: it is linear, and only the edit is not.
        lines.append(
            f"| {name} | {float(one.error.median()):.0%} | {float(three.error.median()):.0%} | "
            f"{float(three.error.quantile(0.95)):.0%} | {change[0]:+.2f} | {change[1]:+.2f} |"
        )
        sheet += [x[i] for i in range(3) for x in (before, exact, first)]
    save(docs / "people-slider.png", contact_sheet(sheet, 9))
    return lines


def table(*heads: str) -> list[str]:
    """The first two lines of a table."""
    return ["| " + " | ".join(heads) + " |", "| " + " | ".join(["---"] * len(heads)) + " |"]


def save(path: Path, image) -> None:
    with atomic_path(path) as temporary:
        image.save(temporary, "PNG", optimize=True)


def main(docs: Path, only: list[str]) -> None:
    """Everything, or the parts of the page that are named."""
    world = World()
    page = (docs / "people.md").read_text()
    parts = {
        "sample": lambda: sampled(world, docs), "directions": lambda: explored(world),
        "calibrate": lambda: calibrated(world, docs), "read": lambda: told(world, docs),
        "blend": lambda: blended(world, docs), "slider": lambda: exported(world, docs),
    }  # fmt: skip
    for name in only or parts:
        text = "\n".join(parts[name]()).strip()
        print(text, flush=True)
        mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        page = mark.sub(lambda m, text=text: m[1] + text + "\n" + m[2], page)
        (docs / "people.md").write_text(page)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
