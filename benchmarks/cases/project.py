"""project: c = ((w - mean) / std) V, bound by reading the basis once; reconstruct's backward too.

Nobody publishes a kernel for it: the rivals are plain torch's matmul and torch.compile.
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
        # float32 at one size; k = 4 is left to reconstruct, whose loop it shares. On a CPU torch
        # takes minutes for one bfloat16 product of 16 rows with 10,000 columns.
        d = _inputs.SD15.size
        sizes = [(d, 1000, "float32", 1)] + [
            (d, m, kind, k)
            for m in (1000, 10_000)
            for kind in ("bfloat16", "int8", "int4")
            for k in (1, 16)
            if setting.is_cuda or (m, k) != (10_000, 16)
        ]
    return _inputs.basis_cases("project", build, setting, sizes)


def build(setting: Setting, d: int, m: int, kind: str, k: int) -> Work:
    space = _inputs.space(d, m, kind, setting.device)
    w = _inputs.normal(k, d, seed=5, device=setting.device)
    divisor = space.std.masked_fill(space.std == 0, torch.inf)
    z = (w.double() - space.mean.double()) / divisor.double()
    if space.row_scale is not None:
        z = z * space.row_scale.double()
    columns = _inputs.some(m, 128, setting.device)
    exact = space.exact(columns=columns)
    want, terms = z @ exact, z.abs() @ exact.abs()
    del exact

    def check(contender: Contender, c: Tensor) -> None:
        assert bool(c.isfinite().all()), f"{contender.name}: NaN or infinite numbers"
        close(contender, c[:, columns], want, terms)

    def make(backend: str) -> Callable[[], Tensor]:
        args = (w, space.basis, space.mean, space.std)
        options = {"row_scale": space.row_scale, "m": m}
        return lambda: ops.project(*args, **options, backend=backend)

    contenders = our_contenders("project", setting, make)
    if kind in ("float32", "bfloat16"):
        # A bfloat16 z loses 2^-9 of each of its terms.
        inputs = (w, space.basis, space.mean, divisor)
        dtype = space.basis.dtype
        contenders.append(
            Contender(f"torch {kind} matmul", "eager", lambda: _plain(*inputs), dtype)
        )
        if k == 1 or setting.is_cuda:
            line = compiled(setting, _plain, *inputs)
            line.dtype = dtype
            contenders.append(line)
    return Work(contenders, check)


def _plain(w: Tensor, basis: Tensor, mean: Tensor, divisor: Tensor) -> Tensor:
    return ((w - mean) / divisor).to(basis.dtype) @ basis
