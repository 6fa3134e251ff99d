"""`populate`: fine-tune one base model to many people at once (w2w paper, section 3.1).

DreamBooth with rank-1 adapters, K subjects in ONE batch on one frozen base: the adapters are a
flat [K, d] tensor, so one Adam step is K independent optimisers. Every subject starts from the
same adapter and sees the same sequence of timesteps, noise and photo choices (common random
numbers); without that the population's spread is training noise and no weight space appears.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..attach import attach
from ..denoise import (
    MOST_CHARACTERS,
    Photos,
    check_masks,
    check_prompts,
    check_seed,
    denoiser,
    device_of,
    draw_timesteps,
    encode_images,
    encode_prompts,
    frozen,
    losses,
    shrink_masks,
)
from ..errors import InputError
from ..files import (
    check_manifest,
    read_image,
    read_json,
    read_tensors,
    write_json,
    write_manifest,
    write_tensors,
)
from ..layout import Layout

PHOTO_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Subject:
    """One person: a name, photographs uint8 [p, 3, h, w], and a prompt for each.

    masks [p, 1, h, w] in [0, 1] say how much each pixel counts in the loss: where the person is
    one learns the person, in fewer steps, and not the places.
    """

    name: str
    images: Tensor
    prompts: tuple[str, ...]
    masks: Tensor | None = None

    def __post_init__(self) -> None:
        images, p = self.images, len(self.prompts)
        photos = images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] == 3
        if not photos or images.shape[0] != p or not p:
            raise InputError(
                f"subject {self.name!r}: wanted uint8 images [p, 3, h, w] and p > 0 prompts, "
                f"got {images.dtype} {tuple(images.shape)} and {p} prompts"
            )
        if self.masks is not None:
            check_masks(self.masks, p)


@dataclass(frozen=True)
class Recipe:
    """How each subject is trained. The defaults are the paper's; `demo.build` shows others.

    train: "AB", or "B" with A shared and frozen (delta W is then linear in the adapter).
    timesteps: "uniform", or "early" (high noise, where identity is decided, more often).
    average: the share of the last steps whose iterates are averaged; 0 keeps the last one.
    """

    steps: int = 800
    lr: float = 1e-4
    eps: float = 1e-8
    train: str = "AB"
    timesteps: str = "uniform"
    average: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)
        good = {
            "steps": 1 <= self.steps <= 100_000,
            "lr": math.isfinite(self.lr) and self.lr > 0,
            "eps": math.isfinite(self.eps) and self.eps > 0,
            "train": self.train in ("AB", "B"),
            "timesteps": self.timesteps in ("uniform", "early"),
            "average": 0 <= self.average < 1,
        }
        for name, ok in good.items():
            if not ok:
                raise InputError(f"recipe: {name}={getattr(self, name)!r} is out of range")


def initial_adapter(layout: Layout, seed: int = 0) -> Tensor:
    """The start every subject shares, w [d]: A uniform in +-1/sqrt(in), B zero, as in PEFT."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.zeros(layout.size)
    for module, (a, _) in zip(layout.modules, layout.slices(), strict=True):
        bound = module.in_features**-0.5
        w[a] = (torch.rand(a.stop - a.start, generator=generator) * 2 - 1) * bound
    return w


def train_batch(
    pipe,
    layout: Layout,
    subjects: Sequence[Photos],
    recipe: Recipe,
    start: Tensor,
    *,
    bf16: bool = False,
    progress: tqdm | None = None,
) -> Tensor:
    """Train K subjects together: w [K, d] f32. Rows do not influence one another."""
    device, k = device_of(pipe), len(subjects)
    generator = torch.Generator().manual_seed(recipe.seed)
    counts = torch.tensor([len(photos) for photos in subjects])
    offsets = (counts.cumsum(0) - counts).to(device)
    everything = Photos(
        torch.cat([photos.latents for photos in subjects]),
        torch.cat([photos.text for photos in subjects]),
        None if subjects[0].masks is None else torch.cat([photos.masks for photos in subjects]),
    )
    w = start.to(device, torch.float32).expand(k, -1).clone().requires_grad_()
    trained = torch.ones(layout.size, device=device)
    if recipe.train == "B":
        for a, _ in layout.slices():
            trained[a] = 0
    optimiser = torch.optim.Adam([w], lr=recipe.lr, eps=recipe.eps)
    keep_from = recipe.steps - max(1, round(recipe.average * recipe.steps))
    total = torch.zeros_like(w, dtype=torch.float64)
    train_steps = pipe.scheduler.config.num_train_timesteps
    shape = everything.latents.shape[1:]
    model = denoiser(pipe)
    with frozen(model), attach(model, layout) as live:
        live.adapters = w
        for step in range(recipe.steps):
            t = draw_timesteps(1, train_steps, recipe.timesteps, generator).to(device)
            noise = torch.randn(1, *shape, generator=generator).to(device)
            which = (torch.rand(1, generator=generator) * counts).long().to(device)
            photos = everything.take(offsets + which)
            loss = losses(pipe, photos, noise.expand(k, *shape), t.expand(k), bf16=bf16)
            optimiser.zero_grad(set_to_none=True)
            loss.sum().backward()
            w.grad.mul_(trained)
            optimiser.step()
            if step >= keep_from:
                total += w.detach()
            if progress is not None:
                progress.update(k)
                if step % 10 == 0:
                    progress.set_postfix(loss=f"{loss.detach().mean():.4f}")
    return (total / (recipe.steps - keep_from)).float().cpu()


