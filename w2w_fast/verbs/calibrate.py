"""`calibrate`: a slider whose equal steps change what is measured equally.

An amount of standard deviations is a step of weights; what it does to pictures is measured. The
mean reading of some people's pictures, as a function of the amount, is made monotone (isotonic
regression: Barlow et al., 1972; scikit-learn's) and read backwards: from a change that is wanted to
the amount that makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..files import read_json, write_json
from ..space import WeightSpace
from .edit import edit
from .generate import generate
from .sample import sample

_FORMAT = "w2w_fast.scale"
_FLAT = 0.02  # of all change: an end that brings less than this is where the slider stops


@dataclass(frozen=True)
class Scale:
    """A monotone map: changes [p] of a reading, ascending, and the amounts [p] that make them.

    name, hold: of the edit. readings [s]: the mean readings that were measured, at tried [s].
    """

    name: str
    hold: tuple[str, ...]
    changes: tuple[float, ...]
    amounts: tuple[float, ...]
    tried: tuple[float, ...] = ()
    readings: tuple[float, ...] = ()

    @property
    def range(self) -> tuple[float, float]:
        """The least and the greatest change that was seen; 0 is nobody edited."""
        return self.changes[0], self.changes[-1]

    def amount(self, change: float | Tensor) -> Tensor:
        """Standard deviations of the attribute that change the reading so much, of change's shape.

        InputError for changes that no amount tried has made.
        """
        wanted = torch.as_tensor(change, dtype=torch.float64)
        low, high = self.range
        slack = 1e-6 * (high - low)  # the ends themselves, in float32
        beyond = wanted[~((wanted >= low - slack) & (wanted <= high + slack))]
        if beyond.numel():
            raise InputError(
                f"{self.name}: wanted a change from {low:.3g} to {high:.3g}, which is what was "
                f"measured; got {float(beyond[0]):.3g}"
            )
        found = np.interp(wanted.cpu().numpy(), self.changes, self.amounts)
        return torch.as_tensor(found, dtype=torch.float32)

    def save(self, path: str | Path) -> None:
        write_json(path, {"format": _FORMAT, **vars(self)})

    @classmethod
    def load(cls, path: str | Path) -> Scale:
        """InputError for anything that ``save`` did not write."""
        told = read_json(path)
        numbers = ("changes", "amounts", "tried", "readings")
        if not isinstance(told, dict) or told.pop("format", None) != _FORMAT:
            raise InputError(f"{path}: not a slider's scale")
        fits = set(told) == {"name", "hold", *numbers} and isinstance(told["name"], str)
        fits = fits and all(isinstance(told[key], list) for key in ("hold", *numbers))
        fits = fits and all(isinstance(name, str) for name in told["hold"])
        fits = fits and all(isinstance(x, (int, float)) for key in numbers for x in told[key])
        if not fits or not 2 <= len(told["changes"]) == len(told["amounts"]):
            raise InputError(f"{path}: a slider's scale, but damaged")
        if sorted(told["changes"]) != told["changes"] or sorted(told["amounts"]) != told["amounts"]:
            raise InputError(f"{path}: a slider's scale that does not rise")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in told.items()})


def fit_scale(
    amounts: Sequence[float] | Tensor, readings: Tensor, name: str = "", hold: Sequence[str] = ()
) -> Scale:
    """The scale of readings [s, k] of k people at s amounts, ascending, 0 among them.

    Everybody counts as much: the mean over people of the reading less that person's at amount 0.
    Ends where the reading stands still are left out. InputError where nothing rises.
    """
    x = torch.as_tensor(amounts, dtype=torch.float64).cpu()
    y = torch.as_tensor(readings, dtype=torch.float64).cpu()
    if x.ndim != 1 or y.ndim != 2 or len(x) != len(y) or len(x) < 3 or not y.numel():
        raise InputError(
            f"scale: wanted [s] and [s, k], s > 2, got {list(x.shape)} and {list(y.shape)}"
        )
    zero = (x == 0).nonzero().flatten()
    if len(zero) != 1 or not bool((x.diff() > 0).all()) or not bool(y.isfinite().all()):
        raise InputError("scale: wanted amounts that rise, one of them 0, and finite readings")
    from sklearn.isotonic import IsotonicRegression

    mean = y.mean(1)
    rise = torch.from_numpy(IsotonicRegression().fit_transform(x.numpy(), mean.numpy()))
    span = float(rise[-1] - rise[0])
    if span <= 0:
        raise InputError(f"{name}: its reading does not rise with the amount: nothing to calibrate")
    low, high = 0, len(x) - 1
    while rise[low + 1] - rise[0] <= _FLAT * span and low < zero[0]:
        low += 1
    while rise[-1] - rise[high - 1] <= _FLAT * span and high > zero[0]:
        high -= 1
    # Amounts that isotonic regression pooled are one point of the map: its middle, or 0.
    points: dict[float, list[float]] = {}
    for amount, value in zip(
        x[low : high + 1].tolist(), rise[low : high + 1].tolist(), strict=True
    ):
        points.setdefault(value, []).append(amount)
    start = float(rise[zero[0]])
    changes = [value - start for value in points]
    at = [0.0 if 0.0 in group else sum(group) / len(group) for group in points.values()]
    return Scale(
        name, tuple(hold), tuple(changes), tuple(at), tuple(x.tolist()), tuple(mean.tolist())
    )


def calibrate(
    space: WeightSpace,
    pipe: Any,
    name: str,
    reader: Callable[[list], Sequence[float] | Tensor],
    *,
    hold: str | Sequence[str] = (),
    amounts: Sequence[float] = (-4, -3, -2, -1, 0, 1, 2, 3, 4),
    people: Tensor | int = 16,
    prompt: str = "sks person",
    seed: int = 0,
    **options: Any,
) -> Scale:
    """Measure what an edit does and make its slider's scale.

    reader: PIL images of people -> a number each: how much of the attribute they show.
    people: coefficients [k, m], or how many to sample. Each is drawn at every amount with one seed
        and prompt; options go to `generate`, beside the space's own (meta "generate").
    InputError as of `edit`, `generate` and `fit_scale`.
    """
    held = (hold,) if isinstance(hold, str) else tuple(hold)
    people = sample(space, people, seed=seed) if isinstance(people, int) else people
    if not len(people):
        raise InputError("people: wanted one at least")
    rows = people.repeat(len(amounts), 1)
    each = torch.tensor(list(amounts), dtype=torch.float32).repeat_interleave(len(people))
    moved = edit(space, rows, {name: each.to(rows.device)}, hold=held)
    seeds = [seed + i for i in range(len(people))] * len(amounts)
    own = space.meta.get("generate", {})
    settings = {key: own[key] for key in ("steps", "guidance", "identity_guidance") if key in own}
    images = generate(space, pipe, moved, prompt, seeds=seeds, **{**settings, **options})
    readings = torch.as_tensor(reader(images), dtype=torch.float64)
    if readings.shape != (len(images),):
        raise InputError(f"reader: wanted {len(images)} numbers, got {list(readings.shape)}")
    return fit_scale(amounts, readings.view(len(amounts), len(people)), name, held)
