"""`generate`: pictures of many different people in one batch (`generate_to`: into a folder).

Every image has a seed, and its noise comes from that seed alone: the same picture can be made
again by itself, to the rounding of another batch size: in float32 a step of 1/255 at most, in a
channel of a pixel here and there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..denoise import check_prompts, check_seed, warn_of_prompts
from ..errors import InputError
from ..memory import fitting, peak_of
from ..prepared import Prepared, Requests
from ..space import WeightSpace


def generate(
    space: WeightSpace,
    pipe,
    coefficients: Tensor,
    prompts: str | Sequence[str] = "sks person",
    *,
    seeds: int | Sequence[int] = 0,
    steps: int = 50,
    guidance: float = 3.0,
    identity_guidance: bool = False,
    strength: float | Tensor = 1.0,
    before: Tensor | None = None,
    start: float | Sequence[float] | Tensor = 0,
    scheduler=None,
    batch: int = 32,
    memory: int | None = None,
    tiling: bool = False,
    compile: bool = False,
    progress: bool = True,
    callback: Callable[[int, int], None] | None = None,
    **pipe_options,
) -> list:
    """One PIL image for each row of coefficients [k, m].

    prompts: one for all, or one an image; warns of one without the space's own in it.
    seeds: one an image, or a number s for s, s + 1, ...
    guidance: classifier-free guidance; with `identity_guidance` its unconditional rows run without
        the adapter, so that guidance pulls towards the person as well as towards the prompt.
    strength: of the adapters, a number or [k].
    before, start: delayed edit (w2w paper, section 3.3): the unedited coefficients `before` [k, m]
        are used while the timestep is above `start`, a number or [k], `coefficients` from there on.
        For pipelines that run the whole schedule, as text to image does.
    scheduler: any diffusers scheduler; the pipeline's own by default.
    batch: images at once; memory: bytes to fit it to instead.
    tiling: the VAE's tiling and slicing (diffusers): less memory, other pixels in large pictures.
    compile: the denoiser by torch.compile, on a GPU as CUDA graphs: once a call, which takes a
        minute or more. All batches are of one size then, the last one filled up with its last row.
    callback: given (images done, images wanted) after each batch.
    pipe_options: passed on to the pipeline (height, width, negative_prompt, ...).

    Raises InputError for shapes and numbers that do not fit.
    """
    requests = checked_requests(space, coefficients, prompts, seeds, strength, before, start)
    check_numbers(steps, guidance, batch)
    warn_of_prompts(space.meta.get("prompt"), requests.prompts)
    k = len(requests)
    options = {
        "steps": steps, "guidance": guidance, "identity_guidance": identity_guidance,
        "scheduler": scheduler, "tiling": tiling, **pipe_options,
    }  # fmt: skip
    if memory is not None and k:
        batch = fitting_batch(space, pipe, requests.take([0]), memory, k, **options)
    images: list = []
    bar = tqdm(total=k, unit="image", desc="generate", disable=not progress)
    with bar, Prepared(space, pipe, compile=compile and min(batch, k), **options) as prepared:
        for first in range(0, k, batch):
            made = prepared.make(requests.take(list(range(first, min(first + batch, k)))))
            images.extend(made)
            bar.update(len(made))
            if callback is not None:
                callback(len(images), k)
    return images


def check_numbers(steps: int, guidance: float, batch: int) -> None:
    """InputError for what no pipeline is asked for."""
    if not math.isfinite(guidance):
        raise InputError(f"guidance: wanted a finite number, got {guidance!r}")
    if not 1 <= steps <= 1000 or not 1 <= batch <= 4096:
        raise InputError(f"wanted steps in 1..1000 and batch in 1..4096, got {steps} and {batch}")


def fitting_batch(
    space: WeightSpace, pipe, request: Requests, memory: int, most: int, **options
) -> int:
    """How many pictures fit into `memory` bytes at once, at most `most`, tried on one request.

    options: `Prepared`'s. InputError where not even one fits.
    """
    options["steps"] = min(options["steps"], 2)  # the second finds what the first has kept

    def trial(k: int) -> None:
        with Prepared(space, pipe, **options) as prepared:
            prepared.make(request.take([0] * k))

    return fitting(
        lambda k: peak_of(pipe, lambda: trial(k)), memory, "picture",
        "tiling, or bfloat16, needs less", min(4096, most),
    )  # fmt: skip


def checked_requests(
    space: WeightSpace,
    coefficients: Tensor,
    prompts: str | Sequence[str],
    seeds: int | Sequence[int],
    strength: float | Tensor,
    before: Tensor | None,
    start: float | Sequence[float] | Tensor,
) -> Requests:
    """What `generate` was asked, a value an image; InputError for what does not fit."""
    k = len(coefficients)
    prompts = [prompts] * k if isinstance(prompts, str) else list(prompts)
    seeds = list(range(seeds, seeds + k)) if isinstance(seeds, int) else list(seeds)
    for name, value in (("prompts", prompts), ("seeds", seeds)):
        if len(value) != k:
            raise InputError(f"{name}: wanted one for each of {k} identities, got {len(value)}")
    check_prompts(prompts)
    for seed in seeds:
        check_seed(seed)
    strength, start = _each("strength", strength, k), _each("start", start, k)
    if coefficients.ndim != 2 or coefficients.shape[1] != space.m:
        raise InputError(f"coefficients: wanted [k, {space.m}], got {tuple(coefficients.shape)}")
    if before is not None and before.shape != coefficients.shape:
        wanted, got = tuple(coefficients.shape), tuple(before.shape)
        raise InputError(f"before: wanted {wanted}, as the coefficients, got {got}")
    if before is None and start.any():
        raise InputError("start: wanted with before, the coefficients until then")
    for name, c in (("coefficients", coefficients), ("before", before)):
        if c is not None and not c.isfinite().all():
            raise InputError(f"{name}: holds NaN or infinite numbers")
    before = None if before is None else before.to(coefficients)
    return Requests(coefficients, prompts, seeds, strength, before, start)


def _each(name: str, value: float | Sequence[float] | Tensor, k: int) -> Tensor:
    """A finite number, or one of each image, as f32 [k]; InputError for anything else."""
    try:
        each = torch.as_tensor(value, dtype=torch.float32).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name}: wanted a finite number or [{k}], got {value!r}") from error
    if each.shape not in ((), (k,)) or not torch.isfinite(each).all():
        raise InputError(f"{name}: wanted a finite number or [{k}], got {each.tolist()}")
    return each.expand(k)


def named_scheduler(name: str, pipe) -> Any:
    """The diffusers scheduler of that class name, configured as the pipeline's own is.

    InputError for names that diffusers does not have, or whose schedule is of another kind.
    """
    import diffusers

    kind = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    compatible = {c.__name__ for c in pipe.scheduler.compatibles} | {type(pipe.scheduler).__name__}
    if kind is None or name not in compatible:
        raise InputError(f"scheduler: wanted one of {', '.join(sorted(compatible))}; got {name!r}")
    return kind.from_config(pipe.scheduler.config)
