"""How far people are from those a space was made from."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_world import make_space, population, write_population

from w2w_fast import InputError, Layout, WeightSpace, sample
from w2w_fast.layout import Module
from w2w_fast.whereabouts import novelty, whitened, with_people

LAYOUT = Layout(tuple(Module(f"{i}.to_q", 10, 10) for i in range(3)), 1, 8.0)


@pytest.fixture(scope="module")
def space():
    return make_space(LAYOUT)


def test_novelty_is_the_distance_to_the_nearest(space):
    c = torch.cat([space.coefficients[5:6], sample(space, 3000, seed=2)])
    found = novelty(space, c)
    z = (space.coefficients - space.mu) / space.sigma
    each = ((c - space.mu) / space.sigma)[:, None] - z
    distance, who = (each.square().sum(-1) / (2 * space.m)).sqrt().min(1)
    assert torch.allclose(found.distance, distance, atol=1e-3)
    assert found.distance[0] < 1e-3 and found.who[0] == 5
    assert (found.who == who).float().mean() > 0.999
    own = torch.stack([torch.cat([row[:i], row[i + 1 :]]).min() for i, row in
                       enumerate(torch.cdist(z, z))]) / (2 * space.m) ** 0.5  # fmt: skip
    assert torch.allclose(found.own, own, atol=1e-5)
    assert "nearest of the population at" in str(found)
    assert len(novelty(space, c[:0]).distance) == 0


def test_strangers_are_at_about_one():
    c = torch.randn(2, 400, generator=torch.Generator().manual_seed(0)) * 3
    d = 400
    layout = Layout((Module("to_q", 200, 200),), 1, 1.0)
    space = WeightSpace(layout, torch.zeros(d), torch.ones(d), torch.eye(d), mu=torch.zeros(d),
                        sigma=torch.full((d,), 3.0), coefficients=c)  # fmt: skip
    assert novelty(space, -c[:1]).distance[0] == pytest.approx(1.0, abs=0.15)


def test_a_population_stands_in_for_people_not_held(space, tmp_path):
    bare = dataclasses.replace(space, coefficients=None, labels=None)
    with pytest.raises(InputError, match="novelty: this space does not hold its people"):
        novelty(bare, space.mu[None])
    w = population(LAYOUT, 12)
    names = write_population(tmp_path / "people", w, LAYOUT)
    found = with_people(bare, tmp_path / "people")
    assert found.names == names and torch.allclose(found.coefficients, space.project(w), atol=1e-4)
    assert torch.equal(found.mu, space.mu)
    assert novelty(found, space.project(w[3:4])).who.tolist() == [3]
    other = Layout(LAYOUT.modules, 1, 4.0)
    write_population(tmp_path / "other", w, other)
    with pytest.raises(InputError, match="another layout"):
        with_people(bare, tmp_path / "other")


def test_a_component_in_which_nobody_differs_counts_nothing(space):
    flat = dataclasses.replace(space, sigma=space.sigma.clone().index_fill_(0, torch.tensor(2), 0))
    assert (whitened(flat, space.mu[None] + 5)[0, 2] == 0).all()
