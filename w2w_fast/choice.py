"""How many components to keep, when nobody says.

Where labels are known: the fewest that read people left out as well as any number does
(``by_reading``). Where they are not: the fewest that complete people left out as well
(``by_completion``), a bi-cross-validation (Gabriel, 2002; Owen and Perry, 2009): components come
from four fifths of the people; of each other one half of the numbers is shown, and the other half
predicted. A component that is noise of those it came from predicts nothing and costs error.
As well: within one standard error (Breiman et al., 1984), over the people, of the least error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import ranks
from .components import Stack, Standardised, moments, principal_components
from .errors import InputError
from .linear import inner, ridge

MOST = 1000
"""Components that are tried, at most, and a third of the models."""
_EVERY = 5


def most(n: int) -> int:
    """How many are tried of n models; InputError for fewer than ten."""
    if n < 10:
        raise InputError(f"components: wanted 10 models or more to choose from, got {n}")
    return min(n // 3, MOST)


def by_reading(c: Tensor, labels: Tensor) -> int:
    """From c ``[n, m]`` and labels ``[n, a]``: the number of leading columns to keep.

    The error of a person is the mean over attributes, in units of their variance, of the squared
    error of ridge readers that were fitted without that person.
    """
    tried = sorted({round(c.shape[1] ** (i / 23)) for i in range(24)})
    spread = labels.double().var(0, correction=0)
    errors = [
        ((labels.double() - ridge(c[:, :m], labels).predictions).square() / spread).mean(1)
        for m in tried
    ]
    return tried[_fewest(torch.stack(errors, dim=1))]


def by_completion(
    shards: list[Tensor], most: int, device: torch.device | str = "cpu", seed: int = 0
) -> int:
    """From shards w ``[n_i, d]``: the number of components, at most ``most``.

    With V_o and V_h the rows of the shown and the hidden numbers, a person's coefficients are the
    least squares t of z_o on V_o, and the hidden numbers V_h t. With V_o = Q R, leading columns
    have leading blocks of R, so one factor serves every number of components.
    """
    n, d = sum(map(len, shards)), shards[0].shape[1]
    place = torch.arange(n) % _EVERY
    train, held = (Stack(shards, where.nonzero()[:, 0]) for where in (place > 0, place == 0))
    known = moments(train, device=device)
    z = Standardised(train, known.mean, known.std, device=device)
    basis = principal_components(z, known.n, most, at_most=True, seed=seed).basis
    z = Standardised(held, known.mean, known.std, device=device)
    generator = torch.Generator().manual_seed(seed)
    shown = (torch.rand(d, generator=generator) < 0.5).to(z.device)
    v_shown = basis * shown[:, None]
    v_hidden = basis - v_shown
    factor, failed = torch.linalg.cholesky_ex(inner(v_shown, v_shown), upper=True)
    if int(failed):
        raise InputError(
            f"components: {basis.shape[1]} cannot be told apart in half of {d} numbers"
        )
    eye = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    inverse = torch.linalg.solve_triangular(factor, eye, upper=True)
    square = inverse.mT @ inner(v_hidden, v_hidden) @ inverse
    errors = torch.zeros(len(held), len(factor) + 1, dtype=torch.float64, device=z.device)
    for start, stop in ranks.share(held.spans()):
        rows = z.rows(start, stop)
        t = (rows @ v_shown).double() @ inverse
        truth = (rows @ v_hidden).double() @ inverse
        # |z_h - W t|^2 for the first k columns, from that for one fewer; W^T W = square.
        steps = t.square() * square.diagonal() + 2 * t * (t @ square.triu(1) - truth)
        errors[start:stop, 0] = (rows * ~shown).double().square().sum(1)
        errors[start:stop, 1:] = errors[start:stop, :1] + steps.cumsum(1)
    return max(1, _fewest(ranks.total(errors)))


def _fewest(errors: Tensor) -> int:
    """The first column of errors ``[n, k]`` within one standard error of the least mean."""
    best = int(errors.mean(0).argmin())
    more = errors - errors[:, best : best + 1]
    bound = more.std(0) / len(errors) ** 0.5
    return int((more.mean(0) <= bound).nonzero()[0])
