"""`blend`: ends to the bit, a straight line, an arc of a great circle."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from w2w_fast import InputError, blend, sample
from w2w_fast.whereabouts import whitened


@pytest.fixture
def pair(space):
    return sample(space, 2, seed=4)


@pytest.mark.parametrize("method", ["linear", "spherical"])
@pytest.mark.parametrize("steps", [2, 9])
def test_the_ends_are_the_two_people(space, pair, method, steps):
    made = blend(space, pair[0], pair[1:], steps, method=method)
    assert made.shape == (steps, space.m) and made.dtype == torch.float32
    assert torch.equal(made[0], pair[0]) and torch.equal(made[-1], pair[1])


def test_linear_is_a_straight_line(space, pair):
    made = blend(space, *pair, 5)
    for i, t in enumerate(np.linspace(0, 1, 5)):
        want = (1 - t) * pair[0].double() + t * pair[1].double()
        assert torch.allclose(made[i].double(), want, atol=1e-5)


def test_spherical_turns_evenly_and_keeps_the_distance(space, pair):
    z = whitened(space, blend(space, *pair, 9, method="spherical")).double().numpy()
    length = np.linalg.norm(z, axis=1)
    assert np.allclose(length, np.linspace(length[0], length[-1], 9), atol=1e-4)
    unit = z / length[:, None]
    angles = np.arccos((unit[1:] * unit[:-1]).sum(1))
    assert np.allclose(angles, angles.mean(), atol=1e-4)
    # In the plane of the two.
    basis = np.linalg.qr(unit[[0, -1]].T)[0]
    assert np.allclose(unit @ basis @ basis.T, unit, atol=1e-4)
    straight = whitened(space, blend(space, *pair, 9)).norm(dim=1)
    assert straight[4] < 0.9 * length[4]  # who would be nearer the mean


def test_a_person_and_itself(space, pair):
    for method in ("linear", "spherical"):
        made = blend(space, pair[0], pair[0], 4, method=method)
        assert torch.allclose(made, pair[0].expand(4, -1), atol=1e-4)


def test_what_nobody_differs_in_goes_straight(space, pair):
    flat = dataclasses.replace(space, sigma=space.sigma.clone().index_fill_(0, torch.tensor(2), 0))
    made = blend(flat, *pair, 3, method="spherical")
    assert made[1, 2] == pytest.approx(float(pair[:, 2].mean()), abs=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 1}, "steps"),
        ({"steps": 2.0}, "steps"),
        ({"method": "cubic"}, "method"),
        ({"b": torch.zeros(3)}, "b: wanted one person"),
        ({"a": torch.zeros(2, 6)}, "a: wanted one person"),
    ],
)
def test_refusals(space, pair, options, said):
    with pytest.raises(InputError, match=said):
        blend(space, **{"a": pair[0], "b": pair[1], **options})


def test_no_shortest_way(space, pair):
    with pytest.raises(InputError, match="opposite"):
        blend(space, pair[0], 2 * space.mu - pair[0], method="spherical")
    with pytest.raises(InputError, match="no direction"):
        blend(space, pair[0], space.mu, method="spherical")
