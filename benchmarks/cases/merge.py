"""merge: W' = W + scale * (B A) for the 64 modules of SD1.5, bound by reading W and writing W'.

The rival is PEFT's merge into the same 64 Linears. It adds in place and subtracts again, so the
facts of the case say how far the weights have drifted after many swaps of each.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from w2w_fast import Layout, ops

from ..bench import Case, Contender, Setting, Work, close, compiled, our_contenders
from . import _inputs


def cases(setting: Setting) -> list[Case]:
    weights = sum(m.in_features * m.out_features for m in _inputs.layout(setting.quick).modules)
    return [
        Case(
            "merge",
            f"{len(_inputs.layout(setting.quick).modules)} modules {name}",
            partial(build, setting, getattr(torch, name)),
            {"modules": len(_inputs.layout(setting.quick).modules), "dtype": name},
            bytes=2 * weights * getattr(torch, name).itemsize,
            flops=2 * weights,
            floor="copy",
        )
        for name in ("bfloat16", "float32")
    ]


def build(setting: Setting, dtype: torch.dtype) -> Work:
    lay = _inputs.layout(setting.quick)
    weights = _inputs.modules(setting.quick, dtype, setting.device)
    outs = [torch.empty_like(weight) for weight in weights]
    w = _inputs.adapters(lay, 1, seed=6, device=setting.device)[0]
    pairs = list(lay.split(w).values())
    A, B = [a for a, _ in pairs], [b for _, b in pairs]
    scale = lay.scale

    def check(contender: Contender, got: list[Tensor]) -> None:
        for out, weight, a, b in zip(got, weights, A, B, strict=True):
            want = weight.double() + scale * (b.double() @ a.double())
            close(contender, out, want, want.abs())

    def make(backend: str) -> Callable[[], list[Tensor]]:
        def call() -> list[Tensor]:
            ops.merge(weights, A, B, scale, outs, backend=backend)
            return outs

        return call

    def loop() -> list[Tensor]:
        for out, weight, a, b in zip(outs, weights, A, B, strict=True):
            torch.addmm(weight, b.to(dtype), a.to(dtype), alpha=scale, out=out)
        return outs

    contenders = our_contenders("merge", setting, make)
    for line in contenders:
        line.dtype = dtype
    contenders.append(Contender("torch addmm, a module at a time", "eager", loop, dtype))
    line = compiled(setting, _fused, weights, A, B, scale)
    line.dtype = dtype
    rival = _Peft(weights, A, B, scale)
    peft = Contender("PEFT merge", "rival", lambda: rival.swap(weights), torch.bfloat16)

    def facts() -> dict[str, float]:
        people = _inputs.adapters(lay, 8, seed=20, device=setting.device)
        return _drift(setting, weights[0], lay, people)

    return Work([*contenders, line, peft], check, facts)


def _fused(weights: list[Tensor], A: list[Tensor], B: list[Tensor], scale: float) -> list[Tensor]:
    return [
        (weight.float() + scale * (b * a)).to(weight.dtype)  # rank 1: an outer product
        for weight, a, b in zip(weights, A, B, strict=True)
    ]


class _Peft:
    """Linears of these weights that PEFT has adapted."""

    def __init__(
        self, weights: list[Tensor], A: list[Tensor], B: list[Tensor], scale: float
    ) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        self.model = nn.Module()
        for i, weight in enumerate(weights):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
            self.model.add_module(f"m{i}", linear)
        names = [f"m{i}" for i in range(len(weights))]
        rank = A[0].shape[0]
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=names)
        inject_adapter_in_model(config, self.model)
        self.layers = [self.model.get_submodule(name) for name in names]
        for layer, weight, a, b in zip(self.layers, weights, A, B, strict=True):
            layer.lora_A["default"].weight.data = a.to(weight.dtype)
            layer.lora_B["default"].weight.data = (b * scale).to(weight.dtype)

    def swap(self, weights: list[Tensor]) -> list[Tensor]:
        """Out with the last, in with the next: what a change of identity costs."""
        for layer in self.layers:
            if layer.merged:
                layer.unmerge()
            layer.merge()
        return [layer.base_layer.weight for layer in self.layers]


def _drift(setting: Setting, weight: Tensor, lay: Layout, w: Tensor) -> dict[str, float]:
    """The largest change of a pristine weight after many swaps of one module, ours and PEFT's."""
    swaps, theirs = (20, 10) if setting.quick else (10_000, 1_000)
    pairs = [next(iter(lay.split(one).values())) for one in w]
    before, out = weight.clone(), torch.empty_like(weight)
    for i in range(swaps):
        ops.merge(weight, *pairs[i % len(pairs)], lay.scale, out)
    rival = _Peft([weight], [pairs[0][0]], [pairs[0][1]], lay.scale)
    layer = rival.layers[0]
    for i in range(theirs):
        if layer.merged:
            layer.unmerge()
        a, b = pairs[i % len(pairs)]
        layer.lora_A["default"].weight.data = a.to(weight.dtype)
        layer.lora_B["default"].weight.data = (b * lay.scale).to(weight.dtype)
        layer.merge()
    layer.unmerge()
    return {
        f"drift after {swaps:,} swaps, ours": float((weight - before).abs().max()),
        f"drift after {theirs:,} swaps, PEFT": float(
            (layer.base_layer.weight - before).abs().max()
        ),
    }
