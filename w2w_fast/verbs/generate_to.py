"""`generate_to`: pictures of many people into a gallery's folder, as a job that resumes.

The images are cut into pieces of one batch, in their order. Whoever makes a piece holds its lock
until it is written, which happens in the background while the next one is denoised: several
processes may work on one folder, each takes what nobody has, and what a killed one left.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .. import __version__, gallery
from ..coefficients import read_coefficients
from ..denoise import check_prompts, check_seed, denoiser, warn_of_prompts
from ..encoding import fingerprint
from ..errors import InputError
from ..gallery import Draft, Gallery
from ..prepared import Prepared, Requests
from ..sharing import share
from ..space import WeightSpace
from .edit import edit, parse_amounts
from .generate import check_numbers, fitting_batch

if TYPE_CHECKING:
    from PIL.Image import Image


def generate_to(
    space: WeightSpace,
    pipe,
    coefficients: Tensor,
    out: str | Path,
    prompts: str | Sequence[str] = "sks person",
    *,
    per_identity: int | None = None,
    edits: str = "",
    seed: int = 0,
    steps: int = 50,
    guidance: float = 3.0,
    identity_guidance: bool = False,
    strength: float = 1.0,
    before: Tensor | None = None,
    start: int | Sequence[int] | None = None,
    scheduler=None,
    batch: int = 32,
    memory: int | None = None,
    tiling: bool = False,
    compile: bool = False,
    format: str = "png",
    progress: bool = True,
) -> Gallery:
    """Pictures of many people into a gallery's folder `out`, resumably (see `w2w_fast.gallery`).

    coefficients: the people, [k, m].
    prompts: each person's images have them in turn; per_identity: images of each, by default one a
        prompt. Image i is of person i // per_identity, its seed is seed + i.
    edits: as of `w2w edit`, "beard=+1.5,hold=age", of everybody.
    before, start: delayed edit, as of `generate`: who they are while the timestep is above `start`,
        by default those who were not edited. start: a timestep, or one a person.
    memory: bytes to fit the batch to, when the gallery is begun; who resumes it takes that batch.
    format: "png" (what made an image is in its text), "webp", "jpeg", or "tar": PNGs in webdataset
        shards of about 1,000 images.
    The rest is as of `generate`; batch is at most two in memory, one of them being written.

    A second call with the same people and settings goes on where the first was killed; several at
    once share the work, a batch at a time. The batches' composition is the job's: on one kind of
    machine, with one number of threads, every file has the same bytes however often it was killed
    and whoever made it. InputError for what does not fit, before anything is written, and for a
    folder with another job or with other things.
    """
    prompts, out = [prompts] if isinstance(prompts, str) else list(prompts), Path(out)
    if coefficients.ndim != 2 or not len(coefficients) or not coefficients.isfinite().all():
        raise InputError(
            f"coefficients: wanted finite numbers [k, {space.m}] of at least one person, "
            f"got {list(coefficients.shape)}"
        )
    each = len(prompts) if per_identity is None else per_identity
    n = len(coefficients) * each
    if type(each) is not int or not 1 <= n <= gallery.MOST_IMAGES or not prompts:
        raise InputError(
            f"wanted 1 to {gallery.MOST_IMAGES:,} images and a prompt, got {len(coefficients):,} "
            f"people x {each!r} and {len(prompts)} prompts"
        )
    if format not in gallery.SUFFIXES:
        raise InputError(f"format: wanted one of {', '.join(gallery.SUFFIXES)}, got {format!r}")
    check_prompts(prompts)
    if len(json.dumps(prompts)) > 8 << 20:  # they go into the record, which is read as a whole
        raise InputError(f"prompts: wanted at most 8 MiB in all, got {len(prompts):,} prompts")
    check_seed(seed)
    check_seed(seed + n - 1)
    check_numbers(steps, guidance, batch)
    people, first, starts = _people(space, coefficients, edits, before, start)
    if not isinstance(strength, (int, float)) or not math.isfinite(strength):
        raise InputError(f"strength: wanted a finite number, got {strength!r}")
    warn_of_prompts(space.meta.get("prompt"), prompts)
    settings = {
        "steps": steps, "guidance": guidance, "identity_guidance": identity_guidance,
    }  # fmt: skip
    used = scheduler or pipe.scheduler
    made = {
        "edits": edits, "scheduler": type(used).__name__, **settings, "strength": strength,
        "versions": _versions(),
    }  # fmt: skip

    def record(i: int) -> dict[str, Any]:
        who, prompt = i // each, prompts[i % each % len(prompts)]
        return {"row": who, "prompt": prompt, "seed": seed + i, "start": starts[who], **made}

    def requests(i: range) -> Requests:
        rows = [record(j) for j in i]
        who = [row["row"] for row in rows]
        return Requests(
            people[who], [row["prompt"] for row in rows], [row["seed"] for row in rows],
            torch.full([len(i)], float(strength)), None if first is None else first[who],
            torch.tensor([row["start"] or 0 for row in rows], dtype=torch.float32),
        )  # fmt: skip

    options = {**settings, "scheduler": scheduler, "tiling": tiling}
    depends = _depends(space, pipe, used)
    with ExitStack() as alone:
        if memory is not None:
            alone.enter_context(gallery.beginning(out))
            batch = gallery.recorded_batch(out) or fitting_batch(
                space, pipe, requests(range(1)), memory, n, **options
            )
        with Prepared(space, pipe, compile=compile and min(batch, n), **options) as prepared:
            job = {
                **made, "start": start, "images": n, "per_identity": each, "prompts": prompts,
                "seed": seed, "batch": batch, "format": format, "tiling": tiling,
                "compile": compile, **depends,
                "coefficients": fingerprint({"before": coefficients, "after": people}),
                "before": None if before is None else fingerprint({"before": before}),
            }  # fmt: skip
            gallery.begin(out, job, coefficients, before)
            alone.close()
            if gallery.is_finished(out) and not any(out.glob(".*")):
                return gallery.open_gallery(out)
            draft = Draft(out, n, batch, format, record)
            with tqdm(total=n, unit="image", desc="generate", disable=not progress) as bar:
                _work(draft, lambda i: prepared.make(requests(i)), lambda i: bar.update(len(i)))
    draft.finish()
    return gallery.open_gallery(out, verify=False)


def _work(draft: Draft, make: Callable[[range], list[Image]], told: Callable[[range], Any]) -> None:
    """Make every piece that nobody else does; a thread writes one while the next is made.

    Adapters are not reconstructed ahead: of 32 people of the world that ships that is 3 ms, and
    their pictures take seconds.
    """

    def write(piece: int, images: list[Image], held: ExitStack) -> None:
        with held:
            draft.write(piece, images)

    with ThreadPoolExecutor(1) as background:
        written: Future | None = None
        pieces = share(
            draft.folder, draft.pieces, done=draft.done, seen=lambda piece: told(draft.rows(piece))
        )
        for piece, lock in pieces:
            with ExitStack() as held:
                held.enter_context(lock)
                images = make(draft.rows(piece))
                if written is not None:
                    written.result()
                written = background.submit(write, piece, images, held.pop_all())
            told(draft.rows(piece))
        if written is not None:
            written.result()


def _people(
    space: WeightSpace,
    coefficients: Tensor,
    edits: str,
    before: Tensor | None,
    start: int | Sequence[int] | None,
) -> tuple[Tensor, Tensor | None, list[int | None]]:
    """Who they are, edited; who before a delayed edit sets in; when it does: [k, m] twice, [k]."""
    amounts, hold = parse_amounts(edits)
    if edits and not amounts:
        raise InputError(f"edits: {edits!r}: wanted attribute=amount, as in beard=+1.5")
    people, k = edit(space, coefficients, amounts, hold=hold), len(coefficients)
    if start is None and before is None:
        return people, None, [None] * k
    starts = list(start) if isinstance(start, Sequence) else [start] * k
    fits = len(starts) == k and all(type(t) is int and abs(t) < 1 << 20 for t in starts)
    if not fits or (before is None and not edits):
        raise InputError(
            f"start: wanted a timestep, or one of each of {k} people, with before or edits, got "
            f"{str(start)[:100]}"
        )
    first = coefficients if before is None else before
    if first.shape != people.shape or not first.isfinite().all():
        wanted, got = list(people.shape), list(first.shape)
        raise InputError(f"before: wanted finite numbers {wanted}, as the coefficients, got {got}")
    return people, first.to(people), starts


def recorded(out: str | Path) -> dict[str, Any]:
    """The people and settings of a gallery that was begun: `generate_to`'s, the scheduler by name.

    And the dtype of its denoiser, "float32", which is the pipeline's.
    """
    folder = Path(out)
    job = gallery.read_record(folder)["job"]
    names = (
        "prompts", "per_identity", "edits", "seed", "steps", "guidance", "identity_guidance",
        "strength", "start", "scheduler", "batch", "tiling", "compile", "format", "dtype",
    )  # fmt: skip
    if missing := [name for name in names if name not in job]:
        raise InputError(f"{folder / gallery.RECORD}: the job lacks {', '.join(missing)}")
    settings = {name: job[name] for name in names}
    settings["coefficients"] = read_coefficients(folder / gallery.PEOPLE)
    if job.get("before"):
        settings["before"] = read_coefficients(folder / gallery.BEFORE)
    return settings


def _depends(space: WeightSpace, pipe, scheduler) -> dict[str, Any]:
    """What the pictures depend on besides the settings: models, space, schedule, device."""
    parts = {"mean": space.mean, "std": space.std, "basis": space.basis}
    if space.row_scale is not None:
        parts["row_scale"] = space.row_scale
    models = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    config = {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
    schedule = json.dumps(config, sort_keys=True, default=str)
    return {
        "space": fingerprint(parts),
        "base": {name: fingerprint(model) for name, model in models.items()},
        "schedule": hashlib.sha256(schedule.encode()).hexdigest(),
        "device": denoiser(pipe).device.type,
        "dtype": str(denoiser(pipe).dtype).removeprefix("torch."),
    }


def _versions() -> str:
    import diffusers
    import PIL

    found = {"w2w_fast": __version__, "torch": torch.__version__,
             "diffusers": diffusers.__version__, "pillow": PIL.__version__}  # fmt: skip
    return ", ".join(f"{name} {version}" for name, version in found.items())
