"""`collect`: a population from LoRA files that other tools trained.

Each file's weight changes are put in canonical form (`canonical` says which, and why principal
components over it mean something), cut or zero-padded to the layout's rank. The first shard's
people are turned to their mean, everybody later to that mean, so one pass over the files does.

A collected population's numbers are not those of one that `populate` trained, whose raw factors
share a start: fit them apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..canonical import align, canonical
from ..errors import InputError
from ..files import read_tensors
from ..formats import Adapter, read_adapter
from ..labels import labels_of
from ..layout import Layout, _some
from ..population import (
    Population,
    begin,
    finish,
    open_population,
    read_about,
    shard_path,
    write_shard,
)
from ..sources import check_names, natural

# Pickles are refused when they are read, but seen: a file passed over in silence seems taken.
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_PEFT = ("adapter_config.json", "adapter_model.safetensors")
_BY_DIFFUSERS = "pytorch_lora_weights.safetensors"


def collect(
    folder: str | Path,
    out: str | Path,
    layout: Layout,
    *,
    labels: str | Path | None = None,
    shard: int = 256,
    strict: bool = False,
    progress: bool = True,
) -> Population:
    """Read every LoRA in ``folder`` and write the population's folder ``out``.

    folder: .safetensors files of kohya, diffusers or cloneofsimo, PEFT folders, and folders of
        diffusers' training scripts; a file's or folder's name is the person's. In natural order.
    layout: the modules kept. What a file adapts besides is told (``outside``) or, with ``strict``,
        refused.
    labels: a CSV or Parquet table with a column of names and a row for each file.
    shard: people in one file of the population; so many are held in memory.

    A file that is damaged, not finite, all zero or of another layout is set aside with the reason.
    Of the others the table of people says: ``format`` and largest ``rank``; ``lost``, the share of
    ||dW||^2 beyond the layout's rank, and ``lost_most``, the same in the worst module;
    ``outside``, the share of the file's energy in modules that are not the layout's;
    ``text_encoder``, the tensors of a text encoder, which are not read; and ``cosine`` with the
    mean of the first shard: near 0 the signs are noise, as of people who share no start.
    A call with the same files goes on after the last shard, to the same bytes. InputError, with
    nothing written: no usable file, labels that do not fit, a folder that holds other things.
    """
    if not 1 <= shard <= 100_000:
        raise InputError(f"shard: wanted 1 to 100,000 people, got {shard}")
    folder = Path(folder)
    files = _files(folder)
    known = None if labels is None else labels_of(labels, list(files))
    first = None
    for about, w in _read(files, layout, strict):
        first = first or about
        if w is not None:
            break
    else:
        raise InputError(
            f"{folder}: none of {len(files)} files is usable; {first['name']!r}: {first['reason']}"
        )
    sizes = {name: _bytes(path) for name, path in files.items()}
    job = {"verb": "collect", "files": sizes, "shard": shard, "strict": strict}
    out = begin(out, layout, job)

    people: list[dict[str, Any]] = []
    shards, mean = 0, None
    while (path := shard_path(out, shards)).exists():
        people += read_about(out, shards)[1]
        if mean is None:
            mean = _mean(read_tensors(path)[0]["w"])
        shards += 1
    rest = {name: files[name] for name in list(files)[len(people) :]}
    waiting: list[dict[str, Any]] = []
    rows: list[Tensor] = []
    bar = tqdm(
        total=len(files), initial=len(people), unit="file", desc="collect", disable=not progress
    )
    with bar:
        for i, (about, w) in enumerate(_read(rest, layout, strict)):
            waiting.append(about)
            if w is not None:
                rows.append(w)
            if len(rows) == shard or (rows and i == len(rest) - 1):
                mean = _close(out, shards, rows, waiting, layout, mean)
                people += waiting
                shards, waiting, rows = shards + 1, [], []
            bar.update()
    people += waiting
    table = None if known is None else _labels(people, *known)
    finish(out, shards, people, table)
    return open_population(out, verify=False)


def _close(
    out: Path,
    i: int,
    rows: list[Tensor],
    people: list[dict[str, Any]],
    layout: Layout,
    mean: Tensor | None,
) -> Tensor:
    """Turn the rows to the mean (their own, in the first shard) and write them as shard i."""
    w = torch.stack(rows)
    cosines = align(w, layout, mean).tolist()
    kept = [about for about in people if not about["reason"]]
    for row, (about, cosine) in enumerate(zip(kept, cosines, strict=True)):
        about |= {"shard": i, "row": row, "cosine": cosine}
    write_shard(out, i, w, [about["name"] for about in kept], people)
    return _mean(w) if mean is None else mean


def _mean(w: Tensor) -> Tensor:
    return w.double().mean(0)


def _labels(people: list[dict[str, Any]], values: Tensor, attributes: list[str]) -> Any:
    """The table of labels of those who were kept; values [n, a] are in the order of people."""
    import pyarrow as pa

    kept = [i for i, about in enumerate(people) if not about["reason"]]
    columns = {a: values[kept, j].numpy() for j, a in enumerate(attributes)}
    return pa.table({"name": [people[i]["name"] for i in kept], **columns})


def _files(folder: Path) -> dict[str, Path]:
    """Name -> what to read, in natural order."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; wanted one with LoRA files")
    found: list[tuple[str, Path]] = []
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if any((path / name).is_file() for name in _PEFT):
                found.append((path.name, path))
            elif (path / _BY_DIFFUSERS).is_file():
                found.append((path.name, path / _BY_DIFFUSERS))
        elif path.suffix.lower() in _SUFFIXES:
            found.append((path.stem, path))
    if not found:
        raise InputError(f"{folder}: no LoRA in it (.safetensors files, folders of PEFT's)")
    check_names(folder, [name for name, _ in found])
    return dict(sorted(found, key=lambda pair: natural(pair[0])))


