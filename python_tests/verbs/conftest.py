"""The tiny world of `tiny_world`, made once: leave it as it was."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny_world import make_pipe, make_space, photographs

from w2w_fast import Layout, WeightSpace


@pytest.fixture(scope="session")
def pipe(tmp_path_factory) -> StableDiffusionPipeline:
    return make_pipe(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def layout(pipe) -> Layout:
    return Layout.discover(pipe.unet, alpha=8.0)


@pytest.fixture(scope="session")
def space(layout) -> WeightSpace:
    return make_space(layout)


@pytest.fixture
def photos() -> torch.Tensor:
    return photographs(4)
