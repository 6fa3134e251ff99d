"""The twin test runs on the shipped world and answers for every change."""

from dataclasses import replace

import torch

from w2w_fast import demo
from w2w_fast.demo.build import RECIPE, load_for_training
from w2w_fast.demo.twins import CHANGES, twin_test


def test_answers_for_every_change():
    space = demo.space()
    found = twin_test(
        space,
        demo.pipeline(),
        load_for_training(demo.WORLD),
        demo.reader(),
        replace(RECIPE, steps=3),
        start=space.mean,
        pairs=2,
    )
    assert set(found) == set(CHANGES)
    for row in found.values():
        assert -1 <= row["cosine"] <= 1 and torch.isfinite(torch.tensor(list(row.values()))).all()
        assert {row["flips_at_1x"], row["flips_at_2x"]} <= {0.0, 0.5, 1.0}
