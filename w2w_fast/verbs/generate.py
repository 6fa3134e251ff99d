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

from ..attach import attach
from ..denoise import check_prompts, check_seed
from ..errors import InputError
from ..space import WeightSpace


@torch.no_grad()
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
    progress: bool = True,
    callback: Callable[[int, int], None] | None = None,
    **pipe_options,
) -> list:
    """One PIL image for each row of coefficients [k, m].

    prompts: one for all, or one an image. seeds: one an image, or a number s for s, s + 1, ...
    guidance: classifier-free guidance; with `identity_guidance` its unconditional rows run without
        the adapter, so that guidance pulls towards the person as well as towards the prompt.
    strength: of the adapters, a number or [k].
    before, start: delayed edit (w2w paper, section 3.3): the unedited coefficients `before` [k, m]
        are used while the timestep is above `start`, a number or [k], `coefficients` from there on.
        For pipelines that run the whole schedule, as text to image does.
    scheduler: any diffusers scheduler; the pipeline's own by default.
    callback: given (images done, images wanted) after each batch.
    pipe_options: passed on to the pipeline (height, width, negative_prompt, ...).

    Raises InputError for shapes and numbers that do not fit.
    """
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
    if not math.isfinite(guidance):
        raise InputError(f"guidance: wanted a finite number, got {guidance!r}")
    if coefficients.ndim != 2 or coefficients.shape[1] != space.m:
        raise InputError(f"coefficients: wanted [k, {space.m}], got {tuple(coefficients.shape)}")
    if before is not None and before.shape != coefficients.shape:
        wanted, got = tuple(coefficients.shape), tuple(before.shape)
        raise InputError(f"before: wanted {wanted}, as the coefficients, got {got}")
    if before is not None:
        before = before.to(coefficients)
    elif start.any():
        raise InputError("start: wanted with before, the coefficients until then")
    if not 1 <= steps <= 1000 or not 1 <= batch <= 4096:
        raise InputError(f"wanted steps in 1..1000 and batch in 1..4096, got {steps} and {batch}")

    images: list = []
    own, shown = pipe.scheduler, getattr(pipe, "_progress_bar_config", {})
    bar = tqdm(total=k, unit="image", desc="generate", disable=not progress)
    try:
        pipe.set_progress_bar_config(**{**shown, "disable": True})
        if scheduler is not None:
            pipe.scheduler = scheduler
        first_t = math.inf
        if before is not None:
            pipe.scheduler.set_timesteps(steps)
            first_t = float(pipe.scheduler.timesteps[0])
        with bar, attach(pipe, space, identity_guidance=identity_guidance and guidance > 1) as live:
            for first in range(0, k, batch):
                rows = slice(first, min(first + batch, k))

                def at(t: float, rows=rows) -> Tensor:
                    """Who the rows are at timestep t."""
                    if before is None:
                        return coefficients[rows]
                    edited = (start[rows] >= t).to(coefficients.device)
                    return torch.where(edited[:, None], coefficients[rows], before[rows])

                def at_step(pipe, i, t, tensors, at=at):
                    # Called after step i: what it sets is in force from the next timestep on.
                    for later in pipe.scheduler.timesteps[i + 1 : i + 2].tolist():
                        people = at(later)
                        if not torch.equal(people, live.identities):
                            live.identities = people
                    return tensors

                live.strength = 1.0
                live.identities = at(first_t)
                live.strength = strength[rows]
                delayed = {} if before is None else {"callback_on_step_end": at_step}
                made = pipe(
                    prompts[rows],
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                    generator=[torch.Generator().manual_seed(s) for s in seeds[rows]],
                    **delayed,
                    **pipe_options,
                ).images
                images.extend(made)
                bar.update(len(made))
                if callback is not None:
                    callback(len(images), k)
    finally:
        pipe.scheduler = own
        pipe.set_progress_bar_config(**shown)
    return images


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
