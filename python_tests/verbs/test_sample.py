"""`sample`: seeds, independence of n, the law of the coefficients, refusals."""

from __future__ import annotations

import pytest
import torch

from w2w_fast import InputError, sample


def test_a_seed_gives_the_same_people(space):
    assert torch.equal(sample(space, 5, seed=3), sample(space, 5, seed=3))
    assert not torch.equal(sample(space, 5, seed=3), sample(space, 5, seed=4))


@pytest.mark.parametrize("m", [1, 3, 6])
def test_a_row_is_the_same_whatever_n_is(space, m):
    narrow = space.cut(m)
    many = sample(narrow, 37, seed=1)
    assert many.shape == (37, m)
    for n in (1, 2, 5, 17, 36):
        assert torch.equal(sample(narrow, n, seed=1), many[:n])


def test_coefficients_are_distributed_as_the_population(space):
    c = sample(space, 20_000, seed=0, factor=0.5).double()
    sigma = space.sigma.double()
    assert ((c.mean(0) - space.mu.double()).abs() < 4 * 0.5 * sigma / 20_000**0.5).all()
    assert ((c.std(0) / (0.5 * sigma) - 1).abs() < 0.03).all()


def test_factor_zero_is_the_mean(space):
    assert torch.equal(sample(space, 2, factor=0), space.mu.expand(2, -1))


def test_nobody(space):
    assert sample(space, 0).shape == (0, space.m)


@pytest.mark.parametrize(
    "arguments",
    [
        {"n": -1},
        {"n": 10**9},
        {"n": 2.0},
        {"n": True},
        {"factor": float("nan")},
        {"factor": -1.0},
        {"seed": -1},
        {"seed": 2**63},
        {"seed": 1.5},
    ],
)
def test_refusals_name_the_argument(space, arguments):
    (name,) = arguments
    with pytest.raises(InputError, match=name):
        sample(space, **arguments)
