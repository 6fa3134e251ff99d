"""Directions that no label asked for: principal components and independent components.

"pc3" is the third principal component. "ica3" is the third of the independent components that
FastICA (Hyvarinen and Oja, 2000; scikit-learn's) finds in the ten leading principal components of
the people a space holds: what comes in two kinds first, as most attributes of two values do, what
a few odd people make last. They are for looking around: what one of them changes nobody promised,
its sign means nothing, and another population, or version of the library, gives others.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from .errors import InputError
from .space import WeightSpace

MOST = 10
"""Independent components of a space, at most: as many leading principal components are mixed."""
_NAME = re.compile(r"(pc|ica)([1-9][0-9]{0,5})")


def is_exploratory(space: WeightSpace, name: str) -> bool:
    """Whether the name is that of a direction here; a space's own attribute comes first."""
    return name not in space.attributes and _NAME.fullmatch(name) is not None


def reader(space: WeightSpace, name: str) -> Tensor:
    """The linear reader [m] float64 of "pc..." or "ica...", one sd of the population a unit.

    InputError for a number that is not there, and for ica in a space without people.
    """
    kind, number = _NAME.fullmatch(name).groups()
    if kind == "ica":
        found = independent(space)
        most = len(found)
    else:
        most = space.m
    if int(number) > most:
        raise InputError(f"direction: {name!r}: this space has {kind}1 to {kind}{most}")
    if kind == "ica":
        return found[int(number) - 1]
    row = torch.zeros_like(space.mu, dtype=torch.float64)
    row[int(number) - 1] = 1 / space.sigma[int(number) - 1].double().clamp_min(1e-30)
    return row


def independent(space: WeightSpace) -> Tensor:
    """Readers [q, m] float64 of the independent components, q = min(10, m, n / 10).

    Their scores (c - mu) @ row have variance 1 over the people held, and no correlation.
    """
    q = min(MOST, space.m, space.n // 10)
    if q < 2:
        raise InputError("ica: wanted a space that holds 20 people or more")
    from scipy.stats import kurtosis, skew
    from sklearn.decomposition import FastICA

    x = (space.coefficients - space.mu)[:, :q].double().cpu().numpy()
    model = FastICA(q, whiten="unit-variance", fun="cube", random_state=0, max_iter=2000).fit(x)
    rows = model.components_
    sources = x @ rows.T
    order = kurtosis(sources).argsort()
    tail = [1 if s >= 0 else -1 for s in skew(sources[:, order])]
    found = torch.from_numpy(rows[order]) * torch.tensor(tail)[:, None]
    return torch.nn.functional.pad(found, (0, space.m - q)).to(space.mu.device)


def resembles(space: WeightSpace, row: Tensor, most: int = 2) -> list[tuple[str, float]]:
    """Attributes whose labels a reader's scores go along with: (name, correlation), best first."""
    if space.labels is None or space.coefficients is None:
        return []
    score = (space.coefficients.double() - space.mu.double()) @ row
    together = torch.corrcoef(torch.cat([score[None], space.labels.double().T]))[0, 1:]
    best = together.abs().argsort(descending=True)[:most].tolist()
    return [(space.attributes[i], float(together[i])) for i in best]
