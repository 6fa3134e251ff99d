"""People trained together against PEFT and AdamW one by one: ``python benchmarks/populate.py``.

On two bases: the world that ships, and a UNet of SD1.5's size with random weights and small
latents. Equal settings for all: rank 1, one photo a step, float32, the same start and the same
random numbers, photographs and text encoded beforehand. Every line is a process of its own, so that
its peak memory is its own; each is run several times, in turns, and the medians count. The rate is
sample-steps a second, the setting up of adapters and optimisers included; people an hour follow
from the recipe's steps. ``report.py`` makes docs/populate.md of the newest file of each device.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import torch

from w2w_fast import Layout
from w2w_fast.benchmarks import machine
from w2w_fast.benchmarks.cases.unet import _SIZES
from w2w_fast.encoding import Encoded
from w2w_fast.files import write_json
from w2w_fast.training import Recipe, Training, draw, initial_adapter

FORMAT, VERSION = "w2w_fast.benchmark.populate", 1
PHOTOS = 10


def base(name: str, device: str) -> tuple[Any, tuple[int, ...], tuple[int, int]]:
    """(something with a unet and a scheduler, the latents' shape, the text's)."""
    from types import SimpleNamespace

    from diffusers import DDIMScheduler, UNet2DConditionModel

    if name == "world":
        from w2w_fast.demo import WORLD
        from w2w_fast.demo.build import load_for_training

        pipe = load_for_training(WORLD).to(device)
        side = pipe.unet.config.sample_size
        text = (pipe.tokenizer.model_max_length, pipe.unet.config.cross_attention_dim)
        return pipe, (pipe.unet.config.in_channels, side, side), text
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**{**_SIZES[name == "tiny"], "sample_size": 8}).to(device)
    pipe = SimpleNamespace(unet=unet.eval(), scheduler=DDIMScheduler())
    return pipe, (4, 8, 8), (77, unet.config.cross_attention_dim)


class Subjects:
    """People made of random latents, which are what training sees."""

    def __init__(self, n: int, latents: tuple[int, ...], text: tuple[int, int], device: str):
        generator = torch.Generator().manual_seed(0)
        self.names = [f"person-{i}" for i in range(n)]
        states = [torch.randn(*text, generator=generator).to(device) for _ in range(PHOTOS)]
        self.encoded = [
            Encoded(torch.randn(PHOTOS, *latents, generator=generator).to(device), states)
            for _ in range(n)
        ]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Any:
        from types import SimpleNamespace

        return SimpleNamespace(name=self.names[i], prompts=("",) * PHOTOS, i=i)


def ours(pipe: Any, subjects: Subjects, recipe: Recipe, k: int, checkpointing: bool) -> None:
    layout = Layout.discover(pipe.unet, alpha=27.0)
    Training(
        pipe, layout, subjects, recipe, initial_adapter(layout), batch=k,
        encoder=lambda subject: subjects.encoded[subject.i], checkpointing=checkpointing,
    ).run()  # fmt: skip


def peft(pipe: Any, subjects: Subjects, recipe: Recipe) -> None:
    """What a user writes: an adapter and an optimiser a person, one person after the other."""
    from peft import LoraConfig, inject_adapter_in_model

    from w2w_fast.denoise import losses

    pipe.unet.requires_grad_(False)
    train_steps = pipe.scheduler.config.num_train_timesteps
    targets = list(Layout.discover(pipe.unet, alpha=27.0).names)
    config = LoraConfig(r=1, lora_alpha=27, target_modules=targets, init_lora_weights=True)
    for encoded in subjects.encoded:
        inject_adapter_in_model(config, pipe.unet, adapter_name="default")
        trained = [p for n, p in pipe.unet.named_parameters() if "lora_" in n]
        optimiser = torch.optim.AdamW(trained, lr=recipe.lr, eps=recipe.eps, weight_decay=0.0)
        for step in range(recipe.steps):
            d = draw(recipe, step, train_steps, encoded.latents.shape[1:], "photo")
            photo = encoded.photo(int(d.which * PHOTOS))
            place = photo.latents.device
            optimiser.zero_grad(set_to_none=True)
            losses(pipe, photo, d.noise[None].to(place), d.t.to(place)).sum().backward()
            optimiser.step()
        _forget(pipe.unet)


def _forget(model: torch.nn.Module) -> None:
    """Take PEFT's layers out again."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module.get_base_layer())


