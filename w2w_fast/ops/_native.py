"""Launches of the compiled kernels: checked tensors in, addresses, sizes and strides out.

One ``Kernels`` a device, with the six launches that every backend has (``kernels/`` has them in
Triton). An argument's last dimension is contiguous, out's rows do not overlap; what is stored in
the space (mean, std, row_scale) is float32. csrc/<op>.h says what each computes.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.uint8: 4}


def _at(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _scales(scale: float | Tensor) -> tuple[int, float]:
    return (scale.data_ptr(), 1.0) if isinstance(scale, Tensor) else (0, scale)


class Kernels:
    """The compiled kernels of one device: module is ``_native.cpu`` or ``_native.cuda``."""

    def __init__(self, module: ModuleType, is_cuda: bool) -> None:
        self.module, self.is_cuda = module, is_cuda

    def _run(self, name: str, like: Tensor, *fields: object, scratch: bool = False) -> None:
        call = getattr(self.module, name)
        if not self.is_cuda:
            call(*fields, torch.get_num_threads())
            return
        with torch.cuda.device_of(like):
            stream = torch.cuda.current_stream().cuda_stream if like.is_cuda else 0
            if scratch:
                size = getattr(self.module, f"{name}_scratch")(*fields)
                memory = torch.empty(size, dtype=torch.uint8, device=like.device)
                call(*fields, memory.data_ptr(), stream)
            else:
                call(*fields, stream)

    def reconstruct(
        self,
        c: Tensor,
        basis: Tensor,
        mean: Tensor | None,
        std: Tensor,
        row_scale: Tensor | None,
        out: Tensor,
    ) -> None:
        """out ``[k, d]`` = mean + std * row_scale * (c V^T), c ``[k, m]`` float32."""
        (k, m), d = c.shape, basis.shape[0]
        self._run(
            "reconstruct", out,
            basis.data_ptr(), CODES[basis.dtype], d, m, basis.stride(0),
            _at(mean), std.data_ptr(), _at(row_scale),
            c.data_ptr(), k, c.stride(0), out.data_ptr(), CODES[out.dtype], out.stride(0),
        )  # fmt: skip

    def project(
        self,
        source: Tensor,
        basis: Tensor,
        mean: Tensor | None,
        std: Tensor,
        row_scale: Tensor | None,
        divide: bool,
        out: Tensor,
    ) -> None:
        """out ``[k, m]`` float32 = z V with z of source ``[k, d]``, as csrc/project.h says."""
        (k, m), d = out.shape, basis.shape[0]
        self._run(
            "project", out,
            basis.data_ptr(), CODES[basis.dtype], d, m, basis.stride(0),
            _at(mean), std.data_ptr(), _at(row_scale),
            source.data_ptr(), CODES[source.dtype], k, source.stride(0), divide, out.data_ptr(),
            scratch=True,
        )  # fmt: skip

    def low_rank(
        self,
        base: Tensor | None,
        x: Tensor,
        down: Tensor,
        up: Tensor,
        index: Tensor | None,
        scale: float | Tensor,
        out: Tensor | None,
        s: Tensor,
    ) -> None:
        """s = x down^T, out = base + scale s up^T.

        x ``[b, t, in]``, down ``[a, r, in]`` and up ``[a, n, r]`` of any strides; out None: s
        ``[b, t, r]`` float32 alone.
        """
        (b, t, n_in), (a, n_out, r) = x.shape, up.shape
        self._run(
            "low_rank", x,
            b, t, n_in, n_out, r, a, _at(base), x.data_ptr(), _at(out), CODES[x.dtype],
            *((0, 0) if base is None else base.stride()[:2]), *x.stride()[:2],
            *((0, 0) if out is None else out.stride()[:2]),
            down.data_ptr(), up.data_ptr(), CODES[down.dtype], *down.stride(), *up.stride(),
            _at(index), *_scales(scale), s.data_ptr(),
        )  # fmt: skip

    def outer(
        self,
        coefficient: Tensor,
        feature: Tensor,
        index: Tensor | None,
        scale: float | Tensor,
        out: Tensor,
    ) -> None:
        """out ``[a, r, n]``, any strides = each adapter's sum of scale coefficient^T feature."""
        (b, t, n), (a, r, _) = feature.shape, out.shape
        self._run(
            "outer", feature,
            b, t, n, r, a, coefficient.data_ptr(), feature.data_ptr(), CODES[feature.dtype],
            *feature.stride()[:2], _at(index), *_scales(scale),
            out.data_ptr(), CODES[out.dtype], *out.stride(),
            scratch=True,
        )  # fmt: skip

    def merge(
        self,
        first: tuple[Tensor, Tensor, Tensor, Tensor],
        table: Tensor,
        tiles: int,
        rank: int,
        scale: float,
        aligned: bool,
    ) -> None:
        """W' of every module of table; first: the first module's (out, weight, A, B)."""
        out, weight, a, b = first
        self._run(
            "merge", weight,
            out.data_ptr(), weight.data_ptr(), a.data_ptr(), b.data_ptr(),
            CODES[weight.dtype], CODES[a.dtype], table.data_ptr(), len(table), tiles, rank, scale,
        )  # fmt: skip

    def edit(self, w: Tensor, delta: Tensor, amount: float | Tensor, out: Tensor) -> None:
        """out ``[k, d]`` = w + amount * delta, delta ``[d]``, amount a number or ``[k]``."""
        self._run(
            "edit", w,
            *w.shape, w.data_ptr(), CODES[w.dtype], w.stride(0),
            delta.data_ptr(), CODES[delta.dtype], *_scales(amount), out.data_ptr(), out.stride(0),
        )  # fmt: skip
