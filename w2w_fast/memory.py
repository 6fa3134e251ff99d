"""How many subjects train together in so much memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .denoise import denoiser
from .errors import InputError
from .training import Training


def largest_batch(training: Callable[[int], Training], memory: int, most: int = 4096) -> int:
    """How many subjects fit into `memory` bytes: training(k) is one of k subjects.

    Two subjects are tried after one; what the second adds, each further one adds. On a GPU the
    allocator is asked, on a CPU the tensors that autograd keeps are counted, which is what grows.
    InputError where not even one fits.
    """
    one, two = (_peak(training(k)) for k in (1, 2))
    fixed, each = one - (two - one), max(1, two - one)
    if one > memory:
        raise InputError(
            f"memory: one subject needs {one / 2**30:.2f} GiB, got {memory / 2**30:.2f} GiB; "
            "gradient checkpointing, or bfloat16, needs less"
        )
    return max(1, min(most, int((memory - fixed) // each)))


def _peak(training: Training) -> int:
    """Bytes that one step of a training takes, the weights included."""
    model = denoiser(training.pipe)
    fixed = [*model.parameters(), *training.fixed]
    weights = {p.data_ptr(): p.numel() * p.element_size() for p in fixed}
    training.recipe = replace(training.recipe, steps=1, average=0.0, check=0)
    if training.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(training.device)
        training.run()
        return torch.cuda.max_memory_reserved(training.device)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        training.run()
    # w, its gradient and two moments in float32, their average in float64, one temporary.
    rows = 28 * training.start.shape[-1] * len(training.subjects)
    # Of what autograd keeps a third more lives for a moment: outputs, gradients, workspaces.
    return sum(weights.values()) + rows + sum(kept.values()) * 4 // 3
