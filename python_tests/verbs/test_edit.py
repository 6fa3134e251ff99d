"""`edit`: the unit of an amount, what is held, refusals. Checked in float64 numpy."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from tiny_world import ATTRIBUTES

from w2w_fast import InputError, edit, sample
from w2w_fast.verbs.edit import direction, parse_amounts


@pytest.fixture
def people(space):
    return sample(space, 4, seed=1)


def reading(space, c, attribute):
    """The linear reader's score, in float64."""
    row = space.classifiers[ATTRIBUTES.index(attribute)]
    return c.double().numpy() @ row.double().numpy()


@pytest.mark.parametrize("attribute", ATTRIBUTES)
@pytest.mark.parametrize("hold", [(), ("other",)])
def test_one_unit_is_one_population_sd_along_the_direction(space, people, attribute, hold):
    held = [next(a for a in ATTRIBUTES if a != attribute)] if hold else []
    moved = (edit(space, people, {attribute: 1.5}, hold=held) - people).double().numpy()
    assert np.allclose(moved, moved[0], atol=1e-5)
    unit = moved[0] / np.linalg.norm(moved[0])
    spread = (space.coefficients.double().numpy() @ unit).std()
    assert np.linalg.norm(moved[0]) == pytest.approx(1.5 * spread, rel=1e-5)


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_a_positive_amount_raises_the_reading(space, people, attribute):
    up = reading(space, edit(space, people, {attribute: 1.0}), attribute)
    assert (up > reading(space, people, attribute)).all()


def test_what_is_held_stays_exactly(space, people):
    plain = edit(space, people, beard=3.0)
    held = edit(space, people, beard=3.0, hold="age")
    before = reading(space, people, "age")
    assert np.abs(reading(space, held, "age") - before).max() < 1e-5
    assert np.abs(reading(space, plain, "age") - before).max() > 0.1  # or holding were nothing
    assert (reading(space, held, "beard") > reading(space, people, "beard") + 0.1).all()
    both = edit(space, people, {"beard": 3.0}, hold=["age", "glasses", "age"])
    for name in ("age", "glasses"):
        assert np.abs(reading(space, both, name) - reading(space, people, name)).max() < 1e-5


def test_amounts_add_and_may_be_one_a_person(space, people):
    amounts = torch.tensor([0.0, 1.0, -1.0, 2.0])
    moved = edit(space, people, beard=amounts, age=1)
    want = people + amounts[:, None] * direction(space, "beard") + direction(space, "age")
    assert torch.allclose(moved, want, atol=1e-6)
    assert torch.equal(edit(space, people), people)


@pytest.mark.parametrize(
    ("amounts", "options", "said"),
    [
        ({"hat": 1.0}, {}, "hat.*beard, age, glasses"),
        ({"beard": 1.0}, {"hold": "hat"}, "hat"),
        ({"beard": 1.0}, {"hold": "beard"}, "held and edited"),
        ({"beard": float("nan")}, {}, "beard.*finite"),
        ({"beard": "much"}, {}, "beard.*number"),
        ({"beard": torch.ones(3)}, {}, "amount"),
    ],
)
def test_refusals(space, people, amounts, options, said):
    with pytest.raises(InputError, match=said):
        edit(space, people, amounts, **options)


def test_refuses_people_of_another_space_and_spaces_without_directions(space, people):
    with pytest.raises(InputError, match="coefficients"):
        edit(space, people[:, :3], beard=1.0)
    bare = dataclasses.replace(space, directions=None, classifiers=None)
    with pytest.raises(InputError, match="no directions"):
        edit(bare, people, beard=1.0)
    unread = dataclasses.replace(space, classifiers=None)
    with pytest.raises(InputError, match="no linear readers"):
        edit(unread, people, beard=1.0, hold="age")


def test_refuses_to_hold_what_reads_the_same(space, people):
    twin = space.classifiers.clone()
    twin[1] = 2 * twin[0]
    with pytest.raises(InputError, match="alike"):
        edit(dataclasses.replace(space, classifiers=twin), people, beard=1.0, hold="age")


def test_parse_amounts():
    parsed = parse_amounts(" beard=+1.5, age = -1,hold=glasses,hold=hat,")
    assert parsed == ({"beard": 1.5, "age": -1.0}, ["glasses", "hat"])
    for text in ("beard", "beard=", "beard=x", "beard=nan", "beard=1,beard=2", "hold=", "=1e999"):
        with pytest.raises(InputError):
            parse_amounts(text)
