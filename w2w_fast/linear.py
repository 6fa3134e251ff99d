"""The linear algebra of a weight space, in float64: principal components and linear readers.

Both stream over blocks, so that no float64 copy of a population is ever held.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import InputError

_BLOCK_NUMBERS = 1 << 24  # 128 MB of float64


@dataclass(frozen=True)
class Components:
    """mean, std ``[d]``, basis ``[d, m]`` (orthonormal), explained ``[m]``: float64."""

    mean: Tensor
    std: Tensor
    basis: Tensor
    explained: Tensor


def principal_components(w: Tensor, m: int) -> Components:
    """PCA of the standardised population w ``[n, d]``: the m leading right singular vectors.

    A coordinate whose std is at most 1e-7 of its mean never moved: its std is set to 0 and its
    standardised value is 0. Eigenvectors come from the n x n Gram matrix or the d x d covariance,
    whichever is smaller, and QR restores what that loses of orthogonality. Each column's largest
    entry is positive, which fixes the signs. InputError for more than the population spans.
    """
    n, d = w.shape
    if not 1 <= m <= n - 1:
        raise InputError(f"components: wanted 1 to n - 1 = {n - 1} for {n} models, got {m}")
    columns = w.split(max(1, _BLOCK_NUMBERS // n), dim=1)
    stats = [torch.var_mean(part.double(), dim=0, correction=0) for part in columns]
    std = torch.cat([variance for variance, _ in stats]).sqrt()
    mean = torch.cat([centre for _, centre in stats])
    std[std <= 1e-7 * mean.abs()] = 0
    divisor = std.masked_fill(std == 0, torch.inf)

    def standardised(part: Tensor, at: slice = slice(None)) -> Tensor:
        return (part.double() - mean[at]) / divisor[at]

    def blocks() -> Iterator[Tensor]:
        start = 0
        for part in columns:
            yield standardised(part, slice(start, start + part.shape[1]))
            start += part.shape[1]

    by_models = n < d
    square = w.new_zeros((n, n) if by_models else (d, d), dtype=torch.float64)
    if by_models:
        for z in blocks():
            square.addmm_(z, z.mT)
    else:
        for part in w.split(max(1, _BLOCK_NUMBERS // d)):
            z = standardised(part)
            square.addmm_(z.mT, z)
    values, vectors = torch.linalg.eigh(square)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    rank = int((values > 1e-12 * values[0]).sum()) if values[0] > 0 else 0
    if m > rank:
        raise InputError(f"components: the population spans {rank} dimensions, got {m}")
    if by_models:
        vectors = torch.cat([z.mT @ vectors[:, :m] for z in blocks()])
    basis = torch.linalg.qr(vectors[:, :m])[0]
    basis[std == 0] = 0  # QR leaves rounding there
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    return Components(mean, std, basis * largest.sign(), values[:m] / values.sum())


@dataclass(frozen=True)
class Reader:
    """Linear readers of a columns: weights ``[a, m]``, strength and left-out R2 ``[a]``."""

    weights: Tensor
    strength: Tensor
    r2: Tensor
    predictions: Tensor


def ridge(c: Tensor, y: Tensor, strengths: Tensor | None = None) -> Reader:
    """Ridge regression of y ``[n, a]`` on c ``[n, m]``, both centred; float64.

    Each column takes, of ``strengths`` (28 powers around the mean eigenvalue by default; 0 is
    least squares), the one of least squared error left one out, which is exact and closed:
    ``(y - y_hat) / (1 - h)``, h the diagonal of the hat matrix. predictions ``[n, a]`` are those
    of the left-out models, in y's units.
    """
    n, m = c.shape
    c_mean, y_mean = c.double().mean(0), y.double().mean(0)
    step = max(1, _BLOCK_NUMBERS // m)
    rows = list(zip(c.split(step), y.split(step), strict=True))
    gram = c.new_zeros(m, m, dtype=torch.float64)
    cross = c.new_zeros(m, y.shape[1], dtype=torch.float64)
    for c_part, y_part in rows:
        z = c_part.double() - c_mean
        gram.addmm_(z.mT, z)
        cross.addmm_(z.mT, y_part.double() - y_mean)
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp_min(0)
    usable = values > 1e-12 * values[-1].clamp_min(1e-300)
    if strengths is None:
        strengths = values.mean() * torch.logspace(-6, 3, 28, dtype=torch.float64, device=c.device)
    # Rotated and shrunk coordinates: prediction = z Q diag(shrink) Q^T cross.
    shrink = torch.where(usable, 1 / (values + strengths[:, None]), 0)  # [s, m]
    weights = vectors @ (shrink[:, :, None] * (vectors.mT @ cross))  # [s, m, a]

    def pieces(shrink: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(centred c, centred y, 1 - hat ``[rows, s]``), a block of rows at a time."""
        for c_part, y_part in rows:
            z = c_part.double() - c_mean
            hat = (z @ vectors).square() @ shrink.mT + 1 / n  # 1 / n is the intercept's share
            yield z, y_part.double() - y_mean, (1 - hat).clamp_min(1e-9)

    squares = sum(
        ((truth - z @ weights) / rest.mT[..., None]).square().sum(1)
        for z, truth, rest in pieces(shrink)
    )  # [s, a]
    least, best = squares.min(0)
    pick = torch.arange(y.shape[1], device=c.device)
    weights = weights[best, :, pick]
    errors = [(truth - z @ weights.mT) / rest for z, truth, rest in pieces(shrink[best])]
    total = (y.double() - y_mean).square().sum(0)
    return Reader(weights, strengths[best], 1 - least / total, y.double() - torch.cat(errors))
