"""Linear algebra of tall matrices and linear readers; what is small is done in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_NUMBERS = 1 << 24  # of a block: 128 MB in float64


def spans(length: int, step: int) -> list[tuple[int, int]]:
    """[start, stop) of the blocks of at most ``step`` that cover ``length``."""
    step = max(1, step)
    return [(start, min(length, start + step)) for start in range(0, length, step)]


def inner(a: Tensor, b: Tensor) -> Tensor:
    """a^T b ``[p, q]`` float64 of a ``[d, p]`` and b ``[d, q]``, in blocks of rows."""
    out = a.new_zeros(a.shape[1], b.shape[1], dtype=torch.float64)
    for start, stop in spans(len(a), BLOCK_NUMBERS // max(1, a.shape[1] + b.shape[1])):
        out.addmm_(a[start:stop].double().mT, b[start:stop].double())
    return out


def multiply_(a: Tensor, right: Tensor) -> Tensor:
    """a right, a ``[d, p]`` and right ``[p, q]`` with q <= p, in a's memory; returns ``[d, q]``."""
    right = right.to(a.dtype)
    out = a[:, : right.shape[1]]
    for start, stop in spans(len(a), BLOCK_NUMBERS // a.shape[1]):
        out[start:stop] = a[start:stop] @ right
    return out


def orthonormalise_(a: Tensor, *others: Tensor, rounds: int = 2) -> None:
    """CholeskyQR: a ``[d, p]`` becomes Q of a = Q R, in place; each of ``others``, that times R^-1.

    R is Cholesky's factor of a^T a, which is summed in float64, so one round serves condition
    numbers to 1e7, and a second restores what the first lost (CholeskyQR2: Yamamoto et al., 2015).
    Where Cholesky fails, a has columns that depend on each other: Householder QR takes over, and
    ``others`` are set to 0.
    """
    for _ in range(rounds):
        factor, failed = torch.linalg.cholesky_ex(inner(a, a), upper=True)
        if int(failed) or not bool(factor.isfinite().all()):
            a.copy_(torch.linalg.qr(a)[0])
            for other in others:
                other.zero_()
            return
        eye = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
        inverse = torch.linalg.solve_triangular(factor, eye, upper=True)
        for matrix in (a, *others):
            multiply_(matrix, inverse)


def largest_angle(a: Tensor, b: Tensor) -> float:
    """The largest principal angle, in radians, between the spans of a and b ``[d, m]``.

    Both have orthonormal columns. The sine is the largest singular value of b - a (a^T b): exact
    for the small angles that the cosine cannot tell from 0 (Björck and Golub, 1973).
    """
    cosines = inner(a, b)
    square = torch.zeros_like(cosines[0].outer(cosines[0]))
    for start, stop in spans(len(a), BLOCK_NUMBERS // (2 * a.shape[1])):
        rest = b[start:stop].double() - a[start:stop].double() @ cosines
        square.addmm_(rest.mT, rest)
    return float(torch.linalg.eigvalsh(square)[-1].clamp(0, 1).sqrt().asin())


@dataclass(frozen=True)
class Reader:
    """Linear readers of a columns: weights ``[a, m]``, strength and left-out R2 ``[a]``.

    predictions ``[n, a]``: of each model by the readers fitted without it.
    """

    weights: Tensor
    strength: Tensor
    r2: Tensor
    predictions: Tensor


def ridge(c: Tensor, y: Tensor, strengths: Tensor | None = None) -> Reader:
    """Ridge regression of y ``[n, a]`` on c ``[n, m]``, both centred; float64.

    Each column takes, of ``strengths`` (28 powers around the mean eigenvalue by default; 0 is
    least squares), the one of least squared error left one out, which is exact and closed:
    ``(y - y_hat) / (1 - h)``, h the diagonal of the hat matrix. predictions are in y's units.
    """
    n, m = c.shape
    z = c.double() - c.double().mean(0)
    truth = y.double() - y.double().mean(0)
    values, vectors = torch.linalg.eigh(z.mT @ z)
    values = values.clamp_min(0)
    usable = values > 1e-12 * values[-1].clamp_min(1e-300)
    if strengths is None:
        strengths = values.mean() * torch.logspace(-6, 3, 28, dtype=torch.float64, device=c.device)
    # In the eigenvectors' coordinates a reader is the cross product, shrunk: [s, m] * [m, a].
    z = z @ vectors
    shrink = torch.where(usable, 1 / (values + strengths[:, None]), 0)
    hat = torch.cat([part.square() @ shrink.mT for part in z.split(BLOCK_NUMBERS // m + 1)])
    rest = (1 - hat - 1 / n).clamp_min(1e-9)  # [n, s]; 1 / n is the intercept's share
    parts = []
    for start, stop in spans(y.shape[1], BLOCK_NUMBERS // (len(strengths) * max(n, m))):
        mine = truth[:, start:stop]
        weights = shrink[:, :, None] * (z.mT @ mine)
        errors = (mine - z @ weights) / rest.mT[:, :, None]  # [s, n, a]
        least, best = errors.square().sum(1).min(0)
        pick = torch.arange(stop - start, device=c.device)
        parts.append((weights[best, :, pick] @ vectors.mT, best, least, errors[best, :, pick]))
    weights, best, least, errors = (torch.cat(part) for part in zip(*parts, strict=True))
    r2 = 1 - least / truth.square().sum(0)
    return Reader(weights, strengths[best], r2, y.double() - errors.mT)
