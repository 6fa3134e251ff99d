"""`slider`: one person's edit exactly, anybody's to first order; diffusers loads both."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_world import make_space

from w2w_fast import InputError, Layout, attach, edit, export, sample, slider
from w2w_fast.formats import _fixed_inputs, verify
from w2w_fast.layout import Module
from w2w_fast.verbs.slider import joined

FORMATS = ["kohya", "diffusers", "peft"]


def changes(layout, w):
    """name -> scale B A of w [d], float64."""
    return {name: layout.scale * b @ a for name, (a, b) in layout.split(w.double()).items()}


@pytest.fixture
def person(space):
    return sample(space, 1, seed=6)


def test_of_one_person_it_is_the_difference_exactly(space, person):
    made = slider(space, {"beard": 2.0}, of=person[0], hold="age")
    assert made.layout.rank == 2 and made.layout.modules == space.layout.modules
    before, after = (
        changes(space.layout, space.reconstruct(c)[0])
        for c in (person, edit(space, person, beard=2.0, hold="age"))
    )
    for name, change in changes(made.layout, made.w).items():
        want = after[name] - before[name]
        assert (change - want).abs().max() < 1e-5 * want.abs().max()
    assert made.error.tolist() == [0.0]


@pytest.mark.parametrize("rank", [1, 2])
def test_of_anybody_it_is_the_derivative_at_the_mean(rank):
    space = make_space(Layout((Module("a.to_q", 12, 10), Module("b.to_v", 6, 12)), rank, 4.0))
    made = slider(space, age=1e-3)
    middle = space.mu[None].double()
    step = edit(space, space.mu[None], age=1e-3) - space.mu[None]
    ends = [
        changes(space.layout, space.mean.double() + sign * space.delta(step[0]).double())
        for sign in (1, -1)
    ]
    assert torch.allclose(space.reconstruct(middle.float())[0], space.mean, atol=1e-4)
    for name, change in changes(made.layout, made.w).items():
        want = (ends[0][name] - ends[1][name]) / 2  # the second order is even: it is gone
        assert (change - want).abs().max() < 1e-3 * want.abs().max()


def test_the_error_is_what_a_dense_difference_says(space):
    made = slider(space, {"beard": 2.0, "age": -1.0})
    mine = changes(made.layout, made.w)
    assert made.error.shape == (40,)
    for i in (0, 17, 39):
        c = space.coefficients[i : i + 1]
        before = changes(space.layout, space.reconstruct(c)[0])
        after = changes(space.layout, space.reconstruct(edit(space, c, beard=2.0, age=-1.0))[0])
        true = torch.cat([(after[n] - before[n]).flatten() for n in mine])
        rest = true - torch.cat([mine[n].flatten() for n in mine])
        assert float(made.error[i]) == pytest.approx(float(rest.norm() / true.norm()), rel=1e-3)
    # It cannot be small here: this space's people have little in common. It says so.
    assert 0.05 < made.error.median() < 2
    bare = dataclasses.replace(space, coefficients=None)
    assert len(slider(bare, beard=1.0).error) == 200


def test_joined_is_the_sum_of_products(space):
    w = space.reconstruct(space.coefficients[:2]).double()
    wide = Layout(space.layout.modules, 2, 2 * space.layout.alpha)
    made = changes(wide, joined(space.layout, wide, [(w[0], w[1], 1.0), (w[1], w[0], -0.5)]))
    parts = [space.layout.split(row) for row in w]
    name = space.layout.names[3]
    want = parts[1][name][1] @ parts[0][name][0] - 0.5 * parts[0][name][1] @ parts[1][name][0]
    assert torch.allclose(made[name], space.layout.scale * want, atol=1e-10)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("whose", ["anybody", "person"])
def test_diffusers_loads_it(space, pipe, person, tmp_path, format, whose):
    made = slider(space, beard=2.0, of=None if whose == "anybody" else person)
    path = tmp_path / ("peft" if format == "peft" else "slider.safetensors")
    export(made.layout, made.w, path, format=format)
    found = verify(path, pipe, made.w, made.layout)
    assert found.modules == len(space.layout.modules) and found.relative < 1e-4


def test_person_and_slider_loaded_together_are_the_edited_person(space, pipe, person, tmp_path):
    made = slider(space, beard=2.0, of=person)
    export(space, person, tmp_path / "me.safetensors")
    export(made.layout, made.w, tmp_path / "beard.safetensors")
    inputs = _fixed_inputs(pipe.unet)
    edited = space.reconstruct(edit(space, person, beard=2.0))
    with torch.no_grad():
        with attach(pipe, space.layout, adapters=edited):
            want = pipe.unet(**inputs).sample
        with attach(pipe, space.layout, adapters=space.reconstruct(person)):
            unedited = pipe.unet(**inputs).sample
        try:
            for name in ("me", "beard"):
                file = f"{name}.safetensors"
                pipe.load_lora_weights(tmp_path, weight_name=file, adapter_name=name)
            pipe.set_adapters(["me", "beard"])
            got = pipe.unet(**inputs).sample
        finally:
            pipe.unload_lora_weights()
    assert (got - want).abs().max() < 1e-2 * (unedited - want).abs().max()


@pytest.mark.parametrize(
    ("amounts", "options", "said"),
    [
        ({}, {}, "at least one"),
        ({"hat": 1.0}, {}, "'hat' is not in this space"),
        ({"beard": 1.0}, {"of": torch.zeros(2, 6)}, "of: wanted one person"),
        ({"beard": 1.0}, {"hold": "beard"}, "held and edited"),
    ],
)
def test_refusals(space, amounts, options, said):
    with pytest.raises(InputError, match=said):
        slider(space, amounts, **options)