def _bytes(path: Path) -> int:
    files = [path / name for name in _PEFT] if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _read(
    files: Mapping[str, Path], layout: Layout, strict: bool
) -> Iterator[tuple[dict[str, Any], Tensor | None]]:
    """What is said of each file, and its w [d]; None with a reason for one that is set aside."""
    told = ("format", "rank", "lost", "lost_most", "outside", "text_encoder", "cosine")
    for name, path in files.items():
        about = {"name": name, "shard": None, "row": None, "reason": ""} | dict.fromkeys(told)
        try:
            w, found = _one(read_adapter(path), layout, strict)
        except (InputError, OSError) as error:
            # Without the folder's own place: the same files make the same bytes anywhere.
            about["reason"] = str(error).replace(f"{path.parent}/", "")
            yield about, None
        else:
            yield about | found, w


def _one(adapter: Adapter, layout: Layout, strict: bool) -> tuple[Tensor, dict[str, Any]]:
    """w [d] of an adapter and what the table says of it; InputError for another layout, or zero."""
    wanted = {m.name: (m.in_features, m.out_features) for m in layout.modules}
    missing = [name for name in wanted if name not in adapter.modules]
    extra = [name for name in adapter.modules if name not in wanted]
    widths = {name: (a.shape[1], b.shape[0]) for name, (a, b) in adapter.modules.items()}
    wrong = [name for name in wanted if widths.get(name, wanted[name]) != wanted[name]]
    if missing or wrong or (strict and extra):
        fit = len(wanted) - len(missing) - len(wrong)
        raise InputError(
            f"{fit} of {len(wanted)} modules of the layout fit; missing: {_some(missing)}; of "
            f"other widths: {_some(wrong)}; not in the layout: {_some(extra)}"
        )
    w, energy, lost = canonical(adapter.modules, layout)
    inside = float(energy.sum())
    if not inside:
        raise InputError("all zero: B A changes nothing in any module of the layout")
    outside = sum(_energy(*adapter.modules[name]) for name in extra)
    return w, {
        "format": adapter.format,
        "rank": max(a.shape[0] for a, _ in adapter.modules.values()),
        "lost": float((energy * lost).sum()) / inside,
        "lost_most": float(lost.max()),
        "outside": outside / (inside + outside),
        "text_encoder": adapter.text_encoder_keys,
    }


def _energy(a: Tensor, b: Tensor) -> float:
    """||B A||^2 without forming B A: the trace of (B^T B)(A A^T)."""
    a, b = a.double(), b.double()
    return float(((b.mT @ b) * (a @ a.mT)).sum())
