"""edit: w' = w + amount * delta, with delta = std * (V direction) computed beforehand.

The rival is what an edit costs without it: the coefficients move, and w is reconstructed again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from w2w_fast import ops

from ..bench import Case, Contender, Setting, Work, close, compiled, our_contenders
from . import _inputs


def cases(setting: Setting) -> list[Case]:
    d, m = (2048, 64) if setting.quick else (_inputs.SD15.size, 1000)
    return [
        Case(
            "edit",
            f"{name} k={k}",
            partial(build, setting, d, m, k, getattr(torch, name)),
            {"d": d, "k": k, "dtype": name},
            bytes=d * (2 * k * getattr(torch, name).itemsize + 4),
            flops=2 * k * d,
            floor="copy",
        )
        for name in ("float32", "bfloat16")
        for k in ((1, 4) if setting.quick else (1, 4, 16))
    ]


def build(setting: Setting, d: int, m: int, k: int, dtype: torch.dtype) -> Work:
    place = {"device": setting.device}
    space = _inputs.space(d, m, "bfloat16", setting.device)
    c, direction = (_inputs.normal(n, m, seed=7 + n, **place) for n in (k, 1))
    start = space.mean + space.std * (c @ space.basis.float().mT)
    w = start.to(dtype)
    delta = space.std * (direction[0] @ space.basis.float().mT)
    amount = 1.5
    moved = c + amount * direction
    want = w.double() + amount * delta.double()
    wide = start.double() + amount * delta.double()

    def check(contender: Contender, got: Tensor) -> None:
        if contender.kind == "rival":  # it starts from c, not from a w that was rounded
            terms = space.std.abs() * (moved.abs() @ space.basis.float().abs().mT)
            close(contender, got, wide, terms.double())
        else:
            close(contender, got, want, want.abs() + (amount * delta).abs().double())

    def make(backend: str) -> Callable[[], Tensor]:
        return lambda: ops.edit(w, delta, amount, backend=backend)

    contenders = our_contenders("edit", setting, make)
    contenders.append(Contender("torch add", "eager", lambda: _fused(w, delta, amount)))
    if k == 1 or setting.is_cuda:
        contenders.append(compiled(setting, _fused, w, delta, amount))
    for contender in contenders:
        contender.dtype = dtype
    rival = Contender(
        f"reconstruct again (m = {m:,}, bfloat16)",
        "rival",
        lambda: ops.reconstruct(moved, space.basis, space.mean, space.std, dtype),
        dtype,
    )
    return Work([*contenders, rival], check)


def _fused(w: Tensor, delta: Tensor, amount: float) -> Tensor:
    return (w + amount * delta).to(w.dtype)
