"""The renderer: seeded, in range, and every attribute visible."""

import pytest
import torch

from w2w_fast.demo import render


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_seed_decides_everything():
    first = render.people(5, _generator()), render.conditions(5, _generator(1))
    again = render.people(5, _generator()), render.conditions(5, _generator(1))
    assert torch.equal(render.render(*first), render.render(*again))


def test_shapes_and_chunks_do_not_matter():
    people, conditions = render.people(7, _generator()), render.conditions(7, _generator(1))
    images = render.render(people, conditions)
    assert images.shape == (7, 3, 64, 64) and images.dtype == torch.uint8
    assert torch.equal(images, render.render(people, conditions, chunk=2))
    assert render.render(people[:0], conditions[:0]).shape == (0, 3, 64, 64)


@pytest.mark.parametrize("name", render.ATTRIBUTES)
def test_every_attribute_shows(name):
    people, conditions = render.people(24, _generator(2)), render.conditions(24, _generator(3))
    conditions[:, render.CONDITIONS.index("bar")] = 0
    low, high = people.clone(), people.clone()
    column = render.ATTRIBUTES.index(name)
    low[:, column], high[:, column] = 0, 1
    change = render.render(high, conditions).float() - render.render(low, conditions).float()
    # Not for everybody: lips may hide in a dark beard.
    assert (change.abs().amax(dim=(1, 2, 3)) > 20).float().mean() > 0.9


def test_masks_hold_the_face_and_leave_the_background():
    people, conditions = render.people(16, _generator(4)), render.conditions(16, _generator(5))
    masks = render.face_mask(people, conditions)
    assert masks.shape == (16, 1, 64, 64) and masks.min() >= 0 and masks.max() <= 1
    assert (masks[:, :, 28:38, 28:38] > 0.9).all()
    assert masks.mean() < 0.7


def test_captions_say_what_is_drawn():
    conditions = render.conditions(50, _generator(6))
    for condition in conditions:
        text = render.caption(condition, ("glasses", "hat"))
        place = render.PLACES[int(condition[render.CONDITIONS.index("place")])]
        assert text.startswith("sks person with glasses and hat, ") and place in text
