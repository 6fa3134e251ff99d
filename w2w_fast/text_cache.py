"""The keys and values of text, computed once a batch instead of at every denoising step.

A pipeline gives its model the same tensor of text states at each step, and cross-attention's
``to_k`` and ``to_v`` read nothing else: their outputs, adapters included, do not change from step
to step. An output is kept as long as everything it was made from is the same object in the same
version - text, weight, bias, adapters, whose rows they are, autocast - and never by comparing
numbers: what comes out has the same bits as without.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Parts = tuple[Tensor | None, ...]


@dataclass
class _Kept:
    """An output, and what it was made from: the objects, held so that none is replaced unseen."""

    out: Tensor
    parts: Parts
    versions: list[int]
    mode: tuple


class TextCache:
    """Of the Linears of a model that are given tensors just as the model was called with them.

    model: whose calls are followed. linears: adapters(x) of each, all that its hook adds depends on
    besides x. The hook asks `returned` whether a Linear's output has its adapters already, and else
    shows the sum to `keep`. `close` takes everything off again.
    """

    def __init__(self, model: nn.Module, linears: Mapping[nn.Module, Callable[[Tensor], Parts]]):
        self._given: list[Tensor] = []  # to the call of the model that is going on
        self._kept: dict[nn.Module, _Kept] = {}
        self._replaced: dict[nn.Module, tuple[Any, Any]] = {}
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
        ]
        crossed = [m for m in model.modules() if getattr(m, "is_cross_attention", False)]
        both = {getattr(m, name, None) for m in crossed for name in ("to_k", "to_v")}
        self._bare = both - linears.keys()
        for module, adapters in [*linears.items(), *((m, _no_adapters) for m in self._bare)]:
            if type(module) is nn.Linear:  # a quantised one depends on more than weight and bias
                own = module.__dict__.get("forward")
                mine = partial(self._forward, module, module.forward, adapters)
                self._replaced[module] = own, mine
                module.forward = mine

    def close(self) -> None:
        """The Linears as they were, and nothing kept."""
        for handle in self._handles:
            handle.remove()
        for module, (own, mine) in self._replaced.items():
            if module.__dict__.get("forward") is not mine:
                continue  # somebody replaced it since: their own is left
            if own is None:
                del module.forward
            else:
                module.forward = own
        self._replaced.clear()
        self._kept.clear()

    def returned(self, module: nn.Module, out: Tensor) -> bool:
        """Whether a Linear's output is the kept one, which has its adapters already."""
        kept = self._kept.get(module)
        return kept is not None and kept.out is out

    def keep(self, module: nn.Module, x: Tensor, adapters: Parts, out: Tensor) -> None:
        """Keep an output with adapters, if x is text and all that it was made from can be known."""
        if torch.compiler.is_compiling() or module not in self._replaced:
            return
        if not any(x is given for given in self._given):
            return
        parts = (x, module.weight, module.bias, *adapters)
        # Inference tensors count no changes, graphs are for one backward, and other hooks' doing
        # is not known.
        counted = not any(t.is_inference() for t in (*parts, out) if t is not None)
        if counted and not out.requires_grad and self._alone(module):
            self._kept[module] = _Kept(out, parts, _versions(*parts, out), _mode(x))

    def _forward(self, module: nn.Module, own: Callable, adapters: Callable, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # a graph keeps nothing from one run to the next
            return own(x)
        kept = self._kept.get(module)
        if kept is None:
            return self._made(module, own, x)
        parts = (x, module.weight, module.bias, *adapters(x))
        if (
            all(a is b for a, b in zip(parts, kept.parts, strict=True))
            and _versions(*parts, kept.out) == kept.versions
            and _mode(x) == kept.mode
            and self._alone(module)
        ):
            return kept.out
        del self._kept[module]
        return self._made(module, own, x)

    def _made(self, module: nn.Module, own: Callable, x: Tensor) -> Tensor:
        out = own(x)
        if module in self._bare:
            self.keep(module, x, (), out)
        return out

    def _alone(self, module: nn.Module) -> bool:
        """Whether no hook but the one that adds the adapters is on a Linear."""
        return len(module._forward_hooks) == (module not in self._bare)

    def _before(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        self._given = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]

    def _after(self, model: nn.Module, args: tuple, out: Any) -> None:
        self._given = []


def _no_adapters(x: Tensor) -> Parts:
    return ()


def _versions(*tensors: Tensor | None) -> list[int]:
    return [0 if t is None else t._version for t in tensors]


def _mode(x: Tensor) -> tuple:
    """What a Linear's numbers depend on besides its operands."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return (torch.is_grad_enabled(),)
    return torch.is_grad_enabled(), torch.get_autocast_dtype(kind)
