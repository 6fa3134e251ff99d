"""`directions`: a table of labels at any time; directions that need none."""

from __future__ import annotations

import csv
import dataclasses

import numpy as np
import pytest
import torch
from tiny_world import ATTRIBUTES

from w2w_fast import InputError, Layout, WeightSpace, directions, edit
from w2w_fast.attributes import attributes_of, read_attributes
from w2w_fast.explore import independent, reader, resembles
from w2w_fast.layout import Module
from w2w_fast.verbs.edit import direction


@pytest.fixture
def named(space):
    return dataclasses.replace(space, names=[f"p{i}" for i in range(space.n)])


def write(path, names, **columns):
    with path.open("w", newline="") as file:
        rows = zip(names, *(column.tolist() for column in columns.values()), strict=True)
        csv.writer(file).writerows([["name", *columns], *rows])
    return path


def test_a_table_of_everybody_is_as_if_fitted_with_it(named, tmp_path):
    table = write(tmp_path / "t.csv", named.names, beard=named.labels[:, 0], age=named.labels[:, 1])
    made = directions(named, table, keep=False, method="lstsq")
    want = dataclasses.replace(named)
    want.fit_directions(named.labels[:, :2], ["beard", "age"], method="lstsq")
    assert made.attributes == ["beard", "age"] and torch.equal(made.labels, named.labels[:, :2])
    assert torch.equal(made.directions, want.directions)
    assert made.meta["readers"]["age"].pop("people") == 40
    assert made.meta["readers"]["age"] == want.meta["readers"]["age"]
    made.save(tmp_path / "space")
    assert WeightSpace.load(tmp_path / "space").attributes == ["beard", "age"]


def test_some_peoples_labels_are_enough_and_the_old_attributes_stay(named, tmp_path):
    some = list(range(3, 40, 2))
    jolly = named.coefficients[:, 1] + 0.1 * named.coefficients[:, 0]
    table = write(tmp_path / "t.csv", [*(f"p{i}" for i in some), "stranger"],
                  jolly=torch.cat([jolly[some], torch.zeros(1)]))  # fmt: skip
    made = directions(named, table)
    assert made.attributes == [*ATTRIBUTES, "jolly"] and made.labels is None
    assert torch.equal(made.classifiers[:3], named.classifiers)
    assert torch.allclose(made.directions[:3], named.directions, atol=1e-5)
    read = read_attributes(made, named.coefficients)["jolly"]["value"].float()
    assert torch.corrcoef(torch.stack([read, jolly]))[0, 1] > 0.95
    # What the old ones mean was written down: it needs no labels any more.
    assert attributes_of(made)["age"].label == pytest.approx(attributes_of(named)["age"].label)
    moved = edit(made, named.coefficients, jolly=1.0, hold="age")
    assert (read_attributes(made, moved)["jolly"]["value"].float() > read).all()


def test_an_attribute_of_the_same_name_is_replaced(named, tmp_path):
    table = write(tmp_path / "t.csv", named.names, age=-named.labels[:, 1])
    made = directions(named, table)
    assert made.attributes == ["beard", "glasses", "age"] and made.labels.shape == (40, 3)
    assert torch.allclose(made.directions[2], -named.directions[1], atol=1e-5)
    assert torch.equal(made.labels[:, 0], named.labels[:, 0])


def test_refusals(named, space, tmp_path):
    few = write(tmp_path / "few.csv", named.names[:9], age=named.labels[:9, 1])
    with pytest.raises(InputError, match="9 of the space's 40 people; wanted 10"):
        directions(named, few)
    same = write(tmp_path / "same.csv", named.names, hat=torch.ones(40))
    with pytest.raises(InputError, match="hat: wanted finite numbers of two or more"):
        directions(named, same)
    with pytest.raises(InputError, match="does not hold its people by name"):
        directions(space, same)
    unread = dataclasses.replace(named, classifiers=None)
    table = write(tmp_path / "t.csv", named.names, hat=named.labels[:, 0])
    with pytest.raises(InputError, match="directions without readers"):
        directions(unread, table)
    with pytest.raises(InputError, match="got 'svm'"):
        directions(named, table, method="svm")


