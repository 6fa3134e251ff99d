"""`sample`: people who do not exist (w2w paper, section 3.2).

c_j ~ N(mu_j, (factor * sigma_j)^2), each principal component on its own: over the population
the components are uncorrelated by construction.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..denoise import check_seed
from ..errors import InputError
from ..space import WeightSpace

MOST = 1_000_000


def sample(space: WeightSpace, n: int = 1, *, seed: int = 0, factor: float = 1.0) -> Tensor:
    """n sampled identities: coefficients [n, m] f32, row i the same whatever n is.

    factor: below 1 gives more average people, above 1 more unusual ones.
    Raises InputError for n outside 0..1,000,000 or a factor that is not a finite number >= 0.
    """
    if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n <= MOST:
        raise InputError(f"n: wanted a whole number from 0 to {MOST:,}, got {n!r}")
    if not (math.isfinite(factor) and factor >= 0):
        raise InputError(f"factor: wanted a finite number >= 0, got {factor!r}")
    check_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    # torch draws normal numbers sixteen at a time and draws an incomplete last group anew: rows of
    # whole groups are what makes a row the same whatever comes after it.
    z = torch.randn(n, -(-space.m // 16) * 16, generator=generator)[:, : space.m]
    mu, sigma = space.mu.float().cpu(), space.sigma.float().cpu()
    return (mu + factor * sigma * z).to(space.mean.device)
