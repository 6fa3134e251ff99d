"""Random adapters of a known effect, and inputs for a UNet."""

from __future__ import annotations

import awkward
import torch


def adapters(layout, k, seed=0, size=0.4):
    """w [k, d] whose effect on a module is about ``size`` of the base's."""
    w = awkward.normal(k, layout.size, seed=seed)
    for module, (A, B) in zip(layout.modules, layout.slices(), strict=True):
        w[:, A] /= module.in_features**0.5
        w[:, B] *= size / layout.scale
    return w


def inputs(batch, text=24, side=8, seed=5):
    return (
        awkward.normal(batch, 4, side, side, seed=seed),
        torch.tensor(7),
        awkward.normal(batch, 5, text, seed=seed + 1),
    )


def run(model, args):
    with torch.no_grad():
        return model(*args).sample
