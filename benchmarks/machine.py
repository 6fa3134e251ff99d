"""The machine a run is made on: its name, versions, commit, and the floors it sets."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from w2w_fast.testing import race, timer

from .bench import Floor, Setting

_PACKAGES = (
    "torch", "triton", "diffusers", "peft", "transformers", "numpy", "scikit-learn", "w2w_fast",
)  # fmt: skip


def describe(device: str) -> dict[str, Any]:
    """Names, sizes and versions, as far as they can be read here."""
    found: dict[str, Any] = {
        "device": _cpu_name(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "memory_gib": round(_memory() / 2**30, 1),
    }
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        found["device"] = properties.name
        found["device_memory_gib"] = round(properties.total_memory / 2**30, 1)
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["multiprocessors"] = properties.multi_processor_count
    return found


def versions() -> dict[str, str]:
    """python, cuda and packages; "none" for one that is not installed."""
    found = {"python": platform.python_version(), "cuda": torch.version.cuda or "none"}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found


def commit() -> dict[str, Any]:
    """The commit of the source tree that these files lie in, and whether it was changed since.

    A copy of the tree without git is told its commit in W2W_COMMIT.
    """
    folder = Path(__file__).resolve().parent
    installed = not (
        folder.parent / "pyproject.toml"
    ).is_file()  # inside who knows whose repository

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *args], cwd=folder, capture_output=True, text=True, timeout=20
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = None if installed else git("rev-parse", "HEAD")
    # Results and pages made from them do not change what was measured.
    changed = git("status", "--porcelain", "--", "..", ":!results", ":!../docs") if head else None
    told = os.environ.get("W2W_COMMIT", "unknown")
    return {"commit": head or told, "dirty": None if head is None else bool(changed)}


def model_dtype(device: str) -> torch.dtype:
    """bfloat16, unless float32 is faster here: CPUs without instructions for it widen it."""
    if device.startswith("cuda"):
        return torch.bfloat16
    threads, times = torch.get_num_threads(), {}
    torch.set_num_threads(1)  # else what other programs do on a core decides
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(256, 256).to(dtype)
        times[dtype] = timer(lambda a=a: a @ a, seconds=0.02, calls=3).best
    torch.set_num_threads(threads)
    return min(times, key=times.__getitem__)


def floors(setting: Setting) -> dict[str, Floor]:
    """read, copy, gemm float32 and gemm bfloat16 of this machine, all threads.

    read is the fastest of three readers of a buffer far larger than the caches. On a GPU it is the
    copy, bytes read and written: no reader of torch's is known to reach the memory's rate there.
    """
    numbers = 1 << (20 if setting.quick else 29 if setting.is_cuda else 27)
    x = torch.ones(numbers, device=setting.device)
    y = torch.empty_like(x)
    size = x.numel() * x.itemsize
    found = {"copy": Floor("copy", lambda: y.copy_(x), 2 * size)}
    if setting.is_cuda:
        found["read"] = Floor("read", lambda: y.copy_(x), 2 * size)
    else:
        found["read"] = Floor("read", _fastest(_readers(x)), size)
    for dtype in (torch.float32, torch.bfloat16):
        n = _gemm_size(dtype, setting)
        a = torch.randn(n, n, device=setting.device).to(dtype)
        name = f"gemm {str(dtype).removeprefix('torch.')}"
        found[name] = Floor(name, lambda a=a: a @ a, 2 * n**3)
    return found


def _readers(x: torch.Tensor) -> dict[str, Callable[[], object]]:
    parts = np.array_split(x.numpy(), torch.get_num_threads())
    pool = ThreadPoolExecutor(len(parts))
    whole = x.view(torch.int64)
    return {
        "torch, float32 sum": lambda: x.sum(),
        "torch, int64 sum": lambda: whole.sum(),
        "numpy, one sum a thread": lambda: list(pool.map(np.sum, parts)),
    }


def _fastest(calls: dict[str, Callable[[], object]]) -> Callable[[], object]:
    timings = race(calls, seconds=0.2, rounds=5)
    return calls[min(timings, key=lambda name: timings[name].median)]


def _gemm_size(dtype: torch.dtype, setting: Setting) -> int:
    """The largest square GEMM that a tenth of a second has room for, within reason."""
    if setting.is_cuda:
        return 1024 if setting.quick else 8192
    n, most = 128, 256 if setting.quick else 2048
    while n < most:
        a = torch.randn(n, n).to(dtype)
        if timer(lambda a=a: a @ a, seconds=0.0, calls=1).median > 0.1 / 8:
            break
        n *= 2
    return n


def floor_rates(found: dict[str, Floor], setting: Setting) -> dict[str, dict[str, float]]:
    """name -> best and median, bytes or flops a second."""
    rates = {}
    for name, floor in found.items():
        timing = race(
            {name: floor.call},
            0.02 if setting.quick else 0.5,
            3 if setting.quick else 7,
            on_device=setting.is_cuda,
        )[name]
        rates[name] = {
            "best": floor.amount / timing.best,
            "median": floor.amount / timing.median,
            "calls": timing.calls,
        }
    return rates


def evictor(setting: Setting) -> Callable[[], object]:
    """Overwrites memory of twice the last cache: the next call finds its inputs in memory only."""
    numbers = 1 << (16 if setting.quick else 26 if setting.is_cuda else 24)
    if not setting.is_cuda and not setting.quick:
        numbers = max(numbers, _last_cache() // 2)
    scratch = torch.empty(numbers, device=setting.device)
    return scratch.zero_


def _last_cache() -> int:
    """Bytes of the largest cache that Linux lists, 0 where it does not."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
        digits = text.rstrip("KM")
        sizes.append(int(digits) * unit if digits.isdigit() else 0)
    return max(sizes)


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cpu_name() -> str:
    """The model's name as Linux gives it, with its family and model where that says little."""
    file = Path("/proc/cpuinfo")
    if not file.is_file():
        return platform.processor() or platform.machine()
    fields = dict(
        (part.strip() for part in line.split(":", 1))
        for line in file.read_text().split("\n\n")[0].splitlines()
        if ":" in line
    )
    name = fields.get("model name", platform.machine())
    return f"{name} (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"
