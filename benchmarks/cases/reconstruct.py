"""reconstruct: w = mean + std * (c V^T), bound by reading the basis once.

The rival is the published method: every module multiplies by its rows of the basis at every call
of the UNet, one identity at a time, in bfloat16. One call of the UNet is what is timed; an image
takes 50 of them, where reconstruct runs once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from w2w_fast import ops

from ..bench import Case, Contender, Setting, Work, close, compiled, our_contenders
from . import _inputs


def cases(setting: Setting) -> list[Case]:
    if setting.quick:
        sizes = [(2048, 64, kind, k) for kind in _inputs.BITS for k in (1, 4)]
    else:
        d = _inputs.SD15.size
        sizes = [
            (d, m, kind, k)
            for m in (1000, 10_000)
            for kind in _inputs.BITS
            if (m, kind) != (10_000, "float32")  # 4 GB: nobody keeps one
            for k in ((1, 4, 16) if m == 1000 else (1, 16))
        ]
    return _inputs.basis_cases("reconstruct", build, setting, sizes)


def build(setting: Setting, d: int, m: int, kind: str, k: int) -> Work:
    space = _inputs.space(d, m, kind, setting.device)
    c = _inputs.normal(k, m, seed=4, device=setting.device)
    rows = _inputs.some(d, 4096, setting.device)
    scale = (space.std if space.row_scale is None else space.std * space.row_scale)[rows].double()
    exact = space.exact(rows)
    mean = space.mean[rows].double()
    want = mean + scale * (c.double() @ exact.mT)
    terms = mean.abs() + scale * (c.double().abs() @ exact.abs().mT)
    del exact

    def check(contender: Contender, w: Tensor) -> None:
        assert bool(w.isfinite().all()), f"{contender.name}: NaN or infinite numbers"
        close(contender, w[:, rows], want, terms)

    def make(backend: str) -> Callable[[], Tensor]:
        return lambda: ops.reconstruct(
            c, space.basis, space.mean, space.std, row_scale=space.row_scale, backend=backend
        )

    contenders = our_contenders("reconstruct", setting, make)
    if kind == "bfloat16":
        contenders += _bfloat16(setting, space, c, d)
    elif kind == "float32":
        contenders.append(Contender("torch float32 matmul", "eager", lambda: _plain(c, space)))
    return Work(contenders, check)


def _plain(c: Tensor, space: _inputs.Stored) -> Tensor:
    return space.mean + space.std * (c @ space.basis.mT)


def _bfloat16(setting: Setting, space: _inputs.Stored, c: Tensor, d: int) -> list[Contender]:
    narrow = c.bfloat16()
    mean, std = space.mean.bfloat16(), space.std.bfloat16()
    # Rows of a slice are contiguous, as in the published modules' own copies.
    ends = [s.start for pair in _inputs.SD15.slices() for s in pair if s.start < d] + [d]
    slices = [slice(a, b) for a, b in zip(ends, ends[1:], strict=False)]

    def matmul() -> Tensor:
        return space.mean + space.std * (narrow @ space.basis.mT)

    def published() -> Tensor:
        people = [
            torch.cat([mean[s] + std[s] * (one @ space.basis[s].mT) for s in slices], dim=-1)
            for one in narrow[:, None]
        ]
        return torch.cat(people)

    bf16 = torch.bfloat16
    lines = [Contender("torch bfloat16 matmul", "eager", matmul, bf16)]
    # Many identities take torch seconds a call on CPUs: one line of it says that.
    if c.shape[0] == 1 or setting.is_cuda:
        line = compiled(setting, _fused, narrow, space.basis, space.mean, space.std)
        line.dtype = bf16
        lines.append(line)
        lines.append(Contender("published: in every module, a call", "rival", published, bf16))
    return lines


def _fused(c: Tensor, basis: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return mean + std * (c @ basis.mT)
