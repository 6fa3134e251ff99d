"""`sample`: seeds, independence of n, the law of the coefficients, refusals."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_world import ATTRIBUTES

from w2w_fast import InputError, sample
from w2w_fast.attributes import attributes_of, read_attributes, scores
from w2w_fast.verbs.sample import parse_given


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


# --- full covariance, Latin hypercubes, conditions ----------------------------------------------


@pytest.fixture
def turned(space):
    """A space whose components are correlated in the people it holds, as after a cut of them."""
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))[0]
    stretched = (space.coefficients - space.mu) * torch.linspace(1.0, 0.2, 6)
    c = stretched @ turn.T + 1.0
    made = dataclasses.replace(space, coefficients=c, mu=None, sigma=None, meta={})
    made.fit_directions(space.labels, ATTRIBUTES, permutations=0)
    return made


def moments(c):
    z = c.double() - c.double().mean(0)
    return c.double().mean(0), z.T @ z / len(z)


def test_a_full_covariance_is_the_populations(turned):
    S = turned.covariance()
    sd = S.diagonal().sqrt()
    assert ((S / sd / sd[:, None]).fill_diagonal_(0).abs() > 0.2).any()  # or it were nothing new
    mean, found = moments(sample(turned, 40_000, covariance="full", factor=0.5))
    assert (mean - turned.mu).abs().max() < 0.02 * sd.max()
    assert (found - 0.25 * S).abs().max() < 0.02 * S.abs().max()
    few = sample(turned, 7, covariance="full")
    assert torch.allclose(few, sample(turned, 50, covariance="full")[:7], rtol=0, atol=1e-5)


def test_a_latin_hypercube_has_one_person_a_slice(space):
    n = 50
    z = (sample(space, n, seed=4, method="latin") - space.mu) / space.sigma
    slices = (torch.special.ndtr(z.double()) * n).floor().long()
    assert (slices.sort(0).values == torch.arange(n)[:, None]).all()
    assert torch.equal(*(sample(space, n, seed=4, method="latin") for _ in range(2)))
    assert sample(space, 0, method="latin").shape == (0, space.m)
    # Its mean is nearer to the population's than that of as many drawn at random.
    drawn = (sample(space, n, seed=4) - space.mu) / space.sigma
    assert z.mean(0).abs().max() < 0.2 * drawn.mean(0).abs().max()


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
@pytest.mark.parametrize("method", ["random", "latin"])
def test_readings_are_as_given_for_everybody(turned, covariance, method):
    options = {"covariance": covariance, "method": method, "seed": 2, "factor": 0.7}
    c = sample(turned, 30, given={"beard": 1, "age": 0.5}, **options)
    known = attributes_of(turned)
    read = scores(turned, c)
    for name, label in (("beard", 1), ("age", 0.5)):
        column = read[:, known[name].row]
        assert torch.allclose(column, torch.tensor(known[name].score_of(label)).double(), atol=1e-5)
    assert read[:, known["glasses"].row].std() > 0.05  # not given: free
    shown = read_attributes(turned, c)["beard"]["probability"]
    without = sample(turned, 30, given={"beard": 0, "age": 0.5}, **options)
    assert (shown > read_attributes(turned, without)["beard"]["probability"] + 0.1).all()


def test_a_condition_is_the_gaussians_own(turned):
    """Against the closed form, and against people drawn at large of whom few fit."""
    small = turned.cut(3)
    S, R = small.covariance(), small.classifiers[:1].double()
    known = attributes_of(small)["beard"]
    gap = known.score_of(1.0)
    gain = S @ R.T / (R @ S @ R.T)
    c = sample(small, 40_000, covariance="full", given={"beard": 1})
    mean, found = moments(c)
    scale = S.diagonal().max()
    assert (mean - small.mu - gain[:, 0] * gap).abs().max() < 0.03 * scale.sqrt()
    assert (found - (S - gain @ R @ S)).abs().max() < 0.03 * scale
    assert torch.linalg.eigvalsh(found)[0] < 1e-5 * scale  # nobody leaves the plane

    crowd = sample(small, 1_000_000, seed=9, covariance="full")
    width = 0.02 * float((R @ S @ R.T).sqrt())
    fits = crowd[(scores(small, crowd)[:, known.row] - gap).abs() < width]
    assert len(fits) > 2000
    some_mean, some = moments(fits)
    assert (some_mean - mean).abs().max() < 0.1 * scale.sqrt()
    assert (some - found).abs().max() < 0.1 * scale


def test_conditions_need_not_know_how_many(turned):
    one = sample(turned, 3, given={"age": 1.0})
    assert torch.allclose(one, sample(turned, 11, given={"age": 1.0})[:3], rtol=0, atol=1e-5)


def test_conditions_that_nobody_meets_are_said(turned):
    with pytest.warns(UserWarning, match="age=99: farther from the mean than anybody"):
        sample(turned, 1, given={"age": 99})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"hat": 1}, "'hat' is not in this space; it has beard, age, glasses"),
        ({"beard": 2}, "beard: wanted 0 to 1, got 2"),
        ({"age": float("nan")}, "age: wanted a finite number"),
        ({"age": "old"}, "age: wanted a finite number"),
    ],
)
def test_conditions_are_checked(space, given, said):
    with pytest.raises(InputError, match=said):
        sample(space, 2, given=given)


def test_conditions_that_contradict_each_other(space):
    twin = space.classifiers.clone()
    twin[2] = 2 * twin[0]
    with pytest.raises(InputError, match="beard, glasses are alike"):
        sample(dataclasses.replace(space, classifiers=twin), 2, given={"beard": 1, "glasses": 0})


def test_conditions_need_a_reader_that_was_calibrated(space):
    bare = dataclasses.replace(space, labels=None, meta={})
    with pytest.raises(InputError, match="beard: what its reader's scores mean is not known"):
        sample(bare, 2, given={"beard": 1})
    with pytest.raises(InputError, match="does not hold its own"):
        sample(dataclasses.replace(space, coefficients=None), 2, covariance="full")


def test_parse_given():
    assert parse_given("beard=1, age=-4.5,") == {"beard": 1.0, "age": -4.5}
    for text in ("beard", "beard=x", "beard=1,beard=0", "hold=age", "beard=nan"):
        with pytest.raises(InputError):
            parse_given(text)


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
        {"covariance": "wide"},
        {"method": "sobol"},
    ],
)
def test_refusals_name_the_argument(space, arguments):
    (name,) = arguments
    with pytest.raises(InputError, match=name):
        sample(space, **arguments)
