"""Train many adapters in one batch on one frozen base (w2w paper, section 3.1).

DreamBooth with rank-1 adapters. The adapters of the K subjects in flight are a flat [K, d] tensor
and AdamW works on its rows, so a row is trained as if it were alone. Every subject starts from the
same adapter and sees, at its own step s, the same timestep, noise and choice of photo (common
random numbers): without that the population's spread is training noise and no weight space appears.
Who is finished leaves the batch and the next subject takes the place.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .attach import Live, attach
from .denoise import Photos, checkpointed, denoiser, device_of, frozen, losses
from .encoding import Encoded, Encoder
from .errors import InputError
from .files import read_tensors, write_tensors
from .layout import Layout
from .recipe import Recipe, draw
from .sources import Subject

_LOOK = 25  # ticks between looks for rows that are not finite: each look waits for the device


def initial_adapter(layout: Layout, seed: int = 0) -> Tensor:
    """The start every subject shares, w [d]: A uniform in +-1/sqrt(in), B zero, as in PEFT."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.zeros(layout.size)
    for module, (a, _) in zip(layout.modules, layout.slices(), strict=True):
        bound = module.in_features**-0.5
        w[a] = (torch.rand(a.stop - a.start, generator=generator) * 2 - 1) * bound
    return w


# --- the optimiser --------------------------------------------------------------------------------


def adamw_(
    w: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    steps: Tensor,
    recipe: Recipe,
    trained: Tensor,
) -> None:
    """One step of AdamW (Loshchilov and Hutter, 2019) in place; w, grad, moments [K, d].

    steps [K, 1] float64, from 1: each row's own, so that a row is what an optimiser of its own
    would make of it. trained [d]: 1, or 0 where a number stays as it is.
    """
    beta1, beta2 = 0.9, 0.999
    if recipe.weight_decay:
        w.mul_(1 - recipe.lr * recipe.weight_decay * trained)
    grad.mul_(trained)
    first.lerp_(grad, 1 - beta1)
    second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    size = (recipe.lr / (1 - beta1**steps)).float()
    root = (1 - beta2**steps).sqrt().float()
    w.sub_(size * (first / (second.sqrt() / root + recipe.eps)))


# --- who is in flight -----------------------------------------------------------------------------


@dataclass
class Rows:
    """The subjects in flight: of each its number, its step, its adapter and its moments."""

    subject: list[int]
    step: list[int]
    bad: list[int]  # looks at the held-out loss since the best
    best: Tensor  # [K] float32
    w: Tensor
    first: Tensor
    second: Tensor
    total: Tensor  # [K, d] float64, the iterates that are averaged
    loss: Tensor  # [K] float64, summed over the same steps

    @classmethod
    def new(cls, subjects: Sequence[int], start: Tensor) -> Rows:
        k, d, place = len(subjects), start.shape[-1], {"device": start.device}
        zeros = [torch.zeros(k, d, **place) for _ in range(2)]
        return cls(
            list(subjects), [0] * k, [0] * k, torch.full((k,), torch.inf, **place),
            start.expand(k, -1).clone(), *zeros,
            torch.zeros(k, d, dtype=torch.float64, **place),
            torch.zeros(k, dtype=torch.float64, **place),
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.subject)

    def pick(self, index: Sequence[int]) -> Rows:
        at = torch.tensor(index, dtype=torch.int64, device=self.w.device)
        return Rows(*(
            [part[i] for i in index] if isinstance(part, list) else part[at]
            for part in (getattr(self, f.name) for f in fields(self))
        ))  # fmt: skip

    def __add__(self, other: Rows) -> Rows:
        return Rows(*(
            mine + theirs if isinstance(mine, list) else torch.cat([mine, theirs])
            for mine, theirs in (
                (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)
            )
        ))  # fmt: skip


