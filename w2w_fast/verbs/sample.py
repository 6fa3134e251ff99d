"""`sample`: people who do not exist (w2w paper, section 3.2).

    c = mu + factor * S^1/2 z,  z ~ N(0, 1)

S is diag(sigma^2), the paper's: each principal component on its own, for over the population that
the components were fitted to they are uncorrelated by construction; or the covariance of the people
that the space holds, where these are others. Given linear readings R (c - mu) = t, the Gaussian of
c has the mean and the covariance

    mu + K t,  factor^2 (S - K R S)      with K = S R^T (R S R^T)^-1

and a person drawn without the condition becomes one drawn with it by c + K (t - R (c - mu))
(Hoffman and Ribak, Constrained realizations of Gaussian fields, 1991).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ..attributes import attributes_of, check_known, scores
from ..denoise import check_seed
from ..errors import InputError
from ..space import WeightSpace
from .edit import parse_amounts

MOST = 1_000_000


def sample(
    space: WeightSpace,
    n: int = 1,
    *,
    seed: int = 0,
    factor: float = 1.0,
    covariance: str = "diagonal",
    method: str = "random",
    given: Mapping[str, float] | None = None,
) -> Tensor:
    """n sampled identities: coefficients [n, m] f32.

    factor: below 1 gives more average people, above 1 more unusual ones.
    covariance: "diagonal", the paper's, or "full", that of the people the space holds.
    method: "random", where row i is the same whatever n is (with a full covariance or a condition,
        to the rounding of float32); or "latin", a Latin hypercube: of n equally likely slices of
        each of z's coordinates each row has another, so that few people cover the space evenly, and
        rows depend on n.
    given: attribute -> label, such as {"beard": 1, "age": 45}: everybody's linear reading is that
        which people of this label have on average, exactly. For an attribute of two values a
        number between them is undecided.
    Raises InputError for n outside 0..1,000,000, a factor that is not a finite number >= 0, unknown
    attributes, values that are no labels, and conditions that are alike or that nobody can read.
    """
    if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n <= MOST:
        raise InputError(f"n: wanted a whole number from 0 to {MOST:,}, got {n!r}")
    if not (math.isfinite(factor) and factor >= 0):
        raise InputError(f"factor: wanted a finite number >= 0, got {factor!r}")
    if covariance not in ("diagonal", "full") or method not in ("random", "latin"):
        raise InputError(
            "wanted covariance diagonal or full, and method random or latin; got "
            f"{covariance!r} and {method!r}"
        )
    if covariance == "full" and space.coefficients is None:
        raise InputError("covariance: full is that of people, and this space does not hold its own")
    check_seed(seed)
    z = _latin(n, space.m, seed) if method == "latin" else _random(n, space.m, seed)
    if covariance == "diagonal":
        mu, sigma = space.mu.float().cpu(), space.sigma.float().cpu()
        c = mu + factor * sigma * z
    else:
        c = (
            space.mu.double().cpu() + factor * z.double() @ _root(space.covariance().cpu())
        ).float()
    if given:
        S = space.sigma.double().square().diag() if covariance == "diagonal" else space.covariance()
        c = _conditioned(space, c.to(space.mu), S, given)
    return c.to(space.mean.device)


def parse_given(text: str) -> dict[str, float]:
    """Read "beard=1,age=45" as {"beard": 1.0, "age": 45.0}."""
    values, hold = parse_amounts(text)
    if hold:
        raise InputError("given: hold is for edits; wanted attribute=label, as in beard=1")
    return values


def _random(n: int, m: int, seed: int) -> Tensor:
    # torch draws normal numbers sixteen at a time and draws an incomplete last group anew: rows of
    # whole groups are what makes a row the same whatever comes after it.
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, -(-m // 16) * 16, generator=generator)[:, :m]


def _latin(n: int, m: int, seed: int) -> Tensor:
    from scipy.special import ndtri
    from scipy.stats.qmc import LatinHypercube

    if not n:
        return torch.empty(0, m)
    u = LatinHypercube(m, rng=np.random.default_rng(seed)).random(n)
    return torch.from_numpy(ndtri(u.clip(1e-12, 1 - 1e-12))).float()


def _root(S: Tensor) -> Tensor:
    """The symmetric S^1/2: one whatever signs and order eigenvectors come in."""
    values, vectors = torch.linalg.eigh(S)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def _conditioned(space: WeightSpace, c: Tensor, S: Tensor, given: Mapping[str, float]) -> Tensor:
    """People c [n, m] of covariance S, moved to where their readings are as given."""
    known = attributes_of(space)
    wanted, rows = [], []
    for name, value in given.items():
        check_known(space, name)
        if name not in known:
            raise InputError(f"given: {name}: what its reader's scores mean is not known; fit it "
                             "again (`w2w directions`)")  # fmt: skip
        one = known[name]
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not math.isfinite(value)
        ):
            raise InputError(f"given: {name}: wanted a finite number, got {value!r}")
        if one.binary and not one.low <= value <= one.high:
            raise InputError(f"given: {name}: wanted {one.low:g} to {one.high:g}, got {value:g}")
        wanted.append(one.score_of(float(value)))
        rows.append(one.row)
    R = space.classifiers[rows].double()
    gain = S @ R.T
    gram = R @ gain
    unit = gram.diagonal().clamp_min(1e-300).rsqrt()
    if torch.linalg.cond(gram * unit * unit[:, None]) > 1e10:
        raise InputError(f"given: {', '.join(given)} are alike: together they say nothing, or two "
                         "things at once")  # fmt: skip
    target = torch.tensor(wanted, dtype=torch.float64, device=R.device)
    _warn_if_unseen(space, given, rows, target, gram)
    gap = target - scores(space, c)[:, rows]
    return (c.double() + gap @ torch.linalg.solve(gram, gain.T)).float()


def _warn_if_unseen(
    space: WeightSpace, given: Mapping[str, float], rows: list[int], target: Tensor, gram: Tensor
) -> None:
    """If nobody's readings are as far from the mean, in their own covariance, as those wanted."""
    if space.coefficients is None:
        return
    readings = scores(space, space.coefficients)[:, rows]
    both = torch.cat([readings, target[None]])
    far = (both * torch.linalg.solve(gram, both.T).T).sum(1)
    if far[-1] > far[:-1].max():
        said = ", ".join(f"{name}={value:g}" for name, value in given.items())
        warnings.warn(f"given {said}: farther from the mean than anybody the space was made from",
                      stacklevel=4)  # fmt: skip
