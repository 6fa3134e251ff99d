"""`invert`: find the person of a photograph in weight space (w2w paper, section 3.4).

Only the coefficients are optimised: photos and prompts are encoded once, the base is frozen, and
many people share a batch, each with an Adam state of its own (`inversion`). One photo leaves much
open: the mask takes the background out of the loss, and the Gaussian prior (the paper has neither a
prior nor whitening: `whiten=False, prior=0`) keeps the answer a plausible person instead of a copy.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..denoise import check_masks, check_prompts, denoiser, warn_of_prompts
from ..encoding import Encoder, fingerprint
from ..errors import InputError
from ..files import new_or_empty
from ..inversion import Inversion
from ..memory import largest_batch
from ..recipe import Recipe
from ..sources import Subject, digest
from ..space import WeightSpace
from .invert_report import write_report

PAPER = {
    "steps": 400,
    "lr": 0.1,
    "weight_decay": 1e-10,
    "prior": 0.0,
    "whiten": False,
    "timesteps": "uniform",
    "average": 0.0,
}
"""The published settings: `invert(space, pipe, photo, **PAPER)`."""


def invert(
    space: WeightSpace,
    pipe,
    photos: Tensor,
    *,
    masks: Tensor | None = None,
    people: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    prompt: str | Sequence[str] = "sks person",
    steps: int = 400,
    lr: float = 0.1,
    weight_decay: float = 1e-10,
    prior: float = 0.0,
    whiten: bool = True,
    timesteps: str = "uniform",
    average: float = 0.0,
    check: int = 0,
    patience: int = 4,
    start: Tensor | None = None,
    seed: int = 0,
    batch: int = 64,
    memory: int | None = None,
    checkpointing: bool = False,
    state: str | Path | None = None,
    save_every: float = 60.0,
    report: str | Path | None = None,
    callback: Callable[[dict], None] | None = None,
    progress: bool = True,
) -> Tensor:
    """The coefficients [k, m] f32 of the k people in the photographs.

    photos: uint8 [p, 3, h, w] at the pipeline's size. masks: [p, 1, h, w] in [0, 1], 1 on the face.
    people: who is on photo i, 0..k-1; by default everybody has one photo. At each step a photo of
        each person is drawn. names: of the k, for messages and the report.
    prompt: the prompt of all photos, or of each; warns of one without the space's own in it.
    lr, weight_decay: Adam's. With `whiten` they act on z, without on c (the paper's setting).
    prior: weight of |z|^2 / 2, divided by m; 0 as in the paper.
    average: the share of the last steps whose iterates are averaged.
    check, patience: every `check` steps each person's loss is looked at under noise that is not
        trained on; after `patience` looks without a new best that person is done. 0: never.
    start: coefficients [k, m] to start from; the population's mean (the paper: zeros) by default.
    batch: people at once; memory: bytes to fit it to instead. checkpointing: of gradients.
    state: a file, written every `save_every` seconds and removed at the end; a second call with
        the same input goes on from it, to the same bits in the same batch.
    report: a new folder for pictures, loss curves and where in the population each person lies.
    callback: see `Inversion`.

    All people see the same noise and timesteps, and nobody's result depends on who else is in the
    batch. The base computes in the pipe's dtype; coefficients are float32. Raises InputError for
    shapes, masks and numbers that do not fit, before any work.
    """
    for name, value in (("prior", prior), ("weight_decay", weight_decay)):
        if not math.isfinite(value) or value < 0:
            raise InputError(f"{name}: wanted a finite number >= 0, got {value!r}")
    if not 1 <= batch <= 4096:
        raise InputError(f"batch: wanted 1 to 4096, got {batch}")
    recipe = Recipe(
        steps=steps, lr=lr, timesteps=timesteps, average=average, prior=0.0, check=check,
        patience=patience, seed=seed,
    )  # fmt: skip
    _check_photos(photos, int(getattr(pipe, "vae_scale_factor", 1)))
    subjects = _subjects(space, photos, masks, people, names, prompt)
    n = len(subjects)
    first = space.mu if start is None else start
    if start is not None and start.shape != (n, space.m):
        raise InputError(f"start: wanted [{n}, {space.m}], got {list(start.shape)}")
    if not bool(torch.isfinite(first).all()):
        raise InputError("start: holds NaN or infinite numbers")
    space.layout.check(denoiser(pipe))
    encoder = Encoder(pipe)
    if report is not None:
        new_or_empty(report)
    known = {"prior": prior, "whiten": whiten, "weight_decay": weight_decay}

    if memory is not None:

        def trial(k: int) -> Inversion:
            return Inversion(pipe, space, subjects[:1] * k, recipe, space.mu, encoder=encoder,
                             batch=k, checkpointing=checkpointing, **known)  # fmt: skip

        batch = largest_batch(trial, memory, min(4096, n))
    job = {**asdict(recipe), **known, "checkpointing": checkpointing}
    if state is not None:
        job |= {
            "photographs": digest(subjects),
            "base": fingerprint(denoiser(pipe)),
            # Mean and spread tell spaces apart; two gigabytes of basis are not read for it.
            "space": fingerprint({"mean": space.mean, "std": space.std, "mu": space.mu}),
            "basis": [str(space.basis.dtype), *space.basis.shape],
            "start": hashlib.sha256(first.detach().float().cpu().numpy().tobytes()).hexdigest(),
        }
    path = None if state is None else Path(state)
    with tqdm(total=n * steps, unit="step", desc="invert", disable=not progress) as bar:
        found, facts = Inversion(
            pipe, space, subjects, recipe, first, encoder=encoder, batch=batch,
            checkpointing=checkpointing, state=path, save_every=save_every, job=job,
            callback=callback, progress=bar, **known,
        ).find()  # fmt: skip
    if report is not None:
        write_report(Path(report), space, pipe, subjects, found, facts)
    if path is not None:
        path.unlink(missing_ok=True)
    return found


def _check_photos(photos: Tensor, step: int) -> None:
    """InputError unless photos are uint8 [p, 3, h, w], p > 0, of sides that `step` divides."""
    kind = type(photos).__name__
    if isinstance(photos, Tensor):
        h, w = photos.shape[-2:] if photos.ndim == 4 and len(photos) else (0, 0)
        if photos.dtype == torch.uint8 and photos.shape[1:2] == (3,) and h and w:
            if h % step or w % step:
                raise InputError(f"photos: wanted sides that {step} divides, got {h} x {w}")
            return
        kind = f"{photos.dtype} {list(photos.shape)}"
    raise InputError(f"photos: wanted a uint8 tensor [p, 3, h, w], got {kind}")


def _subjects(
    space: WeightSpace,
    photos: Tensor,
    masks: Tensor | None,
    people: Sequence[int] | None,
    names: Sequence[str] | None,
    prompt: str | Sequence[str],
) -> list[Subject]:
    """The people, each with the photographs of it; InputError for what does not fit."""
    p = len(photos)
    owner = list(range(p)) if people is None else [int(i) for i in people]
    if len(owner) != p or not p:
        raise InputError(f"people: wanted one number for each of {p} photos (at least 1)")
    k = max(owner) + 1
    if sorted(set(owner)) != list(range(k)):
        raise InputError("people: wanted every number from 0 to k - 1 to have a photo")
    names = [f"person {i}" for i in range(k)] if names is None else list(names)
    if len(names) != k:
        raise InputError(f"names: wanted one for each of {k} people, got {len(names)}")
    prompts = [prompt] * p if isinstance(prompt, str) else list(prompt)
    if len(prompts) != p:
        raise InputError(f"prompt: wanted one, or one for each of {p} photos")
    check_prompts(prompts)
    warn_of_prompts(space.meta.get("prompt"), prompts, stacklevel=4)
    if masks is not None:
        check_masks(masks, p)
        if masks.shape[2:] != photos.shape[2:]:
            wanted, got = list(photos.shape[2:]), list(masks.shape[2:])
            raise InputError(f"masks: wanted the photos' size {wanted}, got {got}")
    rows = [[i for i, who in enumerate(owner) if who == person] for person in range(k)]
    return [
        Subject(
            names[person], photos[mine].cpu(), tuple(prompts[i] for i in mine),
            None if masks is None else masks[mine].cpu(),
        )
        for person, mine in enumerate(rows)
    ]  # fmt: skip