def populate(
    pipe,
    subjects: Sequence[Subject],
    layout: Layout,
    out: str | Path | None = None,
    *,
    recipe: Recipe | None = None,
    start: Tensor | None = None,
    batch: int = 64,
    bf16: bool = False,
    progress: bool = True,
) -> tuple[Tensor, list[str]]:
    """Train an adapter for every subject: (w [n, d] f32 on the CPU, their names).

    pipe: a Stable Diffusion pipeline; its VAE and text encoder run once a photograph.
    start: the adapter w [d] everybody starts from (`initial_adapter` by default; the mean of an
        earlier population makes the map from person to weights smoother).
    batch: subjects trained together. Memory only: rows do not influence one another.
    out: a folder; each finished batch is a shard there, and a second call with the same
        subjects and settings goes on after the last one.

    A subject whose adapter is not finite is left out of the result and named in
    `population.json`. Raises InputError for subjects, recipes or folders that do not fit.
    """
    recipe = recipe or Recipe()
    names = [subject.name for subject in subjects]
    if not subjects or len(set(names)) != len(names):
        raise InputError("subjects: wanted at least one, each with a name of its own")
    if not 1 <= batch <= 4096:
        raise InputError(f"batch: wanted 1 to 4096, got {batch}")
    layout.check(denoiser(pipe))
    for subject in subjects:
        check_prompts(subject.prompts)
    unmasked = [subject.name for subject in subjects if subject.masks is None]
    if len(unmasked) not in (0, len(subjects)):
        raise InputError(f"subjects: wanted masks for all or for none, {unmasked[0]!r} has none")
    start = initial_adapter(layout, recipe.seed) if start is None else start.detach().cpu()
    if start.shape != (layout.size,) or not torch.isfinite(start).all():
        raise InputError(
            f"start: wanted a finite adapter [{layout.size}], got {tuple(start.shape)}"
        )
    job = {
        "layout": layout.to_json(),
        "recipe": asdict(recipe),
        "start": hashlib.sha256(start.float().numpy().tobytes()).hexdigest(),
        "batch": batch,
        "names": names,
        "photos": _fingerprint(subjects),
    }
    folder = None if out is None else _open_job(Path(out), job)
    groups = [subjects[i : i + batch] for i in range(0, len(subjects), batch)]
    rows: list[Tensor] = []
    total = len(subjects) * recipe.steps
    with tqdm(total=total, unit="step", desc="populate", disable=not progress) as bar:
        for i, group in enumerate(groups):
            shard = folder and folder / f"shard-{i:05d}.safetensors"
            if shard and shard.exists():
                expect = {"w": ((len(group), layout.size), {torch.float32})}
                w = read_tensors(shard, expect=expect, finite=False)[0]["w"]
                bar.update(len(group) * recipe.steps)
            else:
                encoded = [_encoded(pipe, subject) for subject in group]
                w = train_batch(pipe, layout, encoded, recipe, start, bf16=bf16, progress=bar)
                if shard:
                    write_tensors(shard, {"w": w}, {"names": json.dumps([s.name for s in group])})
            rows.append(w)
    w = torch.cat(rows)
    finite = torch.isfinite(w).all(1)
    kept = [name for name, ok in zip(names, finite.tolist(), strict=True) if ok]
    if folder:
        diverged = [name for name in names if name not in set(kept)]
        write_json(folder / "population.json", job | {"finished": True, "diverged": diverged})
        write_manifest(folder)
    return w[finite], kept


