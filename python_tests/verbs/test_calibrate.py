"""`calibrate`: a slider's scale is monotone, exact where it was measured, and undone by reading."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from w2w_fast import InputError, calibrate, edit, sample
from w2w_fast.files import write_json
from w2w_fast.verbs.calibrate import Scale, fit_scale

X = torch.linspace(-4, 4, 33)


def bent(x):
    """A reading that rises slowly, then fast, then not at all."""
    return torch.sigmoid(2 * (x - 1)) * 10


def test_equal_steps_make_equal_changes():
    people = torch.tensor([0.0, 3.0, -1.0])  # who start elsewhere
    scale = fit_scale(X, bent(X)[:, None] + people, "beard")
    low, high = scale.range
    assert low < 0 < high and scale.amount(0.0) == 0
    wanted = torch.linspace(low, high, 25)
    got = bent(scale.amount(wanted)) - bent(torch.zeros(1))
    assert (got - wanted).abs().max() < 0.05 * (high - low)
    # Without it, equal steps of the amount do not: nearly half of the way they do nothing.
    raw = bent(torch.linspace(-4, 4, 25)).diff()
    assert raw.max() > 10 * raw.median() and got.diff().max() < 2 * got.diff().median()


def test_it_rises_whatever_the_noise():
    noisy = bent(X)[:, None] + 1.5 * torch.randn(33, 8, generator=torch.Generator().manual_seed(0))
    scale = fit_scale(X, noisy)
    assert (np.diff(scale.changes) > 0).all() and (np.diff(scale.amounts) > 0).all()
    amounts = scale.amount(torch.linspace(*scale.range, 50).double())
    assert (amounts.diff() >= 0).all()


def test_flat_ends_are_left_out():
    scale = fit_scale(X, bent(X)[:, None])
    assert scale.amounts[0] > -3 and scale.amounts[-1] < 3.6
    assert scale.amounts[0] <= 0 <= scale.amounts[-1]
    only_up = fit_scale(X, X.clamp_min(0)[:, None])
    assert only_up.range[0] == 0 and only_up.amounts[0] == 0


def test_files(tmp_path):
    scale = fit_scale(X, bent(X)[:, None], "beard", ["age"])
    scale.save(tmp_path / "beard.json")
    assert Scale.load(tmp_path / "beard.json") == scale
    good = {"format": "w2w_fast.scale", "name": "x", "hold": [], "changes": [0, 1],
            "amounts": [0, 2], "tried": [], "readings": []}  # fmt: skip
    write_json(tmp_path / "good.json", good)
    assert Scale.load(tmp_path / "good.json").amount(0.5) == 1
    for change in ({"format": "?"}, {"changes": [1, 0]}, {"amounts": [0]}, {"hold": [1]},
                   {"name": None}, {"changes": ["a", "b"]}, {"more": 1}):  # fmt: skip
        write_json(tmp_path / "bad.json", good | change)
        with pytest.raises(InputError, match="bad.json"):
            Scale.load(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("amounts", "readings", "said"),
    [
        ([-1, 0, 1], -torch.arange(3)[:, None].float(), "does not rise"),
        ([-1, 0, 1], torch.ones(3, 2), "does not rise"),
        ([1, 2, 3], torch.ones(3, 2), "one of them 0"),
        ([0, 1, 1], torch.ones(3, 2), "that rise"),
        ([-1, 0, 1], torch.full((3, 1), torch.nan), "finite"),
        ([-1, 0, 1], torch.ones(2, 2), r"got \[3\] and \[2, 2\]"),
    ],
)
def test_refusals(amounts, readings, said):
    with pytest.raises(InputError, match=said):
        fit_scale(amounts, readings, "beard")


def test_changes_that_nobody_saw_are_refused():
    scale = fit_scale(X, bent(X)[:, None], "beard")
    with pytest.raises(InputError, match="beard: wanted a change from .* got 99"):
        scale.amount(99.0)


def test_it_is_measured_on_pictures(space, pipe):
    """The judge here is the brightness; what each picture is of must be what the scale says."""
    seen = []

    def brightness(images):
        seen.append(images)
        return [float(np.asarray(image, dtype=np.float64).mean()) for image in images]

    def either_way(images):  # this random world's beard may darken pictures
        return [sign * x for x in brightness(images)]

    people = sample(space, 3, seed=2)
    options = {"steps": 2, "guidance": 1.0, "progress": False, "people": people, "hold": "age"}
    for sign in (1, -1):  # noqa: B007
        try:
            scale = calibrate(space, pipe, "beard", either_way, amounts=(-6, 0, 6), **options)
            break
        except InputError as error:
            assert "does not rise" in str(error)
    assert len(seen[-1]) == 9 and scale.hold == ("age",) and scale.tried == (-6, 0, 6)
    from w2w_fast import generate

    for i, amount in enumerate((-6, 0, 6)):
        moved = edit(space, people, beard=amount, hold="age")
        images = generate(
            space, pipe, moved, seeds=[0, 1, 2], steps=2, guidance=1.0, progress=False
        )
        assert scale.readings[i] == pytest.approx(float(np.mean(either_way(images))), abs=0.02)
    with pytest.raises(InputError, match="reader: wanted 9 numbers"):
        calibrate(space, pipe, "beard", lambda images: [1.0], amounts=(-1, 0, 1), **options)
