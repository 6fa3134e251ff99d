"""How every part of the embedded world's base is trained: AdamW, one cycle, and no work lost."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..files import read_tensors, write_tensors

KEEP = 100
"""Steps between two checkpoints."""


def fast_autocast() -> torch.autocast:
    """bfloat16 where AVX-512 multiplies it faster than float32; without it it is ten times slower
    (a denoiser's step on an AVX2 machine: 15.2 s against 1.2 s)."""
    fast = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return torch.autocast("cpu", torch.bfloat16, enabled=fast)


def train_steps(
    trained: nn.Module,
    steps: int,
    lr: float,
    checkpoint: Path,
    generator: torch.Generator,
    average: nn.Module | None = None,
) -> Iterator[tuple[int, tqdm]]:
    """Yield (step, progress bar); after each, apply AdamW under a one-cycle schedule.

    Every `KEEP` steps and after the last, weights, moments, `average` and the state of `generator`
    go to the file `checkpoint`. Started again with that file in place, training goes on from there
    to the same weights; a finished one yields nothing.
    """
    parameters = list(trained.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, steps, pct_start=0.08)
    modules = nn.ModuleList([trained] if average is None else [trained, average])
    first = 0
    if checkpoint.exists():
        first = _go_on(checkpoint, modules, optimiser, generator)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "step() before optimizer.step()"
            for _ in range(first):
                schedule.step()
    bar = tqdm(range(steps), desc=checkpoint.stem, initial=first, mininterval=5)
    for step in range(first, steps):
        optimiser.zero_grad(set_to_none=True)
        yield step, bar
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        bar.update()
        if (step + 1) % KEEP == 0 or step + 1 == steps:
            _keep(checkpoint, modules, optimiser, generator, step + 1)
    bar.close()


def _keep(
    path: Path,
    modules: nn.Module,
    optimiser: torch.optim.Optimizer,
    generator: torch.Generator,
    step: int,
) -> None:
    tensors = {f"weights.{key}": value for key, value in modules.state_dict().items()}
    for i, moments in optimiser.state_dict()["state"].items():
        tensors |= {f"moments.{i}.{key}": value for key, value in moments.items()}
    tensors["generator"] = generator.get_state()
    write_tensors(path, tensors, {"step": str(step)})


def _go_on(
    path: Path, modules: nn.Module, optimiser: torch.optim.Optimizer, generator: torch.Generator
) -> int:
    """Put everything back as it was; the number of steps done."""
    tensors, metadata = read_tensors(path, mmap=False)
    generator.set_state(tensors.pop("generator"))
    weights = {key: value for key, value in tensors.items() if key.startswith("weights.")}
    modules.load_state_dict({key.removeprefix("weights."): v for key, v in weights.items()})
    state: dict[int, dict[str, Tensor]] = {}
    parameters = optimiser.param_groups[0]["params"]
    for key in tensors.keys() - weights.keys():
        _, i, name = key.split(".")
        like, value = parameters[int(i)], tensors[key]
        if name != "step":  # in the strides of the parameter: the optimiser is slow otherwise
            value = torch.empty_like(like).copy_(value)
        state.setdefault(int(i), {})[name] = value
    optimiser.load_state_dict(optimiser.state_dict() | {"state": state})
    return int(metadata["step"])