# --- without labels -----------------------------------------------------------------------------


def test_a_principal_component_is_one_sd_along_it(space):
    people = space.coefficients[:2]
    moved = edit(space, people, pc2=-1.5) - people
    want = torch.zeros(6)
    want[1] = -1.5 * space.sigma[1]
    assert torch.allclose(moved, want.expand(2, 6), atol=1e-4 * float(space.sigma[1]))
    bare = dataclasses.replace(space, directions=None, classifiers=None, labels=None, attributes=[])
    assert torch.allclose(edit(bare, people, pc2=-1.5), people + moved, atol=1e-4)


def mixed(n=400):
    """A space of two coins and a bell curve, turned together; and the three."""
    generator = torch.Generator().manual_seed(2)
    coins = torch.randint(0, 2, (n, 2), generator=generator) * 2.0 - 1
    hidden = torch.cat([coins + 0.2 * torch.randn(n, 2, generator=generator),
                        torch.randn(n, 1, generator=generator)], 1)  # fmt: skip
    turn = torch.linalg.qr(torch.randn(3, 3, generator=generator))[0]
    layout = Layout((Module("to_q", 8, 8),), 1, 1.0)
    space = WeightSpace(layout, torch.zeros(16), torch.ones(16), torch.eye(16)[:, :3].contiguous(),
                        coefficients=5 * hidden @ turn)  # fmt: skip
    return space, hidden


def test_independent_components_find_what_was_mixed():
    space, hidden = mixed()
    rows = independent(space)
    scores = (space.coefficients - space.mu).double() @ rows.T
    assert np.allclose(np.cov(scores.T.numpy()), np.eye(3), atol=0.01)
    likeness = np.abs(np.corrcoef(scores.T.numpy(), hidden.T.numpy())[:3, 3:])
    # The coins come first, in either order and with either sign.
    assert sorted(likeness[:2].argmax(1)) == [0, 1] and likeness[2].argmax() == 2
    assert (likeness.max(1) > 0.98).all()
    # An edit along one moves nothing else.
    moved = edit(space, space.coefficients, ica1=1.0)
    change = (moved - space.coefficients).double() @ rows.T
    assert torch.allclose(change, torch.tensor([1.0, 0, 0]).double().expand(400, 3), atol=0.03)
    assert torch.equal(independent(space), rows)


def test_what_an_exploratory_direction_goes_along_with():
    space, hidden = mixed()
    space.fit_directions(hidden[:, :2], ["first", "second"], permutations=0)
    found = dict(resembles(space, reader(space, "ica1")))
    assert max(map(abs, found.values())) > 0.98 and set(found) == {"first", "second"}
    bare = dataclasses.replace(space, labels=None)
    assert resembles(bare, reader(space, "pc1")) == []


def test_held_attributes_stay_along_an_exploratory_direction(space):
    row = space.classifiers[1].double()
    v = direction(space, "pc1", ["age"]).double()
    assert abs(v @ row) < 1e-4 < abs(direction(space, "pc1").double() @ row)


@pytest.mark.parametrize("name", ["pc7", "ica5", "pc0", "ica", "pc1.5"])
def test_components_that_are_not_there(space, name):
    with pytest.raises(InputError, match="pc1 to pc6|ica1 to ica4|is not in this space"):
        edit(space, space.coefficients, {name: 1.0})


def test_ica_needs_people(space):
    with pytest.raises(InputError, match="holds 20 people"):
        edit(dataclasses.replace(space, coefficients=None), space.mu[None], ica1=1.0)


def test_an_attribute_of_that_name_comes_first(space):
    own = dataclasses.replace(space, attributes=["pc1", "age", "glasses"])
    assert torch.equal(direction(own, "pc1"), space.directions[0])
