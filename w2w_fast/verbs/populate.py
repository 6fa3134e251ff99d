"""`populate`: fine-tune one base model to many people (w2w paper, section 3.1), resumably.

The subjects are cut into shards, in their order; a shard is trained by `training.Training` and
written whole. Whoever trains a shard holds its lock, so that several processes may work on one
folder: each takes what nobody has, and takes over what a killed one left, from its last state.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .. import population
from ..denoise import denoiser
from ..encoding import Encoded, Encoder, fingerprint
from ..errors import InputError
from ..files import MANIFEST, read_tensors, write_tensors
from ..labels import labels_table
from ..layout import Layout
from ..memory import largest_batch
from ..population import Population, shard_path
from ..sharing import locked, share
from ..sources import Subject, digest
from ..training import Recipe, Training, initial_adapter

if TYPE_CHECKING:
    from pyarrow import Table

    from ..sources import Listing

START, CLASS = "start.safetensors", "class.safetensors"


@dataclass(frozen=True)
class Listed(Sequence[Subject]):
    """The subjects of a listing on disk, each read when it is asked for.

    Photographs become size x size; prompt serves where a photo has none of its own.
    """

    listing: Listing
    size: int
    prompt: str

    @property
    def names(self) -> list[str]:
        return self.listing.names

    @property
    def digest(self) -> str:
        return hashlib.sha256(
            json.dumps([self.listing.digest, self.size, self.prompt]).encode()
        ).hexdigest()

    def __len__(self) -> int:
        return len(self.listing.names)

    def __getitem__(self, i: int) -> Subject:
        return self.listing.read(i, self.size, self.prompt)


@dataclass(frozen=True)
class _Part(Sequence[Subject]):
    """Some neighbours of a sequence of subjects, still read one by one."""

    subjects: Sequence[Subject]
    names: list[str]
    first: int

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Subject:
        return self.subjects[self.first + i]


def populate(
    pipe,
    subjects: Sequence[Subject],
    layout: Layout,
    out: str | Path,
    *,
    recipe: Recipe | None = None,
    start: Tensor | None = None,
    batch: int = 64,
    memory: int | None = None,
    shard: int | None = None,
    labels: str | Path | None = None,
    bf16: bool = False,
    checkpointing: bool = False,
    cache: str | Path | None = None,
    save_every: float = 60.0,
    progress: bool = True,
) -> Population:
    """Train an adapter for every subject, into a population's folder `out`.

    pipe: a Stable Diffusion pipeline; its VAE and text encoder run once a photograph and prompt.
    subjects: in the order of the population; `Listed` reads them from disk one by one.
    recipe: the paper's by default. start: the adapter w [d] everybody starts from
        (`initial_adapter` by default; the mean of an earlier population makes the map from person
        to weights smoother).
    batch: subjects trained together; rows do not influence one another. memory: bytes to fit the
        batch to instead. shard: subjects a file, 256 by default.
    labels: a CSV or Parquet table, joined by name, that is kept beside the people.
    bf16: autocast. checkpointing: of gradients. cache: where encoded photographs are kept for
        other runs too; without it they go with their shard.
    save_every: seconds between two states of the shard in work: what a kill costs at most.

    A second call with the same subjects and settings goes on where the first was killed, to the
    same bytes; two at once share the work. Subjects that cannot be read or whose adapter is not
    finite are set aside, with the reason in the table of people. InputError for what does not fit,
    before anything is written.
    """
    recipe, out = recipe or Recipe(), Path(out)
    names = _names(subjects)
    layout.check(denoiser(pipe))
    table = None if labels is None else labels_table(labels, names)
    start = initial_adapter(layout, recipe.seed) if start is None else start.detach().cpu().float()
    if start.shape != (layout.size,) or not torch.isfinite(start).all():
        raise InputError(
            f"start: wanted a finite adapter [{layout.size}], got {tuple(start.shape)}"
        )
    options: dict[str, Any] = {"bf16": bf16, "checkpointing": checkpointing}
    if memory is not None:
        batch = _recorded_batch(out) or _fitting(pipe, layout, subjects, recipe, start, options,
                                                 memory)  # fmt: skip
    shard = max(256, batch) if shard is None else shard
    for name, value, most in (("batch", batch, 4096), ("shard", shard, 65_536)):
        if not 1 <= value <= most:
            raise InputError(f"{name}: wanted 1 to {most}, got {value}")
    job = {
        "verb": "populate",
        "recipe": asdict(recipe),
        "start": hashlib.sha256(start.numpy().tobytes()).hexdigest(),
        "batch": batch,
        "shard": shard,
        "people": len(names),
        "prompt": getattr(subjects, "prompt", None),
        "subjects": digest(subjects),
        "base": fingerprint(denoiser(pipe)),
        "labels": None if table is None else _table_digest(table),
        **options,
    }
    folder = population.begin(out, layout, job)
    if _finished(folder):
        return population.open_population(folder)
    if not (folder / START).exists():
        write_tensors(folder / START, {"w": start})
    encoder = Encoder(pipe, cache)
    prior = _class_photos(pipe, recipe, encoder, folder, progress) if recipe.prior else None
    parts = [_Part(subjects, names[i : i + shard], i) for i in range(0, len(names), shard)]
    with tqdm(
        total=len(names) * recipe.steps, unit="step", desc="populate", disable=not progress
    ) as bar:
        pieces = share(
            folder, len(parts),
            done=lambda i: shard_path(folder, i).exists(),
            seen=lambda i: bar.update(len(parts[i]) * recipe.steps),
        )  # fmt: skip
        for i, held in pieces:
            with held:
                own = folder / f".cache-{i:05d}"
                training = Training(
                    pipe, layout, parts[i], recipe, start, batch=batch, class_photos=prior,
                    encoder=encoder if cache is not None else Encoder(pipe, own),
                    state=folder / f".state-{i:05d}.safetensors", save_every=save_every,
                    progress=bar, **options,
                )  # fmt: skip
                w, people = training.run()
                kept = [person["name"] for person in people if not person["reason"]]
                population.write_shard(folder, i, w, kept, people)
                shutil.rmtree(own, ignore_errors=True)
    _close(folder, len(parts), table)
    return population.open_population(folder)


def recorded(out: str | Path) -> dict[str, Any]:
    """The settings of a population that was begun: `populate`'s, its layout and the prompt."""
    record = population.read_record(Path(out))
    job = record["job"]
    if job.get("verb") != "populate":
        raise InputError(f"{out}: a population that populate did not make")
    settings = {key: job[key] for key in ("batch", "shard", "bf16", "checkpointing", "prompt")}
    layout = Layout.from_json(record["layout"])
    expect = {"w": ((layout.size,), {torch.float32})}
    settings["start"] = read_tensors(Path(out) / START, expect=expect)[0]["w"]
    return settings | {"recipe": Recipe(**job["recipe"]), "layout": layout}


