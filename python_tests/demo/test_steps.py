"""Training of the world's base: killed anywhere it ends with the same weights."""

from __future__ import annotations

import itertools

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from w2w_fast.demo import steps


def train(path, killed_after=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    model.to(memory_format=torch.channels_last)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    generator = torch.Generator().manual_seed(1)
    taken = []
    training = steps.train_steps(model, 10, 0.05, path, generator, average)
    for step, _ in itertools.islice(training, killed_after):
        model(torch.randn(5, 3, 4, 4, generator=generator)).square().mean().backward()
        average.update_parameters(model)
        taken.append(step)
    return taken, [value.clone() for value in (*model.state_dict().values(), *average.parameters())]


def test_a_killed_training_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "KEEP", 3)
    whole, expected = train(tmp_path / "whole.safetensors")
    assert whole == list(range(10))
    train(tmp_path / "killed.safetensors", killed_after=5)
    rest, weights = train(tmp_path / "killed.safetensors")
    assert rest == list(range(3, 10))
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))
    nothing, again = train(tmp_path / "killed.safetensors")
    assert nothing == [] and all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
