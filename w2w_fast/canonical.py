"""One form for a low-rank change, whoever trained it: balanced factors, turned to a reference.

    scale B A = dW        QR of A^T and of B, SVD of the small core, cut to the layout's rank:
    dW = U S V^T          A = (S / scale)^1/2 V^T,   B = U (S / scale)^1/2

A file's factors are one of infinitely many pairs of the same dW: (G A, B G^-1) for any invertible
G. Numbers of two files compare only where both took the same pair, so PCA needs one fixed for all.

*Balance.* With half of each singular value on either side, A A^T = B^T B, and what is left of G is
an orthogonal Q, for rank 1 a sign. Neither factor's variance drowns the other's, and distances
mean what they should: after the best Q, that between the factors of two changes is bounded by
||dW - dW'|| both ways, up to their norms and smallest kept singular value (Tu et al., Low-rank
Solutions of Linear Matrix Equations via Procrustes Flow, 2016). So what PCA over balanced factors
leaves out is small in dW as well.

*Signs and order.* `balanced` makes the entry of largest magnitude in each row of A positive and
sorts by singular value. Alone that jumps: two alike people whose two largest entries, or two
singular values, are near a tie come out with other signs or another order. `align` therefore turns
each module by the Q that brings it nearest to a reference (orthogonal Procrustes, Schoenemann
1966): signs, order and mixing of near-equal singular values at once, and it varies smoothly with
dW. One Q for everybody is a rotation of weight space: which reference it is costs nothing.

What remains: someone nearly orthogonal to the reference in a module has no sign there that noise
could not flip (the cosine with the reference tells), and the cut itself jumps where the last kept
and the first dropped singular value tie (the energy lost tells; a larger rank helps).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import Layout

_ROUNDS = 5  # of the mean and of everybody's turn to it; people who are alike settle in two


class Canonical(NamedTuple):
    """An adapter in canonical form.

    w [d] float32; energy [modules] float64, ||dW||^2 of each module in the layout's order; lost
    [modules], the share of it beyond the layout's rank.
    """

    w: Tensor
    energy: Tensor
    lost: Tensor


def canonical(modules: Mapping[str, tuple[Tensor, Tensor]], layout: Layout) -> Canonical:
    """Balanced factors of an adapter's change B A in each of the layout's modules.

    modules: name -> (A [r, in], B [out, r]), any rank r, scale within; every module of the layout
        with its widths, others are not looked at. Computed in float64, equal shapes at once.
    """
    groups: dict[tuple[torch.Size, torch.Size], list[int]] = {}
    pairs = [modules[name] for name in layout.names]
    for i, (a, b) in enumerate(pairs):
        groups.setdefault((a.shape, b.shape), []).append(i)
    energy = torch.zeros(len(pairs), dtype=torch.float64)
    kept = torch.zeros_like(energy)
    factors = {}
    for members in groups.values():
        a, b = (torch.stack([pairs[i][part] for i in members]).double() for part in (0, 1))
        a, b, sigma = balanced(a, b, layout.rank)
        energy[members] = sigma.square().sum(-1)
        kept[members] = sigma[:, : layout.rank].square().sum(-1)
        root = layout.scale**-0.5
        for i, one_a, one_b in zip(members, a * root, b * root, strict=True):
            factors[layout.names[i]] = (one_a, one_b)
    lost = torch.where(energy > 0, 1 - kept / energy, 0).clamp_min(0)
    return Canonical(layout.flatten(factors).float(), energy, lost)


def balanced(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(A [..., rank, in], B [..., out, rank], sigma [..., k]) of the change B A.

    a [..., r, in], b [..., out, r], k = min(r, in, out): sigma is all of B A's singular values,
    descending; rows beyond them are zero. The largest entry of each row of A is positive.
    """
    q_a, r_a = torch.linalg.qr(a.mT)
    q_b, r_b = torch.linalg.qr(b)
    u, sigma, v = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    # Rounding alone would be singular values of 1e-16 and, by the root, factors of 1e-8.
    noise = sigma[..., :1] * (max(a.shape[-1], b.shape[-2]) * torch.finfo(sigma.dtype).eps)
    root = sigma.where(sigma > noise, 0).sqrt()
    a = root.unsqueeze(-1) * (v @ q_a.mT)
    b = (q_b @ u) * root.unsqueeze(-2)
    largest = a.gather(-1, a.abs().argmax(-1, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(a.dtype)
    more = max(0, rank - sigma.shape[-1])
    a, b = (a * sign)[..., :rank, :], (b * sign.mT)[..., :rank]
    return F.pad(a, (0, 0, 0, more)), F.pad(b, (0, more)), sigma


def align(w: Tensor, layout: Layout, reference: Tensor | None = None) -> Tensor:
    """Turn balanced adapters w [n, d] to a reference [d], in place; their cosines with it [n].

    Without a reference they are turned to their own mean, found in turns from the first of them
    (generalised Procrustes). The changes B A stay what they are, up to rounding.
    """
    if reference is None:
        for _ in range(_ROUNDS):
            align(w, layout, w[0] if reference is None else reference)
            reference = w.double().mean(0)
    aims = layout.split(reference.double())
    dot = torch.zeros(len(w), dtype=torch.float64)
    for name, (a, b) in layout.split(w).items():
        aim_a, aim_b = aims[name]
        overlap = aim_a @ a.double().mT + aim_b.mT @ b.double()
        u, sigma, v = torch.linalg.svd(overlap)
        turn = u @ v
        a.copy_(turn @ a.double())
        b.copy_(b.double() @ turn.mT)
        dot += sigma.sum(-1)  # of the turned factors with the reference's
    norms = w.double().norm(dim=1) * reference.double().norm()
    return dot / norms.clamp_min(torch.finfo(torch.float64).tiny)
