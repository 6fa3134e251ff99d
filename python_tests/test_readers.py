"""Readers of attributes: what is left out and what is chance; how many components to keep."""

from __future__ import annotations

import awkward
import numpy as np
import oracle
import pytest
import torch
from sklearn.metrics import roc_auc_score

from w2w_fast import choice
from w2w_fast.errors import InputError
from w2w_fast.readers import fit_readers, readings


def world(n=90, m=8, rare=0.5):
    """c [n, m] with a falling spectrum; a binary, a continuous and a meaningless label."""
    c = awkward.normal(n, m, seed=1) * torch.linspace(20, 5, m)
    noise = awkward.normal(n, 3, seed=2)
    score = c[:, 0] / 20 - c[:, 2] / 15 + 0.3 * noise[:, 0]
    beard = (score > score.quantile(1 - rare)).float()
    return c, torch.stack([beard, 40 + c[:, 1] + 3 * noise[:, 1], noise[:, 2].sign()], dim=1)


NAMES = ["beard", "age", "nothing"]


@pytest.mark.parametrize("method", ["ridge", "lstsq", "logistic"])
@pytest.mark.parametrize("rare", [0.5, 0.1])
def test_figures_stand_out_of_their_null_or_do_not(method, rare):
    c, labels = world(rare=rare)
    weights, report = fit_readers(c, labels, NAMES, method=method)
    assert weights.shape == (3, 8) and weights.dtype == torch.float32
    for name, keys in [("beard", ("balanced_accuracy", "auc")), ("age", ("r2", "spearman"))]:
        for key in keys:
            mean, most = report[name]["null"][key]
            assert report[name][key] > max(0.8, most) and mean < most < 0.75
    nothing = report["nothing"]
    assert nothing["auc"] < nothing["null"]["auc"][1] + 0.05
    # Chance is one half also where a class is rare, and though labels are left out one by one.
    for name in ("beard", "nothing"):
        assert abs(report[name]["null"]["auc"][0] - 0.5) < 0.08
        assert abs(report[name]["null"]["balanced_accuracy"][0] - 0.5) < 0.08
    assert report["age"]["method"] == ("lstsq" if method == "lstsq" else "ridge")
    assert report["beard"]["method"] == method
    assert fit_readers(c, labels, NAMES, method=method)[1] == report  # seeded
    high = labels[:, 0] == 1
    assert (c[high] @ weights[0]).mean() > (c[~high] @ weights[0]).mean()


def test_scores_are_of_readers_that_never_saw_the_person():
    c, labels = world(30, 4)
    strength = fit_readers(c, labels[:, :1], ["beard"], permutations=0)[1]["beard"]["ridge"]
    scores = []
    for i in range(30):
        rest = torch.arange(30) != i
        weights, _ = oracle.ridge_left_out(c[rest], labels[rest, 0], strength)
        scores.append((oracle.f64(c[i]) - oracle.f64(c[rest]).mean(0)) @ weights)
    report = fit_readers(c, labels[:, :1], ["beard"], permutations=0)[1]["beard"]
    assert "null" not in report
    assert report["auc"] == pytest.approx(roc_auc_score(labels[:, 0], np.array(scores)))


def test_logistic_wants_two_of_each():
    c, labels = world(30, 4)
    labels[:, 0] = 0
    labels[3, 0] = 1
    with pytest.raises(InputError, match="beard: logistic wants two people of each kind, got 1"):
        fit_readers(c, labels, NAMES, method="logistic")


def test_readings_are_lines_and_survive_any_file():
    c, labels = world()
    lines = dict(readings(fit_readers(c, labels, NAMES)[1]))
    assert list(lines) == NAMES and "AUC 0." in lines["beard"] and "R2 0." in lines["age"]
    assert "by chance" in lines["nothing"]
    old = {
        "hat": {"accuracy": 0.9, "r2": 0.5, "ridge": 1.0},
        "odd": 3,
        "none": {"null": {"auc": 1}},
    }
    assert dict(readings(old)) == {
        "hat": "accuracy 0.900, R2 0.500", "odd": "nothing known", "none": "nothing known",
    }  # fmt: skip


# --- how many components


def factors(n, d, k, noise, seed=0):
    """w [n, d]: k directions that everybody shares, and noise of each alone."""
    shared = awkward.normal(n, k, seed=seed) @ awkward.normal(k, d, seed=seed + 1)
    return 3 + shared + noise * awkward.normal(n, d, seed=seed + 2)


@pytest.mark.parametrize("k", [1, 4, 9])
def test_completion_finds_what_is_shared(k):
    w = factors(60, 200, k, 0.8)
    assert choice.by_completion([w], choice.most(60)) == k
    assert choice.by_completion(list(w.split(7)), choice.most(60)) == k


def test_completion_is_that_of_the_formula():
    """The errors of every number of components at once, against least squares for each."""
    w = factors(20, 60, 3, 2.0)
    seen = []

    def keep(errors):
        seen.append(errors)
        return 0

    original, choice._fewest = choice._fewest, keep
    try:
        choice.by_completion([w], 8)
    finally:
        choice._fewest = original
    place = torch.arange(20) % 5
    train, held = oracle.f64(w[place > 0]), oracle.f64(w[place == 0])
    mean, std, basis, _ = oracle.pca(train, 8)
    z = (held - mean) / std
    shown = (torch.rand(60, generator=torch.Generator().manual_seed(0)) < 0.5).numpy()
    for k in range(9):
        found = np.linalg.lstsq(basis[shown, :k], z[:, shown].T, rcond=None)[0]
        rest = z[:, ~shown].T - basis[~shown, :k] @ found
        np.testing.assert_allclose(seen[0][:, k], (rest**2).sum(0), rtol=1e-3)


def test_reading_takes_the_fewest_that_read_as_well():
    c = awkward.normal(200, 40, seed=3) * torch.linspace(3, 1, 40)
    labels = c[:, [4]] + c[:, [1]] + 0.3 * awkward.normal(200, 1, seed=4)
    assert 5 <= choice.by_reading(c, labels) <= 8


def test_too_few_to_choose_from():
    with pytest.raises(InputError, match="wanted 10 models or more to choose from, got 9"):
        choice.most(9)
    assert choice.most(10) == 3 and choice.most(10**6) == choice.MOST
