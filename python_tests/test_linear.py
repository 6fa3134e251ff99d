"""Orthonormal bases, angles and ridge regression against the oracle."""

import awkward
import numpy as np
import oracle
import pytest
import torch

from w2w_fast.linear import largest_angle, multiply_, orthonormalise_, ridge
from w2w_fast.testing import assert_close


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e5])
def test_cholesky_qr(condition, monkeypatch):
    monkeypatch.setattr("w2w_fast.linear.BLOCK_NUMBERS", 300)
    u, _, vt = torch.linalg.svd(awkward.normal(80, 12, seed=1).double(), full_matrices=False)
    a = (u * torch.logspace(0, -np.log10(condition), 12, dtype=torch.float64) @ vt).float()
    q, other = a.clone(), a.clone()
    orthonormalise_(q, other)
    assert_close("orthonormal", q.mT @ q, torch.eye(12), 1e-6)
    assert_close("other", other, q, 1e-2)  # a R^-1, with the R of both rounds: Q again
    want, r = torch.linalg.qr(a.double())
    assert_close("Q", q, want * r.diagonal().sign(), 1e-6 * condition)


def test_dependent_columns_are_householders(poisoned):
    a = awkward.normal(30, 4, seed=2)
    q, other = torch.cat([a, a], dim=1), torch.ones(30, 8)
    orthonormalise_(q, other)
    assert_close("orthonormal", q.mT @ q, torch.eye(8), 1e-6)
    assert largest_angle(q, torch.linalg.qr(a)[0]) < 1e-6 and not other.any()


def test_a_product_in_place():
    a, right = awkward.normal(40, 6, seed=3), awkward.normal(6, 4, seed=4)
    want = a @ right
    got = multiply_(a, right)
    assert_close("a right", got, want, 1e-5)
    assert got.data_ptr() == a.data_ptr()


@pytest.mark.parametrize("angle", [1e-6, 1e-3, 0.5, 1.5])
def test_the_largest_angle(angle):
    q = torch.linalg.qr(awkward.normal(50, 6, seed=5).double())[0]
    a, b = q[:, :3], q[:, :3].clone()
    b[:, 1] = np.cos(angle) * q[:, 1] + np.sin(angle) * q[:, 4]
    mixed = b @ torch.linalg.qr(awkward.normal(3, 3, seed=6).double())[0]
    assert largest_angle(a, mixed) == pytest.approx(angle, rel=1e-6)
    assert largest_angle(a, a) < 1e-12


@pytest.mark.parametrize("strength", [0.0, 0.5, 50.0])
def test_ridge_left_out_is_exact(strength):
    c, y = awkward.normal(30, 7, seed=1) + 2, awkward.normal(30, 2, seed=2) + 5
    got = ridge(c, y, torch.tensor([strength], dtype=torch.float64))
    for i in range(2):
        weights, predictions = oracle.ridge_left_out(c, y[:, i], strength)
        assert_close("weights", got.weights[i], weights, 1e-9)
        assert_close("predictions", got.predictions[:, i], predictions, 1e-8)
        truth = oracle.f64(y[:, i])
        r2 = 1 - ((truth - predictions) ** 2).sum() / ((truth - truth.mean()) ** 2).sum()
        assert abs(float(got.r2[i]) - r2) < 1e-9


def test_ridge_takes_the_best_strength_of_each_column(monkeypatch):
    c = awkward.normal(60, 20, seed=1)
    y = torch.stack([c[:, 0] * 2, awkward.normal(60, seed=3)], dim=1)
    strengths = torch.tensor([1e-3, 1.0, 1e3], dtype=torch.float64)
    got = ridge(c, y, strengths)
    losses = [
        [((oracle.f64(y[:, i]) - oracle.ridge_left_out(c, y[:, i], float(s))[1]) ** 2).sum()
         for s in strengths]
        for i in range(2)
    ]  # fmt: skip
    assert got.strength.tolist() == [float(strengths[np.argmin(loss)]) for loss in losses]
    assert got.strength[0] < got.strength[1]
    monkeypatch.setattr("w2w_fast.linear.BLOCK_NUMBERS", 20 * 7)
    again = ridge(c, y, strengths)
    assert_close("weights", again.weights, got.weights, 1e-9)
    assert_close("predictions", again.predictions, got.predictions, 1e-9)
