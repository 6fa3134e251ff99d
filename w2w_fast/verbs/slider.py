"""`slider`: an edit as a LoRA that other tools load, of one person exactly or of anybody nearly.

A person is s B A, with A and B linear in c, so an edit c -> c + v changes A and B by dA and dB and
the weights by

    s ((B + dB)(A + dA) - B A) = s (B dA + dB A + dB dA)

*Of one person* that is a LoRA of twice the rank, [A'; A] and [B', -B], exact at strength 1: beside
the person's own LoRA it gives the edited person's. *Of anybody* A and B are not known. With the
population's mean for them, and without the last term, it is s (B dA + dB A), of twice the rank too,
the same for everybody and linear in its strength: the first order of the edit. What it lacks is
said over the population, relative to the edit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..layout import Layout
from ..space import WeightSpace
from .edit import edit

_PEOPLE = 200  # of the population that an error is told of


@dataclass(frozen=True)
class Slider:
    """A LoRA w [d] of layout, twice the space's rank; `export(slider.layout, slider.w, path)`.

    error: [k] of people of the population: |true change - the slider's| / |true change|, Frobenius
        over all modules, at strength 1; 0 [1] for the slider of one person.
    """

    layout: Layout
    w: Tensor
    error: Tensor


def slider(
    space: WeightSpace,
    amounts: dict[str, float] | None = None,
    *,
    of: Tensor | None = None,
    hold: str | Sequence[str] = (),
    **more: float,
) -> Slider:
    """The LoRA of an edit: `slider(space, beard=2, hold="age")`, strength 1 being those amounts.

    of: a person [m] or [1, m], whose edit it then is exactly; by default nobody's, to first order.
    InputError as of `edit`, for nothing to change, and for more than one person.
    """
    amounts = {**(amounts or {}), **more}
    if not amounts:
        raise InputError("slider: wanted at least one attribute=amount")
    if of is not None and tuple(of.shape) not in ((space.m,), (1, space.m)):
        raise InputError(f"of: wanted one person, [{space.m}], got {list(of.shape)}")
    person = (space.mu if of is None else of).reshape(1, space.m).to(space.mu)
    edited = edit(space, person, amounts, hold=hold)
    wide = Layout(space.layout.modules, 2 * space.layout.rank, 2 * space.layout.alpha)
    before, after = space.reconstruct(torch.cat([person, edited])).double()
    if of is not None:
        w = joined(space.layout, wide, [(after, after, 1.0), (before, before, -1.0)])
        return Slider(wide, w.float(), torch.zeros(1))
    w = joined(space.layout, wide, [(after - before, before, 1.0), (before, after - before, 1.0)])
    return Slider(wide, w.float(), _errors(space, wide, w, edited - person))


def joined(layout: Layout, wide: Layout, terms: Sequence[tuple[Tensor, Tensor, float]]) -> Tensor:
    """w of the sum of factor * B A over terms (w with A [d], w with B [d], factor)."""
    parts = [(layout.split(a), layout.split(b), factor) for a, b, factor in terms]
    return wide.flatten({
        name: (
            torch.cat([a[name][0] for a, _, _ in parts], dim=-2),
            torch.cat([factor * b[name][1] for _, b, factor in parts], dim=-1),
        )
        for name in layout.names
    })  # fmt: skip


def _errors(space: WeightSpace, wide: Layout, w: Tensor, step: Tensor) -> Tensor:
    """The slider's error for people of the population, or sampled ones where none are held."""
    from .sample import sample

    if space.coefficients is None:
        people = sample(space, _PEOPLE, seed=0)
    else:
        rows = torch.linspace(0, space.n - 1, min(space.n, _PEOPLE)).long()
        people = space.coefficients[rows.to(space.mu.device)]
    errors, delta = [], space.delta(step[0]).double()
    both = Layout(wide.modules, 2 * wide.rank, 2 * wide.alpha)
    for before in space.reconstruct(people):
        before = before.double()
        after = before + delta
        true = joined(space.layout, wide, [(after, after, 1.0), (before, before, -1.0)])
        rest = joined(wide, both, [(true, true, 1.0), (w, w, -1.0)])
        errors.append((_energy(both, rest) / _energy(wide, true).clamp_min(1e-300)).sqrt())
    return torch.stack(errors).float().cpu()


def _energy(layout: Layout, w: Tensor) -> Tensor:
    """The sum over modules of |B A|^2 = tr((B^T B)(A A^T)); the scale is left out."""
    return torch.stack([
        ((b.mT @ b) * (a @ a.mT)).sum() for a, b in layout.split(w).values()
    ]).sum().clamp_min(0)  # fmt: skip
