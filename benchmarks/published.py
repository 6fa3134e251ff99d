"""The published method, written from the paper's formulas: V c in every module, at every call.

    w = mean + std * (V c),   y = x W^T + (alpha / r) (x A^T) B^T     (w2w paper, sections 3.2, 3.4)

Each adapted module multiplies its own rows of V by c whenever it is called, in the model's dtype
(the paper's: bfloat16), and serves one person. Gradients reach c by autograd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from w2w_fast import WeightSpace


class Reprojected:
    """One person on a model; `c` [m] may be assigned, or trained. A context manager."""

    def __init__(self, model: nn.Module, space: WeightSpace, c: Tensor) -> None:
        like = next(model.parameters())
        self.c, self.layout = c, space.layout
        self.mean, self.std, self.basis = (t.to(like) for t in (space.mean, space.std, space.basis))
        self.handles = [
            model.get_submodule(module.name).register_forward_hook(self._hook(module, a, b))
            for module, (a, b) in zip(space.layout.modules, space.layout.slices(), strict=True)
        ]

    def __enter__(self) -> Reprojected:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _hook(self, module: Any, a: slice, b: slice) -> Any:
        rows, rank = slice(a.start, b.stop), self.layout.rank
        sizes = (rank * module.in_features, module.out_features * rank)

        def hook(_: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
            w = self.mean[rows] + self.std[rows] * (self.basis[rows] @ self.c)
            A, B = w.split(sizes)
            down = inputs[0] @ A.view(rank, -1).mT
            return out + self.layout.scale * (down @ B.view(-1, rank).mT)

        return hook


def invert(pipe: Any, space: WeightSpace, photo: Any, draws: Any) -> Tensor:
    """Adam on c from zero for one photograph (lr 0.1, weight decay 1e-10); c [m].

    draws: of each step noise [c, h, w] and timestep [1].
    """
    from w2w_fast.denoise import losses

    like = next(pipe.unet.parameters())
    c = torch.zeros(space.m, dtype=like.dtype, device=like.device, requires_grad=True)
    optimiser = torch.optim.Adam([c], lr=0.1, weight_decay=1e-10)
    with Reprojected(pipe.unet, space, c):
        for draw in draws:
            optimiser.zero_grad(set_to_none=True)
            noise, t = draw.noise[None].to(like.device), draw.t.to(like.device)
            losses(pipe, photo, noise, t).sum().backward()
            optimiser.step()
    return c.detach()