class Training:
    """The training of a list of subjects, at most `batch` at a time; all of its state.

    `run` goes to the end. With a `state` file it is written every `save_every` seconds, and a new
    Training goes on from it with the same bits: what a step does depends on the state alone. `job`
    is kept in it, and a state of another job is an InputError.

    `inversion.Inversion` trains coefficients in the place of adapters: start is then a point of
    that space, one for all or one each.
    """

    holds_out = True  # early stopping looks at the last photo, which is never trained on
    held_out_draws = 4
    fixed: Sequence[Tensor] = ()  # what is there besides the model, whatever the batch

    def __init__(
        self,
        pipe: Any,
        layout: Layout,
        subjects: Sequence[Subject],
        recipe: Recipe,
        start: Tensor,
        *,
        batch: int = 64,
        class_photos: Encoded | None = None,
        encoder: Encoder | None = None,
        bf16: bool = False,
        checkpointing: bool = False,
        state: Path | None = None,
        save_every: float = 60.0,
        job: Mapping[str, Any] | None = None,
        progress: tqdm | None = None,
    ) -> None:
        if recipe.prior and class_photos is None:
            raise InputError("recipe: prior: wanted pictures of the class (class_photos)")
        self.pipe, self.layout, self.subjects, self.recipe = pipe, layout, subjects, recipe
        self.batch, self.class_photos = batch, class_photos
        self.encoder = encoder or Encoder(pipe)
        self.bf16, self.checkpointing = bf16, checkpointing
        self.state, self.save_every, self.progress = state, save_every, progress
        self.job = dict(job or {})
        self.device = device_of(pipe)
        self.train_steps = pipe.scheduler.config.num_train_timesteps
        self.start = start.to(self.device, torch.float32)
        self.trained = torch.ones(self.start.shape[-1], device=self.device)
        if recipe.train == "B":
            for a, _ in layout.slices():
                self.trained[a] = 0
        self.rows = Rows.new([], self._starts([]))
        self.extra: dict[str, Tensor] = {}  # further tensors of the state
        self.live: Live
        self.encoded: list[Encoded] = []
        self.next = self.tick = 0
        self.done: dict[int, Tensor] = {}  # subject -> w [d] on the CPU
        self.facts: dict[int, dict[str, Any]] = {}
        if state is not None and state.exists():
            self._load(state)
        self._advance(sum(self.rows.step) + recipe.steps * len(self.facts))

    def run(self) -> tuple[Tensor, list[dict[str, Any]]]:
        """(w [n', d] of those who were not set aside, in order; what is known of all n)."""
        model, saved = denoiser(self.pipe), time.monotonic()
        with (
            frozen(model),
            checkpointed(model, self.checkpointing),
            self._attached(model) as self.live,
        ):
            while True:
                self._refill()
                if not len(self.rows):
                    break
                self.rows.w.requires_grad_()
                self._step()
                self._retire()
                if self.state is not None and time.monotonic() - saved >= self.save_every:
                    self._save(self.state)
                    saved = time.monotonic()
        good = sorted(self.done)
        w = torch.stack([torch.empty(len(self.trained)), *(self.done[i] for i in good)])[1:]
        return w, [self.facts[i] for i in range(len(self.subjects))]

    # --- what is trained --------------------------------------------------------------------------

    def _attached(self, model: torch.nn.Module) -> AbstractContextManager[Live]:
        return attach(model, self.layout)

    def _show(self) -> None:
        """Put the rows' adapters into the model, before a forward."""
        if self.live.adapters is not self.rows.w:
            self.live.adapters = self.rows.w

    def _objective(self, loss: Tensor) -> Tensor:
        """What is minimised, of the rows' losses [K]."""
        return loss.sum()

    def _starts(self, subjects: Sequence[int]) -> Tensor:
        return self.start if self.start.ndim == 1 else self.start[subjects]

    # --- one tick ---------------------------------------------------------------------------------

    def _refill(self) -> None:
        """Let the next subjects in."""
        came: list[int] = []
        while len(self.rows) + len(came) < self.batch and self.next < len(self.subjects):
            i, self.next = self.next, self.next + 1
            name = self._name(i)
            try:
                self.encoded.append(self._encoded(self.subjects[i]))
                came.append(i)
            except InputError as error:
                self._aside(i, name, str(error))
                self._advance(self.recipe.steps)
        if came:
            with torch.no_grad():
                self.rows = self.rows + Rows.new(came, self._starts(came))

    def _step(self) -> Tensor:
        """One step of every row; their losses [K]."""
        rows, recipe = self.rows, self.recipe
        loss = self._losses(rows.step, "photo")
        self._objective(loss).backward()
        with torch.no_grad():
            rows.step = [s + 1 for s in rows.step]
            steps = torch.tensor(rows.step, dtype=torch.float64, device=self.device)[:, None]
            moments = rows.first, rows.second
            adamw_(rows.w, rows.w.grad, *moments, steps, recipe, self.trained)
            rows.w.grad = None
            kept = [float(s > recipe.keep_from) for s in rows.step]
            if any(kept):
                counts = torch.tensor(kept, dtype=torch.float64, device=self.device)
                rows.total.addcmul_(rows.w.double(), counts[:, None])
                rows.loss.addcmul_(loss.detach().double(), counts)
        self.tick += 1
        self._advance(len(rows))
        if self.progress is not None and self.tick % 10 == 0:
            self.progress.set_postfix(loss=f"{float(loss.detach().mean()):.4f}")
        return loss.detach()

    def _losses(self, steps: Sequence[int], what: str) -> Tensor:
        """The loss of each row at its own step, [K]; with the prior's if there is one."""
        recipe, (photos, noise, t) = self.recipe, self._inputs(steps, what)
        self._show()
        options = {"bf16": self.bf16, "snr_gamma": recipe.snr_gamma}
        if not recipe.prior or what != "photo":
            return losses(self.pipe, photos, noise, t, **options)
        # Two groups of rows, as attach counts them: the photos, then the class's pictures.
        both = zip((photos, noise, t), self._inputs(steps, "class"), strict=True)
        photos, noise, t = (
            (Photos.joined if isinstance(a, Photos) else torch.cat)([a, b]) for a, b in both
        )
        own, prior = losses(self.pipe, photos, noise, t, **options).chunk(2)
        return own + recipe.prior * prior

    def _inputs(self, steps: Sequence[int], what: str) -> tuple[Photos, Tensor, Tensor]:
        shape = self.encoded[0].latents.shape[1:]
        distinct = sorted(set(steps))
        draws = {s: draw(self.recipe, s, self.train_steps, shape, what) for s in distinct}
        photos = []
        for encoded, s in zip(self.encoded, steps, strict=True):
            if what == "held-out" and self.holds_out:
                photos.append(encoded.photo(len(encoded) - 1))
                continue
            encoded = self.class_photos if what == "class" else encoded
            count = len(encoded) - (what == "photo" and self._photo_held)
            photos.append(encoded.photo(min(int(draws[s].which * count), count - 1)))
        # Rows of one step share its numbers: they are copied to the device once.
        at = torch.tensor([distinct.index(s) for s in steps], device=self.device)
        noise = torch.stack([d.noise for d in draws.values()]).to(self.device)[at]
        t = torch.cat([d.t for d in draws.values()]).to(self.device)[at]
        return Photos.joined(photos), noise, t

    @property
    def _photo_held(self) -> bool:
        return self.holds_out and bool(self.recipe.check)

    def _retire(self) -> None:
        """Take out who is finished or diverged."""
        rows, recipe = self.rows, self.recipe
        ended = {i for i, s in enumerate(rows.step) if s == recipe.steps}
        if recipe.check:
            ended |= self._no_better([
                i for i, s in enumerate(rows.step) if i not in ended and s % recipe.check == 0
            ])  # fmt: skip
        broken: set[int] = set()
        if ended or self.tick % _LOOK == 0:
            with torch.no_grad():
                finite = rows.w.isfinite().all(1).tolist()
            broken = {i for i, ok in enumerate(finite) if not ok}
        for i in sorted(ended | broken):
            subject, step = rows.subject[i], rows.step[i]
            name = self._name(subject)
            self._advance(recipe.steps - step)
            if i in broken:
                self._aside(
                    subject, name, f"diverged: not finite after at most {step} steps; lower lr"
                )
                continue
            count = step - recipe.keep_from
            w = rows.total[i] / count if count > 0 else rows.w[i].detach()
            self.done[subject] = w.float().cpu()
            loss = float(rows.loss[i]) / count if count > 0 else float(rows.best[i])
            self.facts[subject] = {
                "name": name, "photos": len(self.encoded[i]), "steps": step, "loss": loss,
                "reason": "",
            }  # fmt: skip
        if not ended | broken:
            return
        left = [i for i in range(len(rows)) if i not in ended | broken]
        with torch.no_grad():
            rows.w.requires_grad_(False)
            self.rows = rows.pick(left)
        self.encoded = [self.encoded[i] for i in left]

    @torch.no_grad()
    def _no_better(self, looked: list[int]) -> set[int]:
        """Those of these rows whose held-out loss has stopped falling."""
        if not looked:
            return set()
        rows = self.rows
        every = [self._losses([s] * len(rows), "held-out") for s in range(self.held_out_draws)]
        loss = torch.stack(every).mean(0)
        for i in looked:
            if bool(loss[i] < rows.best[i]):
                rows.best[i], rows.bad[i] = loss[i], 0
            else:
                rows.bad[i] += 1
        return {i for i in looked if rows.bad[i] >= self.recipe.patience}

    # --- subjects ---------------------------------------------------------------------------------

    def _name(self, i: int) -> str:
        names = getattr(self.subjects, "names", None)
        return names[i] if names is not None else self.subjects[i].name

    def _encoded(self, subject: Subject) -> Encoded:
        if self._photo_held and len(subject.prompts) < 2:
            raise InputError(
                f"{subject.name}: one photo; early stopping (check) holds out one and trains on "
                "the others"
            )
        encoded = self.encoder(subject)
        shape, others = encoded.latents.shape[1:], self.encoded or [encoded]
        if shape != others[0].latents.shape[1:]:
            raise InputError(f"{subject.name}: photographs of another size than the others'")
        return encoded

    def _aside(self, i: int, name: str, reason: str) -> None:
        self.facts[i] = {"name": name, "photos": 0, "steps": 0, "loss": None, "reason": reason}

    def _advance(self, steps: int) -> None:
        if self.progress is not None:
            self.progress.update(steps)

    # --- the state file ---------------------------------------------------------------------------

    def _save(self, path: Path) -> None:
        rows = self.rows
        parts = {f.name: getattr(rows, f.name) for f in fields(rows)}
        tensors = {k: v.detach() for k, v in parts.items() if isinstance(v, Tensor)}
        good = sorted(self.done)
        tensors |= {f"done.{i}": self.done[i] for i in good}
        tensors |= {f"extra.{name}": tensor for name, tensor in self.extra.items()}
        state = {k: v for k, v in parts.items() if isinstance(v, list)}
        state |= {"next": self.next, "tick": self.tick, "job": self.job}
        state["facts"] = {str(i): fact for i, fact in self.facts.items()}
        write_tensors(path, tensors, {"state": json.dumps(state)})

    def _load(self, path: Path) -> None:
        tensors, metadata = read_tensors(path, finite=False, mmap=False)
        state = json.loads(metadata.get("state", "{}"))
        old = state.pop("job", {})
        different = sorted(k for k in old.keys() | self.job if old.get(k) != self.job.get(k))
        if different:
            raise InputError(
                f"{path}: was left by a job with another {', '.join(different)}; remove it, or "
                "give the same again to go on"
            )

        def named(kind: str) -> dict[str, Tensor]:
            names = [name for name in tensors if name.startswith(kind)]
            return {name.removeprefix(kind): tensors.pop(name) for name in names}

        self.done = {int(i): w for i, w in named("done.").items()}
        self.extra = {name: t.to(self.device) for name, t in named("extra.").items()}
        self.facts = {int(i): fact for i, fact in state.pop("facts").items()}
        self.next, self.tick = state.pop("next"), state.pop("tick")
        self.rows = Rows(**state, **{k: v.to(self.device) for k, v in tensors.items()})
        self.encoded = [self._encoded(self.subjects[i]) for i in self.rows.subject]


def train(
    pipe: Any,
    layout: Layout,
    subjects: Sequence[Subject],
    recipe: Recipe,
    start: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Train all of them, in memory: w [n, d] float32 on the CPU. Options as `Training`.

    InputError if one is set aside: `populate` goes on without, and says who.
    """
    start = initial_adapter(layout, recipe.seed) if start is None else start
    w, facts = Training(pipe, layout, subjects, recipe, start, **options).run()
    for fact in facts:
        if fact["reason"]:
            raise InputError(f"{fact['name']}: {fact['reason']}")
    return w
