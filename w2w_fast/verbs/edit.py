"""`edit`: move people along the directions of attributes (w2w paper, section 3.3).

    c' = c + sum_j amount_j * direction_j

A direction's length is one standard deviation of the population along it, so that an amount is
a number a person can guess: +1 is a usual difference between people, +4 a strong one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import explore
from ..attributes import check_known
from ..errors import InputError
from ..ops import edit as move
from ..space import WeightSpace


def edit(
    space: WeightSpace,
    coefficients: Tensor,
    amounts: dict[str, float | Tensor] | None = None,
    *,
    hold: str | Sequence[str] = (),
    **more: float | Tensor,
) -> Tensor:
    """Edited coefficients [k, m]: `edit(space, people, age=+1.5, hold="glasses")`.

    amounts, or keywords: attribute -> amount in population standard deviations, a number or [k].
        Beside the space's attributes "pc1", "pc2", ..., "ica1", ... may be named: see ``explore``.
    hold: attributes whose linear reading must not change.
    Raises InputError for an attribute the space has no direction for.
    """
    amounts = {**(amounts or {}), **more}
    held = list(dict.fromkeys([hold] if isinstance(hold, str) else hold))
    if coefficients.ndim != 2 or coefficients.shape[1] != space.m:
        raise InputError(f"coefficients: wanted [k, {space.m}], got {tuple(coefficients.shape)}")
    if both := set(held) & set(amounts):
        raise InputError(f"hold: {', '.join(sorted(both))} cannot be held and edited at once")
    for name, amount in amounts.items():
        v = direction(space, name, held)
        if not isinstance(amount, (int, float, Tensor)) or isinstance(amount, bool):
            raise InputError(f"{name}: wanted a number or a tensor [k], got {amount!r}")
        if not torch.isfinite(torch.as_tensor(amount)).all():
            raise InputError(f"{name}: wanted a finite amount, got {amount!r}")
        coefficients = move(coefficients, v.to(coefficients), amount)
    return coefficients


def direction(space: WeightSpace, name: str, hold: Sequence[str] = ()) -> Tensor:
    """The direction [m] of an attribute, one population standard deviation long.

    name: also "pc1", "ica1", ...: see ``explore``. With `hold`, the direction of
    S C (C^T S C)^-1 that changes the linear reading of `name` and of no held attribute; S is the
    covariance of the coefficients, C the linear readers.
    """
    own = not explore.is_exploratory(space, name)
    for attribute in (*([name] if own else []), *hold):
        _check(space, attribute)
    if own and not hold:
        return space.directions[space.attributes.index(name)]
    if space.classifiers is None and (own or hold):
        raise InputError("hold: this space has no linear readers; fit its directions here first")
    first = space.classifiers[space.attributes.index(name)] if own else explore.reader(space, name)
    held = [space.classifiers[space.attributes.index(attribute)] for attribute in hold]
    S = space.covariance()
    C = torch.stack([row.double() for row in (first, *held)], dim=1)
    V = S @ C
    gram = C.T @ V
    scale = gram.diagonal().clamp_min(1e-300).rsqrt()
    if torch.linalg.cond(gram * scale * scale[:, None]) > 1e10:
        raise InputError(f"hold: {', '.join(hold)} cannot stay while {name} changes: alike")
    u = torch.linalg.solve(gram, V.T)[0]  # row 0 of (C^T S C)^-1 (S C)^T: reads 1, 0, 0, ...
    u = u / u.norm()
    return (u * (u @ S @ u).sqrt()).float()


def _check(space: WeightSpace, name: str) -> None:
    if space.directions is None:
        raise InputError("space: has no directions; fit it with a table of labels first")
    check_known(space, name)


def parse_amounts(text: str) -> tuple[dict[str, float], list[str]]:
    """Read "beard=+1.5,age=-1,hold=glasses" as ({"beard": 1.5, "age": -1.0}, ["glasses"])."""
    amounts: dict[str, float] = {}
    hold: list[str] = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, value = (x.strip() for x in part.partition("="))
        if name == "hold" and value:
            hold.append(value)
            continue
        if name in amounts:
            raise InputError(f"{name} is given twice")
        try:
            amounts[name] = float(value)
        except ValueError:
            amounts[name] = math.nan
        if not equals or not math.isfinite(amounts[name]):
            raise InputError(f"{part!r}: wanted attribute=number, as in beard=+1.5")
    return amounts, hold