def read_population(folder: str | Path) -> tuple[Tensor, Layout, list[str]]:
    """A finished population: (w [n, d], its layout, names), every file checked."""
    folder = Path(folder)
    job = read_json(folder / "population.json")
    if not isinstance(job, dict) or not job.get("finished"):
        raise InputError(f"{folder}: this population is not finished; run populate again to go on")
    check_manifest(folder)
    layout = Layout.from_json(job["layout"])
    rows = []
    for i in range(math.ceil(len(job["names"]) / job["batch"])):
        expect = {"w": ((None, layout.size), {torch.float32})}
        path = folder / f"shard-{i:05d}.safetensors"
        rows.append(read_tensors(path, expect=expect, finite=False)[0]["w"])
    w = torch.cat(rows)
    if len(w) != len(job["names"]):
        raise InputError(f"{folder}: {len(w)} adapters for {len(job['names'])} names")
    finite = torch.isfinite(w).all(1)
    return w[finite], layout, [n for n, ok in zip(job["names"], finite, strict=True) if ok]


def read_subjects(folder: str | Path, prompt: str, size: int) -> list[Subject]:
    """One sub-folder a subject, in alphabetical order; `photo.txt` beside a photo is its prompt.

    A grey `photo.mask.png` beside it says how much each pixel counts in the loss (white: fully).
    Photographs and masks are cropped to the centre square and scaled to size x size. InputError
    where a sub-folder has no photo, or some photos of a subject have masks and others have none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; wanted one with a sub-folder for each subject")
    subjects = []
    for sub in sorted(p for p in folder.iterdir() if p.is_dir()):
        pictures = sorted(p for p in sub.iterdir() if p.suffix.lower() in PHOTO_SUFFIXES)
        photos = [path for path in pictures if not path.stem.endswith(".mask")]
        if not photos:
            raise InputError(f"{sub}: no photo ({', '.join(PHOTO_SUFFIXES)}) in it")
        images = torch.stack([photo_tensor(path, size) for path in photos])
        beside = [path.with_suffix(".txt") for path in photos]
        prompts = tuple(_read_prompt(p) if p.exists() else prompt for p in beside)
        subjects.append(Subject(sub.name, images, prompts, _read_masks(photos, size)))
    if not subjects:
        raise InputError(f"{folder}: no sub-folders; wanted one for each subject")
    return subjects


def _read_masks(photos: Sequence[Path], size: int) -> Tensor | None:
    beside = [path.with_suffix(".mask.png") for path in photos]
    missing = [path for path in beside if not path.exists()]
    if len(missing) == len(beside):
        return None
    if missing:
        raise InputError(
            f"{missing[0]}: missing; wanted a mask for each photo of {beside[0].parent}"
        )
    grey = torch.stack([photo_tensor(path, size) for path in beside]).float().mean(1, keepdim=True)
    return grey / 255


def _read_prompt(path: Path) -> str:
    if path.stat().st_size > 4 * MOST_CHARACTERS:
        raise InputError(f"{path}: wanted a prompt of at most {MOST_CHARACTERS:,} characters")
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text: {error}") from None


def photo_tensor(source: str | Path | bytes, size: int) -> Tensor:
    """A photograph as uint8 [3, size, size]: centre square, area-averaged."""
    from PIL import Image, ImageOps

    image = ImageOps.fit(read_image(source), (size, size), Image.Resampling.BOX)
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return data.view(size, size, 3).permute(2, 0, 1).contiguous()


def _encoded(pipe, subject: Subject) -> Photos:
    latents = encode_images(pipe, subject.images)
    masks = None if subject.masks is None else shrink_masks(subject.masks, latents)
    return Photos(latents, encode_prompts(pipe, subject.prompts), masks)


def _fingerprint(subjects: Sequence[Subject]) -> str:
    digest = hashlib.sha256()
    for subject in subjects:
        digest.update(json.dumps([subject.name, subject.prompts]).encode())
        digest.update(subject.images.contiguous().numpy().tobytes())
        if subject.masks is not None:
            digest.update(subject.masks.float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _open_job(folder: Path, job: dict) -> Path:
    """Start the job's folder, or take up one that was started with the same job."""
    record = folder / "population.json"
    if not record.exists():
        if folder.exists() and any(folder.iterdir()):
            raise InputError(f"{folder}: not empty and not a population; give another folder")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(record, job | {"finished": False})
        return folder
    old = read_json(record)
    different = [key for key, value in job.items() if old.get(key) != json.loads(json.dumps(value))]
    if different:
        raise InputError(
            f"{folder}: holds a population made with another {', '.join(different)}; "
            "give another folder, or the same settings to go on"
        )
    return folder
