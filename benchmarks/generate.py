"""Many different people a batch, the base and three rivals: ``python benchmarks/generate.py``.

B people with so many images each, by six ways around one set of weights:

    base                  the model without adapters
    ours                  attach, one identity a sample
    ours, guided          the same with identity guidance (where the batch is doubled)
    PEFT adapter_names    PEFT's mixed batches, an adapter a sample named at each call
    PEFT hotswap          diffusers' load_lora_adapter(hotswap=True), one person after the other
    published             V c again in every module at every call, one person after the other

``--what steps`` times single steps of the denoiser for all rows, and apart from them the putting in
of new people and what ours adds to a step, its hooks on the same tensors without the model around.
``--what images`` times whole calls of the world's pipeline, new people each time.
All ways take turns in every round, rivals in every third, and what counts is the ratio to the base
within a round. A way is timed after its result has been found right.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import w2w_fast as w2w
from w2w_fast.benchmarks import machine
from w2w_fast.benchmarks.cases import _inputs
from w2w_fast.benchmarks.cases.swap import _state_dict
from w2w_fast.benchmarks.models import Model, model, record, rounds, seconds, unshared
from w2w_fast.benchmarks.published import Reprojected
from w2w_fast.files import write_json

FORMAT, VERSION = "w2w_fast.benchmark.generate", 1
STEPS = 8  # of an image; the demo's pictures take 16
PROMPT = "sks person, at the beach"


@dataclass
class Way:
    """put: gives the model the next people, c [k, m]; alone: it serves one at a time."""

    name: str
    unet: Callable[..., Any]
    put: Callable[[Tensor], None]
    alone: bool = False
    hooks: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict)


@dataclass
class Rows:
    """A batch [group][identity][image], and the part of it that each identity has."""

    latents: Tensor
    text: Tensor
    b: int
    groups: int

    @classmethod
    def draw(cls, of: Model, b: int, images: int, groups: int) -> Rows:
        n = groups * b * images
        latents = _inputs.normal(n, *of.latents, seed=13, **of.place)
        return cls(latents, _inputs.normal(n, *of.text, seed=14, **of.place), b, groups)

    def of(self, i: int) -> Rows:
        one, two = (
            t.unflatten(0, (self.groups, self.b, -1))[:, i].flatten(0, 1).contiguous()
            for t in (self.latents, self.text)
        )
        return Rows(one, two, 1, self.groups)


# --- the ways -------------------------------------------------------------------------------------


def ours(of: Model, images: int, guided: bool) -> Way:
    live = w2w.attach(unshared(of.unet), of.space, identity_guidance=guided)
    live.images_per_identity = images

    def put(c: Tensor) -> None:
        live.identities = c

    return Way("ours, guided" if guided else "ours", live.model, put, hooks=live._hooks)


def mixed(of: Model, b: int, images: int, groups: int) -> Way:
    """PEFT with b adapters loaded; their names, one a row, reach its layers as it documents."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    layout, names = of.space.layout, [f"person{i}" for i in range(b)]
    config = LoraConfig(r=layout.rank, lora_alpha=layout.rank, target_modules=list(layout.names))
    wrapped = get_peft_model(
        unshared(of.unet), config, adapter_name=names[0], autocast_adapter_dtype=False
    )
    for name in names[1:]:
        wrapped.add_adapter(name, config, autocast_adapter_dtype=False)
    wrapped.eval()
    rows = [name for name in names for _ in range(images)] * groups
    wrapped.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "adapter_names": rows}), with_kwargs=True
    )

    def put(c: Tensor) -> None:
        for name, w in zip(names, of.space.reconstruct(c), strict=True):
            state = _state_dict(layout, w)
            state = {f"base_model.model.{key}": value for key, value in state.items()}
            set_peft_model_state_dict(wrapped, state, adapter_name=name)

    return Way("PEFT adapter_names", wrapped, put)


