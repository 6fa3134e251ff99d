"""What `w2w info` and `w2w doctor` say: pairs of a key and a line of text."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .. import __version__
from ..coefficients import FORMAT, read_coefficients
from ..errors import InputError
from ..files import read_tensors
from ..formats import read_adapter
from ..gallery import open_gallery
from ..layout import Layout
from ..ops import _dispatch
from ..population import open_population
from ..readers import readings
from .support import open_space

Lines = Iterator[tuple[str, object]]


def describe(name: str) -> Lines:
    """What is at a path: a space, a population, a gallery, a file of coefficients or a LoRA."""
    path = Path(name)
    if name == "demo" or (path / "space.json").is_file():
        return _space(name)
    if (path / "population.json").is_file():
        return _population(path)
    if (path / "gallery.json").is_file():
        return _gallery(path)
    if path.is_file() and read_tensors(path)[1].get("format") == FORMAT:
        return _coefficients(path)
    if path.is_file() or (path / "adapter_config.json").is_file():
        return _adapter(path)
    if path.is_dir():
        raise InputError(f"{path}: no space, population, gallery or PEFT adapter is in it")
    return _space(name)  # a space by its name; where there is none the message says where


def _space(name: str) -> Lines:
    space = open_space(name)
    yield "kind", "weight space"
    yield from _layout(space.layout)
    basis = str(space.basis.dtype).removeprefix("torch.").replace("uint8", "4-bit integers")
    yield "components", f"{space.m}, basis in {basis}"
    if space.explained is not None:
        yield "explained", f"{float(space.explained.sum()):.1%} of the population's variance"
    yield "people", space.n or "their coefficients are not in it"
    yield "attributes", ", ".join(space.attributes) or "none"
    readers = space.meta.get("readers")
    for attribute, found in readings(readers if isinstance(readers, dict) else {}):
        yield f"  {attribute}", found[:500]
    for key in sorted(set(space.meta) - {"readers"}):
        yield f"meta.{key}", str(space.meta[key])[:500]


def _population(path: Path) -> Lines:
    population = open_population(path)
    names, shards = population.names, population.shards
    yield "kind", "population"
    yield from _layout(population.layout)
    yield "people", f"{len(names)}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
    aside = [row for row in population.table.to_pylist() if row["reason"]]
    yield "set aside", len(aside)
    for row in aside[:20]:
        yield f"  {row['name']}", row["reason"]
    yield "numbers", f"{len(names)} x {population.layout.size}, {len(shards)} shards"


def _gallery(path: Path) -> Lines:
    gallery = open_gallery(path)
    job = gallery.job
    yield "kind", "gallery"
    yield "images", f"{len(gallery)} of {gallery.table['row'][-1].as_py() + 1} people"
    yield "files", f"{job['format']}, from {gallery.table['file'][0]}"
    for name in ("prompts", "edits", "seed", "steps", "guidance", "scheduler", "versions"):
        yield name, str(job.get(name))[:500]


def _coefficients(path: Path) -> Lines:
    c = read_coefficients(path)
    yield "kind", "coefficients"
    yield "people", c.shape[0]
    yield "components", c.shape[1]
    yield "rms", f"{float(c.square().mean().sqrt()):.4g}"


def _adapter(path: Path) -> Lines:
    adapter = read_adapter(path)
    yield "kind", f"LoRA, {adapter.format}"
    yield "modules", len(adapter.modules)
    yield "ranks", ", ".join(map(str, adapter.ranks))
    yield "text encoder", f"{adapter.text_encoder_keys} keys, not read"
    first = next(iter(adapter.modules))
    yield "first", first
    for key in sorted(adapter.metadata)[:20]:
        yield f"meta.{key}", adapter.metadata[key][:200]


def _layout(layout: Layout) -> Lines:
    known = " (that of Stable Diffusion 1.5)" if layout == Layout.sd15() else ""
    yield "layout", f"{len(layout.modules)} modules, {layout.size:,} numbers{known}"
    yield "rank, alpha", f"{layout.rank}, {layout.alpha:g}"


def examine() -> Lines:
    """Versions, devices, the native extension, and each op's backend with the reason."""
    yield "w2w_fast", __version__
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    for package in ("torch", "diffusers", "transformers", "peft", "safetensors", "pillow", "typer"):
        try:
            yield package, version(package)
        except PackageNotFoundError:
            yield package, "missing"
    yield "cpu", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        memory = properties.total_memory / 2**30
        yield f"cuda:{i}", f"{properties.name}, {memory:.0f} GiB"
    if not torch.cuda.is_available():
        yield "cuda", "no device"
    native = _dispatch.native()
    if native is None:
        yield "native", "not built: pip install . with a C++ compiler builds it"
    else:
        features = ", ".join(f"{k} {v}" for k, v in native.cpu_features().items())
        yield "native", f"{native.__version__}: {features}"
        if hasattr(native, "cuda"):
            yield "native cuda", f"built for {native.cuda.architectures}"
    for op in _dispatch.OPS:
        for backend, available, reason in _dispatch.choices(op):
            yield f"op {op}", f"{backend}: {'yes' if available else 'no'}, {reason}"
