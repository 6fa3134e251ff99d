"""An adapter inside a weight: ``W' = W + scale * (B A)``.

Always computed from the pristine W and rounded once, so that any number of swaps and a final
restore leave no drift (adding and subtracting in place does). All modules of a model go in one
call, and on a GPU in one launch. Hu et al., LoRA, 2021, section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..errors import InputError
from . import _dispatch
from ._basis import compute_dtype
from ._check import shapes

_dispatch.library.define(
    "merge_(Tensor(a!)[] outs, Tensor[] weights, Tensor[] A, Tensor[] B, float scale, "
    "str? backend=None) -> ()"
)
TILE = 64  # kMergeTile of csrc/merge.h


def merge_reference(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """The definition, summed in float32 (float64 if an input is), in the weight's dtype."""
    work = compute_dtype(weight, A, B)
    return torch.addmm(weight.to(work), B.to(work), A.to(work), alpha=scale).to(weight.dtype)


@lru_cache(maxsize=64)
def _table(key: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[Tensor, int]:
    """(rows of csrc/merge.h's MergeModule, the number of tiles of all modules)."""
    table, tiles = [], 0
    for *distances, n_out, n_in in key:
        table.append([*distances, n_out, n_in, tiles, 0])
        tiles += -(-n_out // TILE) * -(-n_in // TILE)
    return torch.tensor(table, dtype=torch.int64, device=device), tiles


def _merge(
    outs: Sequence[Tensor],
    weights: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scale: float,
    backend: str | None = None,
) -> None:
    if not weights:
        return
    launch = _dispatch.kernels("merge", backend, *outs, *weights, *A, *B)
    alike = all(len({t.dtype for t in ts}) == 1 for ts in ((*outs, *weights), (*A, *B)))
    contiguous = all(t.is_contiguous() for t in (*outs, *weights))
    if launch is None or not alike or not contiguous or len({a.shape[0] for a in A}) != 1:
        if launch is not None and _dispatch.forced(backend):
            raise InputError(
                "merge: a forced backend wanted contiguous weights of one dtype, adapters of one "
                "dtype and one rank; leave it unset to allow torch"
            )
        for out, weight, a, b in zip(outs, weights, A, B, strict=True):
            out.copy_(merge_reference(weight, a, b, scale))
        return
    A, B = [t.contiguous() for t in A], [t.contiguous() for t in B]
    lists = (outs, weights, A, B)
    # Distances from the first module's tensors: the next identity's views of one flat adapter lie
    # as this one's do, and find their table already there.
    firsts = [tensors[0].data_ptr() for tensors in lists]
    key = tuple(
        (*(t.data_ptr() - first for t, first in zip(module, firsts, strict=True)), *module[1].shape)
        for module in zip(*lists, strict=True)
    )
    table, tiles = _table(key, weights[0].device)
    aligned = all(
        weight.shape[1] % 8 == 0 and out.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0
        for out, weight in zip(outs, weights, strict=True)
    )
    if tiles:
        first = tuple(tensors[0] for tensors in lists)
        launch.merge(first, table, tiles, A[0].shape[0], scale, aligned)


_dispatch.library.impl("merge_", _merge, "CompositeExplicitAutograd")
torch.library.register_fake("w2w_fast::merge_", lambda *args: None, lib=_dispatch.library)


def merge(
    weight: Tensor | Sequence[Tensor],
    A: Tensor | Sequence[Tensor],
    B: Tensor | Sequence[Tensor],
    scale: float = 1.0,
    out: Tensor | Sequence[Tensor] | None = None,
    *,
    backend: str | None = None,
) -> Tensor | Sequence[Tensor]:
    """weight ``[out, in]``, A ``[r, in]``, B ``[out, r]`` -> ``[out, in]`` in the weight's dtype.

    Or lists of them, one entry a module, merged in one call. ``out`` receives the result and must
    not be the pristine weights; without it the result is new. Without out, and without a backend,
    a single module is differentiable in all three. InputError for shapes that do not fit.
    """
    single = isinstance(weight, Tensor)
    if single and out is None and backend is None:
        shapes("merge", weight=(weight, "out in"), A=(A, "r in"), B=(B, "out r"))
        return merge_reference(weight, A, B, scale)
    if single:
        lists = [[weight], [A], [B], None if out is None else [out]]
    else:
        lists = [list(weight), list(A), list(B), None if out is None else list(out)]
    weights, As, Bs, outs = lists
    for name, tensors in (("A", As), ("B", Bs), ("out", outs)):
        if tensors is not None and len(tensors) != len(weights):
            raise InputError(f"merge: {name}: wanted {len(weights)} tensors, got {len(tensors)}")
    for i in range(len(weights)):
        at = "" if single else f"[{i}]"
        shapes(
            "merge",
            **{
                f"weight{at}": (weights[i], "out in"),
                f"A{at}": (As[i], "r in"),
                f"B{at}": (Bs[i], "out r"),
            },
        )
        if outs is None:
            continue
        n_out, n_in = weights[i].shape
        if outs[i].shape != weights[i].shape:
            raise InputError(f"merge: out{at}: wanted [{n_out}, {n_in}], got {list(outs[i].shape)}")
        if outs[i].untyped_storage().data_ptr() == weights[i].untyped_storage().data_ptr():
            raise InputError(
                f"merge: out{at}: wanted other memory than weight's: keep a pristine copy"
            )
    outs = [torch.empty_like(t) for t in weights] if outs is None else outs
    with torch.no_grad():
        torch.ops.w2w_fast.merge_.default(outs, weights, As, Bs, scale, backend)
    return outs[0] if single else outs
