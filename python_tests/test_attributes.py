"""Attributes read from coefficients: what a score means, and how sure that is."""

from __future__ import annotations

import dataclasses

import awkward
import numpy as np
import oracle
import pytest
import torch

from w2w_fast import InputError, Layout, WeightSpace
from w2w_fast.attributes import attributes_of, read_attributes, scores
from w2w_fast.layout import Module
from w2w_fast.readers import calibration, fit_readers

NAMES = ["beard", "age", "nothing"]


def population(n, seed=0):
    """c [n, 5] and labels: beard of two values, age, and one that c knows nothing of."""
    c = awkward.normal(n, 5, seed=seed) * torch.tensor([3.0, 2, 2, 1, 1]) + 1
    noise = awkward.normal(n, 3, seed=seed + 1)
    beard = (c[:, 0] - 1 + 1.5 * noise[:, 0] > 0).float()
    age = 40 + 5 * (c[:, 1] - 1) + 4 * noise[:, 1]
    return c, torch.stack([beard, age, (noise[:, 2] > 0.8).float()], 1)


def space_of(c, labels, method="ridge", **more):
    layout = Layout((Module("to_q", 8, 8),), 1, 1.0)
    space = WeightSpace(
        layout, torch.zeros(16), torch.ones(16), torch.eye(16)[:, : c.shape[1]].contiguous(),
        coefficients=c, **more,
    )  # fmt: skip
    space.fit_directions(labels, NAMES, method=method, permutations=0)
    return space


@pytest.mark.parametrize("method", ["ridge", "lstsq", "logistic"])
def test_readings_of_strangers_are_as_sure_as_they_say(method):
    space = space_of(*population(600), method=method)
    c, labels = population(4000, seed=10)
    found = read_attributes(space, c)
    age = found["age"]
    inside = (labels[:, 1] > age["low"]) & (labels[:, 1] < age["high"])
    assert 0.87 < inside.double().mean() < 0.93
    assert (age["value"] - labels[:, 1]).abs().mean() == pytest.approx(
        4 * (2 / torch.pi) ** 0.5, 0.05
    )
    p = found["beard"]["probability"]
    for low in (0.0, 0.2, 0.4, 0.6, 0.8):
        mine = (p >= low) & (p < low + 0.2)
        assert float(labels[mine, 0].double().mean()) == pytest.approx(
            float(p[mine].mean()), abs=0.09
        )
    # Nothing is known of the third: everybody is as likely as anybody.
    base = float(labels[:, 2].mean())
    assert (found["nothing"]["probability"] - base).abs().max() < 0.12


def test_a_reader_that_knows_nothing_says_the_base_rate_and_cannot_be_given():
    score = awkward.normal(100, seed=1).double()
    truth = (torch.arange(100) < 20).double()
    found = calibration(-score - 3 * truth, truth)  # lower for who has it
    assert found["label"][1] == 0 and found["score"][1] == 0
    assert torch.tensor(found["label"][0]).sigmoid() == pytest.approx(21 / 102)
    space = space_of(*population(100))
    space.meta["readers"]["beard"]["calibration"] = found
    with pytest.raises(InputError, match="beard: this space's reader knows nothing"):
        attributes_of(space)["beard"].score_of(1)


def test_what_never_mixes_is_not_certain():
    score = torch.cat([torch.linspace(-2, -1, 50), torch.linspace(1, 2, 50)])
    found = calibration(score, (score > 0).float())
    start, slope = found["label"]
    sure = torch.tensor([start + slope, start + 2 * slope]).sigmoid()
    assert 0.9 < sure[0] < sure[1] < 0.9999


def test_scores_count_from_the_spaces_mean():
    """Labels of some people only, whose mean is elsewhere, read in the labels' units."""
    c, labels = population(800)
    some = c[:, 1] > 2
    weights, report = fit_readers(c[some], labels[some], NAMES, permutations=0, origin=c.mean(0))
    space = space_of(c, labels)
    space = dataclasses.replace(space, classifiers=weights, meta={"readers": report})
    read = read_attributes(space, c)["age"]["value"]
    assert float((read[some] - labels[some, 1]).mean()) == pytest.approx(0, abs=0.3)


def test_older_spaces_are_calibrated_when_they_are_read():
    space = space_of(*population(300))
    kept = attributes_of(space)
    bare = {k: {a: b for a, b in v.items() if a != "calibration"}
            for k, v in space.meta["readers"].items()}  # fmt: skip
    old = dataclasses.replace(space, meta={"readers": bare})
    for name, attribute in attributes_of(old).items():
        assert dataclasses.astuple(attribute)[:4] == dataclasses.astuple(kept[name])[:4]
        assert attribute.label == pytest.approx(kept[name].label, rel=1e-4, abs=1e-6)
        assert attribute.score == pytest.approx(kept[name].score, rel=1e-4, abs=1e-6)
    unknown = dataclasses.replace(old, labels=None)
    assert attributes_of(unknown) == {} and read_attributes(unknown, space.coefficients) == {}
    damaged = dataclasses.replace(space, meta={"readers": {"beard": {"calibration": {"sd": "x"}}}})
    assert attributes_of(dataclasses.replace(damaged, labels=None)) == {}


def test_a_cut_space_is_calibrated_again():
    space = space_of(*population(400))
    small = space.cut(2)
    assert "calibration" not in small.meta["readers"]["age"]
    assert "calibration" in space.meta["readers"]["age"]
    assert attributes_of(small)["age"].sd < 1.1 * attributes_of(space)["age"].sd
    assert attributes_of(space.cut(1))["age"].sd > 1.5 * attributes_of(space)["age"].sd


def test_a_labels_score_is_what_people_left_out_had():
    c, labels = population(40)
    space = space_of(c, labels)
    strength = space.meta["readers"]["beard"]["ridge"]
    found = []
    for i in range(40):
        rest = torch.arange(40) != i
        weights, _ = oracle.ridge_left_out(c[rest], labels[rest, 0], strength)
        found.append((oracle.f64(c[i]) - oracle.f64(c[rest]).mean(0)) @ weights)
    found = torch.tensor(np.array(found))
    for label in (0, 1):
        want = float(found[labels[:, 0] == label].mean())
        assert attributes_of(space)["beard"].score_of(label) == pytest.approx(want, rel=1e-4)


def test_scores_are_the_linear_readers():
    space = space_of(*population(50))
    want = (space.coefficients - space.mu).double().numpy() @ space.classifiers.double().numpy().T
    assert abs(scores(space, space.coefficients).numpy() - want).max() < 1e-5