def hotswap(of: Model) -> Way:
    unet = unshared(of.unet)
    options = {"prefix": None, "adapter_name": "hot", "low_cpu_mem_usage": False}

    def put(c: Tensor) -> None:
        state = _state_dict(of.space.layout, of.space.reconstruct(c)[0])
        loaded = "hot" in getattr(unet, "peft_config", {})
        unet.load_lora_adapter(state, hotswap=loaded, **options)
        if not loaded:  # its layers, on the model's device and in its dtype; hotswap copies there
            nn.Module.to(unet, **of.place)

    return Way("PEFT hotswap", unet, put, alone=True)


def published(of: Model) -> Way:
    unet = unshared(of.unet)
    state = Reprojected(unet, of.space, torch.zeros(of.space.m, **of.place))

    def put(c: Tensor) -> None:
        state.c = c[0].to(state.c)

    return Way("published", unet, put, alone=True)


def ways(of: Model, b: int, images: int, groups: int) -> dict[str, Way]:
    found = [Way("base", unshared(of.unet), lambda c: None), ours(of, images, False)]
    if groups == 2:
        found.append(ours(of, images, True))
    found += [mixed(of, b, images, groups), hotswap(of), published(of)]
    return {way.name: way for way in found}


# --- what is timed --------------------------------------------------------------------------------


def put(way: Way, c: Tensor) -> None:
    """New people, for all rows."""
    for part in c.split(1 if way.alone else len(c)):
        way.put(part)


def step(way: Way, parts: list[Rows]) -> list[Tensor]:
    """One step of the denoiser for all rows, whoever was put in last."""
    t = torch.tensor(500, device=parts[0].latents.device)
    return [way.unet(part.latents, t, part.text).sample for part in parts]


def added(of: Model, way: Way, rows: Rows) -> Callable[[], None]:
    """All hooks of a way in turn, on what its modules are given and give in a step of the base."""
    seen: list[tuple[Callable[..., Tensor], tuple, Tensor]] = []
    handles = [
        of.unet.get_submodule(name).register_forward_hook(
            lambda module, args, out, hook=hook: seen.append((partial(hook, module), args, out))
        )
        for name, hook in way.hooks.items()
    ]
    step(Way("", of.unet, lambda c: None), [rows])
    for handle in handles:
        handle.remove()

    def call() -> None:
        for hook, args, out in seen:
            hook(args, out)

    return call


def draw(way: Way, of: Model, c: Tensor, images: int) -> None:
    """Pictures of people who are new to the model, by the whole pipeline."""
    of.pipe.unet = way.unet
    for part in c.split(1 if way.alone else len(c)):
        way.put(part)
        seeds = [torch.Generator().manual_seed(i) for i in range(len(part) * images)]
        of.pipe(
            [PROMPT] * len(part), num_images_per_prompt=images, num_inference_steps=STEPS,
            guidance_scale=3.0, generator=seeds,
        )  # fmt: skip


def check(found: dict[str, Way], rows: Rows, parts: list[Rows], c: Tensor) -> None:
    """AssertionError unless every way gives what ours gives, which is not what the base gives."""
    plain = step(found["base"], [rows])[0]
    put(found["ours"], c)
    want = step(found["ours"], [rows])[0]
    effect = (want - plain).float().square().mean().sqrt()
    room = 0.25 if want.dtype.itemsize < 4 else 0.02
    for name, way in found.items():
        if way.alone:
            for i, part in enumerate(parts):
                way.put(c[i : i + 1])
                close = step(way, [part])[0] - Rows(want, want, rows.b, rows.groups).of(i).latents
                off = close.float().square().mean().sqrt() / effect
                assert off <= room, f"{name}: off by {off:.3g} of the adapters' effect"
            continue
        put(way, c)
        got = step(way, [rows])[0]
        truth = {"base": plain, "ours, guided": torch.cat([plain, want])[_guided(rows)]}
        off = (got - truth.get(name, want)).float().square().mean().sqrt() / effect
        assert effect > 0 and off <= room, f"{name}: off by {off:.3g} of the adapters' effect"


