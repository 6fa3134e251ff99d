"""What the benchmarks of whole verbs run on: a UNet with a space, and measures of time and memory.

"world" is the world that ships. "sd15" is a UNet of SD1.5's size with random weights and a random
space of m components; "tiny" the same for tests. Neither has a VAE nor a text encoder.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from w2w_fast import WeightSpace
from w2w_fast.benchmarks import machine
from w2w_fast.benchmarks.bench import Setting
from w2w_fast.benchmarks.cases import _inputs
from w2w_fast.benchmarks.cases.unet import layout_of, unet

_COMMIT = machine.commit()  # of what runs, whatever is done to the files meanwhile


@dataclass(frozen=True)
class Model:
    """pipe: something with a unet and a scheduler; the shapes of one row of latents and of text."""

    pipe: Any
    space: WeightSpace
    latents: tuple[int, int, int]
    text: tuple[int, int]

    @property
    def unet(self) -> nn.Module:
        return self.pipe.unet

    @property
    def place(self) -> dict[str, Any]:
        weight = next(self.unet.parameters())
        return {"device": weight.device, "dtype": weight.dtype}


def model(name: str, device: str, dtype: torch.dtype, side: int = 8, m: int = 1000) -> Model:
    """side, m: of the random ones' latents and space."""
    if name == "world":
        from w2w_fast import demo

        pipe = demo.pipeline(dtype).to(device)
        pipe.set_progress_bar_config(disable=True)
        pipe.unet.requires_grad_(False)
        size = pipe.unet.config.sample_size
        text = (pipe.tokenizer.model_max_length, pipe.unet.config.cross_attention_dim)
        latents = (pipe.unet.config.in_channels, size, size)
        return Model(pipe, demo.space().to(device), latents, text)
    from diffusers import DDIMScheduler

    tiny = name == "tiny"
    base = unet(Setting(device, quick=tiny, model_dtype=dtype))
    pipe = SimpleNamespace(unet=base, scheduler=DDIMScheduler())
    found = random_space(base, 16 if tiny else m, device)
    return Model(pipe, found, (4, side, side), (77, base.config.cross_attention_dim))


def random_space(base: nn.Module, m: int, device: str) -> WeightSpace:
    """A space of bfloat16 components around one adapter; coefficients of size 1 move it by a
    tenth."""
    layout = layout_of(base)
    return WeightSpace(
        layout=layout,
        mean=0.25 * _inputs.adapters(layout, 1, seed=17, device=device)[0],
        std=0.025 * m**-0.5 * _inputs.adapters(layout, 1, seed=18, device=device)[0].abs(),
        basis=_inputs.space(layout.size, m, "bfloat16", device).basis,
        mu=torch.zeros(m, device=device),
        sigma=torch.ones(m, device=device),
    )


def unshared(module: nn.Module) -> Any:
    """A copy of the modules around the same weights: what is put on it, others do not see."""
    keep = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, keep)


# --- time -----------------------------------------------------------------------------------------


def seconds(call: Callable[[], object]) -> float:
    """That the call takes, the device's work included."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def rounds(
    calls: Mapping[str, Callable[[], object]],
    budget: float,
    least: int = 3,
    most: int = 400,
    rarely: Collection[str] = (),
) -> dict[str, list[float | None]]:
    """Seconds of every call, round by round, for about `budget` seconds.

    Each round goes through the calls in the other order, so that a drift of the machine cancels
    in the ratios of a round; those named in `rarely` take part in every third one (else None).
    """
    times: dict[str, list[float | None]] = {name: [] for name in calls}
    start, done = time.perf_counter(), 0
    while done < most and (done < least or time.perf_counter() - start < budget):
        for name in list(calls)[:: -1 if done % 2 else 1]:
            takes_part = name not in rarely or done % 3 == 0
            times[name].append(seconds(calls[name]) if takes_part else None)
        done += 1
    return times


# --- memory ---------------------------------------------------------------------------------------


def forget_peak(device: str) -> None:
    """Start the peak anew: what building a model took for a moment does not count."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: str) -> int:
    """Bytes since: of resident memory on a CPU (Linux), allocated on a GPU."""
    return torch.cuda.max_memory_allocated() if device != "cpu" else _status("VmHWM")


def resident() -> int:
    """Bytes of resident memory now."""
    return _status("VmRSS")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


# --- results --------------------------------------------------------------------------------------


def alone(file: str, arguments: list[str], limit: float) -> dict[str, Any]:
    """What `file --one ARGUMENTS` prints, a process of its own: JSON, or {"note": why not}."""
    command = [sys.executable, file, "--one", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"note": f"stopped after {limit:.0f} s"}
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["killed"])[-1]
        return {"note": f"status {done.returncode}: {said[:200]}"}
    return json.loads(done.stdout.splitlines()[-1])


def record(format: str, version: int, quick: bool, device: str, rows: list) -> dict[str, Any]:
    """A benchmark's result, as it is written to JSON."""
    return {
        "format": format,
        "version": version,
        "quick": quick,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": "cpu" if device == "cpu" else "cuda",
        "machine": machine.describe(device),
        "versions": machine.versions(),
        **_COMMIT,
        "rows": rows,
    }