# --- the job --------------------------------------------------------------------------------------


def _close(folder: Path, shards: int, labels: Table | None) -> None:
    """Finish the population, once, and leave nothing beside it."""
    with locked(folder, "finish"):
        if not _finished(folder):
            people = []
            for i in range(shards):
                names, facts = population.read_about(folder, i)
                where = {name: row for row, name in enumerate(names)}
                for fact in facts:
                    row = where.get(fact["name"])
                    people.append({"name": fact["name"], "shard": None if row is None else i,
                                   "row": row, **fact})  # fmt: skip
            if all(person["reason"] for person in people):
                raise InputError(
                    f"{folder}: nobody is left of {len(people)} subjects; the first, "
                    f"{people[0]['name']}: {people[0]['reason']}"
                )
            # What a killed process left, and what was only needed on the way.
            for path in folder.glob(".*"):
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.suffix != ".lock":
                    path.unlink()
            population.finish(folder, shards, people, labels)
    for path in folder.glob(".*.lock"):
        path.unlink(missing_ok=True)


def _finished(folder: Path) -> bool:
    # The manifest comes last: a process may have been killed between the record and it.
    return bool(population.read_record(folder).get("finished")) and (folder / MANIFEST).exists()


def _names(subjects: Sequence[Subject]) -> list[str]:
    names = getattr(subjects, "names", None) or [subject.name for subject in subjects]
    if not names or len(set(names)) != len(names):
        raise InputError("subjects: wanted at least one, each with a name of its own")
    return names


def _table_digest(table: Table) -> str:
    return hashlib.sha256(json.dumps(table.to_pydict()).encode()).hexdigest()


def _recorded_batch(out: Path) -> int | None:
    """The batch of a job that is there: resumed with another, it would be another job."""
    if not (out / population.RECORD).exists():
        return None
    batch = population.read_record(out).get("job", {}).get("batch")
    return batch if isinstance(batch, int) else None


def _fitting(
    pipe, layout: Layout, subjects: Sequence[Subject], recipe: Recipe, start: Tensor,
    options: dict[str, Any], memory: int,
) -> int:  # fmt: skip
    """The largest batch for so many bytes, tried on the first subject that can be read."""
    first, reason = None, None
    for i in range(len(subjects)):
        try:
            first = subjects[i]
            break
        except InputError as error:
            reason = reason or error
    if first is None:
        raise reason
    recipe = replace(recipe, class_images=1)
    encoder = Encoder(pipe)
    encoded = encoder(first)
    prior = Encoded(encoded.latents[:1], encoded.text[:1]) if recipe.prior else None

    def training(k: int) -> Training:
        return Training(pipe, layout, [first] * k, recipe, start, batch=k, class_photos=prior,
                        encoder=encoder, **options)  # fmt: skip

    return largest_batch(training, memory, min(4096, len(subjects)))


def _class_photos(pipe, recipe: Recipe, encoder: Encoder, folder: Path, progress: bool) -> Encoded:
    """Pictures of the class by the base model itself, as latents, made once (DreamBooth, 3.2)."""
    n, path = recipe.class_images, folder / CLASS
    text = [encoder.text(recipe.class_prompt)] * n
    with locked(folder, "class"):
        if not path.exists():
            parts, shown = [], getattr(pipe, "_progress_bar_config", {})
            pipe.set_progress_bar_config(**{**shown, "disable": True})
            try:
                batches = tqdm(
                    torch.arange(n).split(16), desc="class pictures", disable=not progress
                )
                for part in batches:
                    generators = [torch.Generator().manual_seed(int(i)) for i in part]
                    with torch.no_grad():
                        made = pipe([recipe.class_prompt] * len(part), generator=generators,
                                    output_type="latent")  # fmt: skip
                    parts.append(made.images.float().cpu())
            finally:
                pipe.set_progress_bar_config(**shown)
            write_tensors(path, {"latents": torch.cat(parts)})
    latents = read_tensors(path, mmap=False)[0]["latents"]
    return Encoded(latents.to(text[0].device), text)
