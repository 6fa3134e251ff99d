"""How many subjects train, or pictures are made, together in so much memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .denoise import denoiser, device_of
from .errors import InputError
from .training import Training


def largest_batch(training: Callable[[int], Training], memory: int, most: int = 4096) -> int:
    """How many subjects fit into `memory` bytes: training(k) is one of k subjects.

    On a GPU the allocator is asked, on a CPU the tensors that autograd keeps are counted, which is
    what grows. InputError where not even one fits.
    """
    needs = "gradient checkpointing, or bfloat16, needs less"
    return fitting(lambda k: _peak(training(k)), memory, "subject", needs, most)


def fitting(peak: Callable[[int], int], memory: int, what: str, needs: str, most: int) -> int:
    """How many fit into `memory` bytes; peak(k) is what k of them take.

    Two are tried after one; what the second adds, each further one adds. InputError, with what
    needs less, where not even one fits.
    """
    one, two = (peak(k) for k in (1, 2))
    fixed, each = one - (two - one), max(1, two - one)
    if one > memory:
        raise InputError(
            f"memory: one {what} needs {one / 2**30:.2f} GiB, got {memory / 2**30:.2f} GiB; {needs}"
        )
    return max(1, min(most, int((memory - fixed) // each)))


def peak_of(pipe, call: Callable[[], Any]) -> int:
    """Bytes that call() takes at most, the pipeline's weights included; it needs no gradient.

    On a GPU the allocator is asked, on a CPU the tensors that operators return are counted.
    """
    device = device_of(pipe)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_reserved(device)
    models = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    held = {t.data_ptr(): t.nbytes for m in models for t in (*m.parameters(), *m.buffers())}
    with _Alive() as alive:
        call()
    # A third more lives for a moment inside an operator: copies in other layouts, workspaces.
    return sum(held.values()) + alive.most * 4 // 3


class _Alive(TorchDispatchMode):
    """Counts the bytes of storages that operators return and that are not freed yet."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._seen:
            self._seen.add(storage)
            size = storage.nbytes()
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._freed, size).atexit = False

    def _freed(self, size: int) -> None:
        self.now -= size


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
