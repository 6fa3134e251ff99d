"""A pipeline made ready for pictures of many people, batch after batch, and put back as it was.

Adapters are attached once for all batches; scheduler, tiling and compilation of the pipeline are
those asked for inside, its own again outside.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .attach import attach
from .denoise import denoiser, device_of
from .errors import InputError
from .space import WeightSpace


@dataclass(frozen=True)
class Requests:
    """Who and what is on each of k pictures: coefficients [k, m], a prompt, a seed, a strength [k].

    before, start: with a delayed edit, who they are while the timestep is above start [k].
    """

    people: Tensor
    prompts: list[str]
    seeds: list[int]
    strength: Tensor
    before: Tensor | None
    start: Tensor

    def __len__(self) -> int:
        return len(self.seeds)

    def take(self, rows: list[int]) -> Requests:
        """Those rows, in that order."""
        return Requests(
            self.people[rows], [self.prompts[i] for i in rows], [self.seeds[i] for i in rows],
            self.strength[rows], None if self.before is None else self.before[rows],
            self.start[rows],
        )  # fmt: skip

    def at(self, t: float) -> Tensor:
        """Who they are at timestep t, [k, m]."""
        if self.before is None:
            return self.people
        edited = (self.start >= t).to(self.people.device)
        return torch.where(edited[:, None], self.people, self.before)


class Prepared:
    """`make` pictures inside it: `with Prepared(space, pipe, ...) as prepared`.

    steps, guidance, identity_guidance, scheduler, pipe_options: as of `generate`.
    tiling: the VAE decodes picture by picture, a large one in tiles that overlap.
    compile: the number of rows that every batch is filled up to, for which the denoiser is compiled
        once, at the first batch; 0: it is not compiled.

    Raises InputError for a pipeline that cannot.
    """

    def __init__(
        self,
        space: WeightSpace,
        pipe,
        *,
        steps: int,
        guidance: float,
        identity_guidance: bool = False,
        scheduler=None,
        tiling: bool = False,
        compile: int = 0,
        **pipe_options: Any,
    ) -> None:
        self.space, self.pipe, self.compile = space, pipe, compile
        self.scheduler = pipe.scheduler if scheduler is None else scheduler
        self.guided = identity_guidance and guidance > 1
        self.options = {
            **pipe_options, "num_inference_steps": steps, "guidance_scale": guidance
        }  # fmt: skip
        self.tiling = _tiled(pipe.vae) if tiling else nullcontext()
        self._held = ExitStack()

    def __enter__(self) -> Prepared:
        pipe, own = self.pipe, self.pipe.scheduler
        shown = getattr(pipe, "_progress_bar_config", {})
        with ExitStack() as held:
            held.callback(pipe.set_progress_bar_config, **shown)
            held.callback(setattr, pipe, "scheduler", own)
            pipe.set_progress_bar_config(**{**shown, "disable": True})
            pipe.scheduler = self.scheduler
            held.enter_context(self.tiling)
            if self.compile:
                held.enter_context(_compiled(pipe, self.options["guidance_scale"] > 1))
            self.live = held.enter_context(
                attach(pipe, self.space, identity_guidance=self.guided, cache_text=True)
            )
            self._held = held.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._held.__exit__(*error)

    @torch.no_grad()
    def make(self, requests: Requests) -> list:
        """A PIL image of each, in one batch."""
        wanted, live, first_t, delayed = len(requests), self.live, math.inf, {}
        if wanted < self.compile:  # the graph is of one size
            requests = requests.take([min(i, wanted - 1) for i in range(self.compile)])
        if requests.before is not None:
            self.pipe.scheduler.set_timesteps(self.options["num_inference_steps"])
            first_t = float(self.pipe.scheduler.timesteps[0])
            delayed = {"callback_on_step_end": self._at_step(requests)}
        live.strength = 1.0
        live.identities = requests.at(first_t)
        live.strength = requests.strength
        generators = [torch.Generator().manual_seed(seed) for seed in requests.seeds]
        with _told() if self.compile else nullcontext():
            images = self.pipe(
                requests.prompts, generator=generators, **delayed, **self.options
            ).images
        return images[:wanted]

    def _at_step(self, requests: Requests):
        def at_step(pipe, i, t, tensors):
            # Called after step i: what it sets is in force from the next timestep on.
            for later in pipe.scheduler.timesteps[i + 1 : i + 2].tolist():
                people = requests.at(later)
                if not torch.equal(people, self.live.identities):
                    self.live.identities = people
            return tensors

        return at_step


@contextmanager
def _tiled(vae) -> Iterator[None]:
    """The VAE's own tiling and slicing inside, both as they were after."""
    names = ("tiling", "slicing")
    if not all(hasattr(vae, f"enable_{name}") for name in names):
        raise InputError(f"tiling: {type(vae).__name__} has none: leave it out")
    was = {name: getattr(vae, f"use_{name}", False) for name in names}
    try:
        for name in names:
            getattr(vae, f"enable_{name}")()
        yield
    finally:
        for name in names:
            if not was[name]:
                getattr(vae, f"disable_{name}")()


@contextmanager
def _compiled(pipe, guided: bool) -> Iterator[None]:
    """The pipeline's denoiser under torch.compile inside; on a GPU as CUDA graphs."""
    model = denoiser(pipe)
    name = "unet" if getattr(pipe, "unet", None) is model else "transformer"
    # Without guidance a scheduler may hold on to what the graph's next run overwrites.
    graphs = device_of(pipe).type == "cuda" and guided
    mode = "reduce-overhead" if graphs else "default"
    setattr(pipe, name, torch.compile(model, mode=mode, dynamic=False))
    try:
        yield
    finally:
        setattr(pipe, name, model)


@contextmanager
def _told() -> Iterator[None]:
    """A compiler that is missing, or cannot, as InputError."""
    from torch._dynamo.exc import BackendCompilerFailed

    try:
        yield
    except BackendCompilerFailed as error:
        reason = " ".join(str(error.inner_exception).split())[:300]
        raise InputError(
            f"compile: torch.compile cannot compile this model here: {reason}"
        ) from error
