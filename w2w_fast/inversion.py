"""Find many people in weight space in one batch: `training` with coefficients for adapters.

    min over z of  E_{t, noise} [ masked denoising loss ] + prior * |z|^2 / 2m,   c = mu + sigma * z

(w2w paper, section 3.4, which has neither the prior nor the whitening.) Rows of z are what
`Training` makes steps of: shared random numbers, an Adam state a person, who is done leaves the
batch, and a state file that goes on to the same bits. The gradient reaches z through
`ops.reconstruct`, whatever the basis is stored in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from .attach import Live, attach
from .denoise import device_of
from .errors import InputError
from .recipe import Recipe
from .sources import Subject
from .space import WeightSpace
from .training import Training

_POINTS = 200  # of a loss curve, each the mean over its share of the steps


class Inversion(Training):
    """The inversion of a list of people, at most `batch` at a time; all of its state.

    recipe: its prior (preservation) and weight_decay are 0. start: coefficients [m], or [n, m].
    prior, whiten, weight_decay: see `verbs.invert`. callback: after each step, given {"people",
    "steps", "loss" [K], "coefficients" [K, m]} of those in flight. Options as `Training`.

    With recipe.check, every so many steps each person's loss is looked at on the same photographs
    under timesteps and noise that are never trained on, the same at each look.
    """

    holds_out = False
    held_out_draws = 8

    def __init__(
        self,
        pipe: Any,
        space: WeightSpace,
        people: Sequence[Subject],
        recipe: Recipe,
        start: Tensor,
        *,
        prior: float = 0.0,
        whiten: bool = True,
        weight_decay: float = 0.0,
        callback: Callable[[dict], None] | None = None,
        **options: Any,
    ) -> None:
        device = device_of(pipe)
        self.space, self.prior, self.weight_decay = space, prior, weight_decay
        self.callback = callback
        self.mu, self.sigma = space.mu.to(device), space.sigma.to(device)
        self.origin = self.mu if whiten else torch.zeros_like(self.mu)
        self.scale = self.sigma if whiten else torch.ones_like(self.sigma)
        self.fixed = (space.basis, space.mean, space.std)
        # A component without spread has nothing to find: it stays where it is.
        far = start.to(device, torch.float32) - self.origin
        z = torch.where(self.scale > 0, far / self.scale.clamp_min(1e-12), 0)
        super().__init__(pipe, space.layout, people, recipe, z, **options)
        points = min(recipe.steps, _POINTS)
        self.extra.setdefault("curve", torch.zeros(len(people), points, device=device))

    def find(self) -> tuple[Tensor, list[dict[str, Any]]]:
        """(c [n, m] f32, where the space is; of each person name, photos, steps, loss, curve).

        loss: the mean over the averaged steps. curve: (step, mean loss around it), 200 at most.
        InputError, naming the person, where one diverged.
        """
        z, facts = self.run()
        if self.state is not None:  # a report that is killed does not cost the work before it
            self._save(self.state)
        for i, fact in enumerate(facts):
            if fact["reason"]:
                raise InputError(f"{fact['name']}: {fact['reason']}")
            at = Counter(map(self._point, range(fact["steps"])))
            losses, first = self.extra["curve"][i].tolist(), 0
            fact["curve"] = []
            for point, count in sorted(at.items()):
                fact["curve"].append((first + count / 2, losses[point] / count))
                first += count
        return self.coefficients(z.to(self.device)).to(self.space.mu.device), facts

    def coefficients(self, z: Tensor) -> Tensor:
        """The points c of rows z, [K, m]."""
        return self.origin + self.scale * z

    def _attached(self, model: torch.nn.Module) -> AbstractContextManager[Live]:
        return attach(model, self.space)

    def _show(self) -> None:
        c = self.coefficients(self.rows.w)
        # Who has diverged is soon taken out; until then the others go on.
        self.live.identities = torch.where(c.isfinite(), c, self.mu)

    def _objective(self, loss: Tensor) -> Tensor:
        z = self.rows.w
        far = (self.coefficients(z) - self.mu) / self.sigma.clamp_min(1e-12)
        whitened = torch.where(self.sigma > 0, far, 0)
        penalty = self.prior * whitened.square().mean(1) / 2
        # Adam's weight decay, not AdamW's: the published setting.
        return (loss + penalty + self.weight_decay * z.square().sum(1) / 2).sum()

    def _step(self) -> Tensor:
        points = [self._point(step) for step in self.rows.step]
        loss = super()._step()
        self.extra["curve"][self.rows.subject, points] += loss
        if self.callback is not None:
            found = self.coefficients(self.rows.w.detach())
            self.callback({
                "people": list(self.rows.subject), "steps": list(self.rows.step), "loss": loss,
                "coefficients": found,
            })  # fmt: skip
        return loss

    def _point(self, step: int) -> int:
        return step * self.extra["curve"].shape[1] // self.recipe.steps