def one(name: str, who: str, k: int, steps: int, device: str) -> dict[str, Any]:
    """One line, measured in this process: sample-steps a second and the peak memory."""
    pipe, latents, text = base(name, device)
    people = k if who != "peft" else 1
    subjects = Subjects(people, latents, text, device)
    recipe = Recipe(steps=steps, lr=1e-4, prior=0.0)
    warm = Recipe(steps=1, lr=1e-4, prior=0.0)
    calls = {
        "ours": lambda r: ours(pipe, subjects, r, k, False),
        "ours, checkpointing": lambda r: ours(pipe, subjects, r, k, True),
        "peft": lambda r: peft(pipe, subjects, r),
    }
    calls[who](warm)
    _wait(device)
    start = time.perf_counter()
    calls[who](recipe)
    _wait(device)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device != "cpu":
        peak = torch.cuda.max_memory_allocated()
    return {"rate": people * steps / seconds, "seconds": seconds, "peak": peak}


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def lines(quick: bool) -> Iterator[tuple[str, str, int, int]]:
    """(base, who, people at once, steps): half a minute each, at most, on two cores."""
    if quick:
        yield from (("tiny", "peft", 1, 2), ("tiny", "ours", 1, 2))
        yield "tiny", "ours, checkpointing", 2, 2
        return
    for name, steps in (
        ("world", {1: 96, 4: 48, 16: 24, 64: 8}),
        ("sd15", {1: 12, 4: 6, 16: 3, 64: 1}),
    ):
        yield name, "peft", 1, steps[1]
        yield from ((name, "ours", k, n) for k, n in steps.items())
        yield name, "ours, checkpointing", 16, steps[16]


def measure(quick: bool, device: str, rounds: int) -> dict[str, Any]:
    """Every line in turn, `rounds` times; a line that fails says so."""
    wanted = list(lines(quick))
    found: list[list[dict[str, Any]]] = [[] for _ in wanted]
    notes = [""] * len(wanted)
    for _ in range(rounds):
        for i, (name, who, k, steps) in enumerate(wanted):
            command = [sys.executable, __file__, "--one", name, who, str(k), str(steps), device]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                said = (done.stderr.strip().splitlines() or ["killed"])[-1]
                notes[i] = f"status {done.returncode}: {said[:200]}"
                continue
            found[i].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{name:6} {who:20} K={k:<3} {found[i][-1]['rate']:8.2f} sample-steps/s "
                  f"{found[i][-1]['peak'] / 2**30:6.2f} GiB", flush=True)  # fmt: skip
    rows = []
    for (name, who, k, steps), got, note in zip(wanted, found, notes, strict=True):
        row = {"base": name, "who": who, "k": k, "steps": steps, "note": note}
        for key in ("rate", "peak"):
            row[key] = median(x[key] for x in got) if got else None
        row["rates"] = [x["rate"] for x in got]
        rows.append(row)
    return {
        "format": FORMAT,
        "version": VERSION,
        "quick": quick,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": "cpu" if device == "cpu" else "cuda",
        "machine": machine.describe(device),
        "versions": machine.versions(),
        **machine.commit(),
        "rows": rows,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it work?")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, who, k, steps, device = args.one
        print(json.dumps(one(name, who, int(k), int(steps), device)))
        return 0
    result = measure(args.quick, args.device, args.rounds)
    if args.out:
        write_json(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
