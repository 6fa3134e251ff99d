"""How subjects are trained, and the random numbers that all of them share."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .denoise import check_prompts, check_seed, draw_timesteps
from .errors import InputError


@dataclass(frozen=True)
class Recipe:
    """How each subject is trained. The defaults are the paper's; `demo.build` shows others.

    weight_decay: AdamW's, on what is trained.
    train: "AB", or "B" with A shared and frozen (delta W is then linear in the adapter).
    timesteps: "uniform", or "early" (high noise, where identity is decided, more often).
    average: the share of the last steps whose iterates are averaged; 0 keeps the last one.
    prior: weight of prior preservation (DreamBooth, eq. 2); 0 trains without. Its class_images
        pictures of class_prompt are made once, by the base model.
    snr_gamma: min-SNR weighting of timesteps (Hang et al., 2023, eq. 7); 0: none.
    check, patience: every `check` steps the loss on the subject's last photo, which is then never
        trained on, is looked at; after `patience` looks without a new best the subject is done.
    """

    steps: int = 800
    lr: float = 1e-4
    eps: float = 1e-8
    weight_decay: float = 0.0
    train: str = "AB"
    timesteps: str = "uniform"
    average: float = 0.0
    prior: float = 1.0
    class_prompt: str = "person"
    class_images: int = 200
    snr_gamma: float = 0.0
    check: int = 0
    patience: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)
        check_prompts([self.class_prompt])
        good = {
            "steps": 1 <= self.steps <= 100_000,
            "lr": math.isfinite(self.lr) and self.lr > 0,
            "eps": math.isfinite(self.eps) and self.eps > 0,
            "weight_decay": math.isfinite(self.weight_decay) and self.weight_decay >= 0,
            "train": self.train in ("AB", "B"),
            "timesteps": self.timesteps in ("uniform", "early"),
            "average": 0 <= self.average < 1,
            "prior": math.isfinite(self.prior) and self.prior >= 0,
            "class_images": 1 <= self.class_images <= 10_000,
            "snr_gamma": math.isfinite(self.snr_gamma) and self.snr_gamma >= 0,
            "check": 0 <= self.check <= self.steps,
            "patience": 1 <= self.patience <= 1000,
        }
        for name, ok in good.items():
            if not ok:
                raise InputError(f"recipe: {name}={getattr(self, name)!r} is out of range")

    @property
    def keep_from(self) -> int:
        """The first step whose iterate counts in the average."""
        return self.steps - max(1, round(self.average * self.steps))


@dataclass(frozen=True)
class Draw:
    """One step's random numbers: timestep [1], noise [c, h, w], and which photo, in [0, 1)."""

    t: Tensor
    noise: Tensor
    which: float


def draw(recipe: Recipe, step: int, train_steps: int, shape: Sequence[int], what: str) -> Draw:
    """The numbers of a step for all subjects, from the seed and the step alone.

    Not from a generator that runs along: a subject's numbers then do not depend on who else is in
    the batch, nor on where a killed job went on. what: "photo", "class" or "held-out".
    """
    key = hashlib.sha256(f"{recipe.seed} {what} {step}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
    t = draw_timesteps(1, train_steps, recipe.timesteps, generator)
    noise = torch.randn(*shape, generator=generator)
    return Draw(t, noise, float(torch.rand((), generator=generator)))