def _guided(rows: Rows) -> Tensor:
    """Of [plain, want]: the first group of plain, the second of want."""
    n = len(rows.latents)
    at = torch.arange(n)
    return torch.where(at < n // 2, at, at + n)


@torch.no_grad()
def case(of: Model, what: str, b: int, images: int, groups: int, budget: float) -> dict[str, Any]:
    """One line-up: the seconds of every way, round by round."""
    rows = Rows.draw(of, b, images, groups)
    parts = [rows.of(i) for i in range(b)]
    people = [w2w.sample(of.space, b, seed=i) for i in range(2)]
    found = ways(of, b, images, groups)
    check(found, rows, parts, people[0])
    rivals = {name for name in found if name.startswith(("PEFT", "published"))}
    turn = 0

    def whole(way: Way) -> None:
        nonlocal turn
        turn += 1
        draw(way, of, people[turn % 2], images)

    base, row = (
        of.pipe.unet,
        {"b": b, "images": images, "groups": groups, "rows": len(rows.latents)},
    )
    try:
        if what == "images":
            calls = {name: partial(whole, way) for name, way in found.items()}
            row["seconds"] = rounds(calls, budget)
        else:
            calls = {
                name: partial(step, way, parts if way.alone else [rows])
                for name, way in found.items()
            }
            row["seconds"] = rounds(calls, budget, rarely=rivals)
            row["put"] = {
                name: [seconds(partial(put, way, people[i % 2])) for i in range(5)]
                for name, way in found.items()
            }
            hooked = {name: added(of, way, rows) for name, way in found.items() if way.hooks}
            row["added"] = rounds(hooked, 5.0 if budget else 0.0, most=100)
    finally:
        of.pipe.unet = base
    return row


def cases(base: str, what: str, device: str) -> Iterator[tuple[int, int, float]]:
    """(people, images of each, seconds): a window of five minutes at most on two cores.

    There the largest, a minute or more a round, is left to the world's single steps.
    """
    if what == "quick":
        yield from ((1, 1, 0.0), (2, 2, 0.0))
        return
    if what == "images":
        yield from ((16, 1, 60), (1, 1, 12), (4, 1, 15), (1, 4, 15), (4, 4, 40))
    elif base == "world":
        yield from ((16, 1, 60), (1, 1, 10), (4, 1, 12), (1, 4, 12), (4, 4, 25))
    else:
        yield from ((16, 1, 60), (1, 1, 20), (4, 1, 30), (1, 4, 30), (4, 4, 45))
    if device != "cpu" or (base, what) == ("world", "steps"):
        yield 16, 4, 40


def measure(
    base: str, what: str, device: str, quick: bool, only: list[str], save: Callable[[list], None]
) -> None:
    """Every case; what there is so far is saved after each."""
    dtype = machine.model_dtype(device)
    of = model(base, device, dtype, side=8 if device == "cpu" else 64)
    groups = 2 if base == "world" else 1
    done = []
    for b, images, budget in cases(base, "quick" if quick else what, device):
        if only and f"{b}x{images}" not in only:
            continue
        row = case(of, what, b, images, groups, budget if device == "cpu" else budget / 3)
        about = {"base": base, "what": what, "dtype": str(dtype).removeprefix("torch.")}
        done.append({**about, "m": of.space.m, **row})
        for name, times in row["seconds"].items():
            some = sorted(t for t in times if t is not None)
            print(f"{base:6} {what} B={b:<2} x{images} {name:20} {some[len(some) // 2]:8.4f} s, "
                  f"{len(some)} rounds", flush=True)  # fmt: skip
        save(done)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", choices=("world", "sd15", "tiny"), default="world")
    parser.add_argument("--what", choices=("steps", "images"), default="steps")
    parser.add_argument("--only", default="", help="cases, people x images: 1x1,16x4")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--quick", action="store_true", help="a few calls: does it work?")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.what == "images" and args.base != "world":
        parser.error("--what images: only the world has a VAE")

    def save(rows: list) -> None:
        if args.out:
            write_json(args.out, record(FORMAT, VERSION, args.quick, args.device, rows))

    only = args.only.split(",") if args.only else []
    measure(args.base, args.what, args.device, args.quick, only, save)
    return 0


if __name__ == "__main__":
    sys.exit(main())
