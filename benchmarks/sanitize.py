"""Every op on every backend of the GPU, at sizes that kernels get wrong: for compute-sanitizer.

Small, because a sanitizer runs each kernel a hundred times slower. Results are compared with plain
torch, so that a wrong answer fails here too. `gpu.py` runs it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from w2w_fast import ops
from w2w_fast.benchmarks.cases._inputs import normal
from w2w_fast.ops import _dispatch
from w2w_fast.testing import assert_close

D, DEVICE = 75, "cuda"


def space(m: int, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """basis, mean, std, row_scale."""
    generator = torch.Generator().manual_seed(m + bits)
    if bits >= 16:
        dtype = {32: torch.float32, 16: torch.bfloat16}[bits]
        basis, row_scale = normal(D, m, seed=1, dtype=dtype, device=DEVICE), None
    else:
        columns, dtype = (m, torch.int8) if bits == 8 else ((m + 1) // 2, torch.uint8)
        low, high = (-127, 128) if bits == 8 else (0, 256)
        basis = torch.randint(low, high, (D, columns), generator=generator).to(dtype).to(DEVICE)
        row_scale = normal(D, seed=2, device=DEVICE).abs() / high
    std = normal(D, seed=3, device=DEVICE).abs() + 0.1
    std[::5] = 0
    return basis, normal(D, seed=4, device=DEVICE), std, row_scale


def reconstruct(backend: str) -> Iterator[Tensor]:
    for bits in (32, 16, 8, 4):
        for m in (1, 7, 264):
            basis, mean, std, row_scale = space(m, bits)
            for k in (1, 3, 17):
                c = normal(k, m, seed=5, device=DEVICE)
                yield ops.reconstruct(c, basis, mean, std, row_scale=row_scale, backend=backend)


def project(backend: str) -> Iterator[Tensor]:
    for bits in (32, 16, 8, 4):
        for m in (1, 7, 264):
            basis, mean, std, row_scale = space(m, bits)
            for k in (1, 3, 17):
                w = normal(k, D, seed=6, device=DEVICE)
                yield ops.project(w, basis, mean, std, row_scale=row_scale, m=m, backend=backend)


def adapted_linear(backend: str) -> Iterator[Tensor]:
    for dtype in (torch.float32, torch.bfloat16):
        for r, t, n_in, n_out in ((1, 5, 24, 33), (1, 130, 320, 328), (4, 7, 40, 16)):
            place = {"device": DEVICE, "dtype": dtype}
            x = normal(3, t, n_in, seed=7, **place)
            A, B = normal(3, r, n_in, seed=8, **place), normal(3, n_out, r, seed=9, **place)
            index = torch.tensor([2, 0, 2], device=DEVICE)
            yield ops.low_rank(x, A, B, 0.5, backend=backend)
            yield ops.low_rank(x, A, B, 0.5, index=index, backend=backend)
            weight = normal(n_out, n_in, seed=10, **place)
            yield ops.adapted_linear(x, weight, None, A, B, 0.5, backend=backend)


def merge(backend: str) -> Iterator[Tensor]:
    for dtype in (torch.float32, torch.bfloat16):
        sizes = ((33, 24), (64, 64), (7, 130))
        place = {"device": DEVICE}
        weights = [normal(*size, seed=11, dtype=dtype, **place) for size in sizes]
        outs = [torch.full_like(weight, torch.nan) for weight in weights]
        A = [normal(1, size[1], seed=12, **place) for size in sizes]
        B = [normal(size[0], 1, seed=13, **place) for size in sizes]
        ops.merge(weights, A, B, 0.5, outs, backend=backend)
        yield from outs


def edit(backend: str) -> Iterator[Tensor]:
    for dtype in (torch.float32, torch.bfloat16):
        for k in (1, 3):
            w = normal(k, D, seed=14, device=DEVICE, dtype=dtype)
            delta = normal(D, seed=15, device=DEVICE)
            yield ops.edit(w, delta, 1.5, backend=backend)
            yield ops.edit(w, delta, normal(k, seed=16, device=DEVICE), backend=backend)


def main() -> int:
    ran = 0
    for op in (reconstruct, project, adapted_linear, merge, edit):
        here = {name for name, good, _ in _dispatch.choices(op.__name__) if good}
        for backend in sorted(here & {"cuda", "triton"}):
            pairs = zip(op(backend), op("torch"), strict=True)
            for i, (got, want) in enumerate(pairs):
                step = torch.finfo(got.dtype).eps
                most = 64 * step * float(want.abs().max()) + 1e-6
                assert_close(f"{op.__name__} {backend} {i}", got, want, most)
                ran += 1
    torch.cuda.synchronize()
    print(f"sanitize: {ran} results, all right")
    return 0 if ran else 1


if __name__ == "__main__":
    sys.exit(main())
