"""The operator library ``torch.ops.w2w_fast`` and the one place that chooses a backend.

``W2W_BACKEND=torch`` forces the plain torch definitions; ``W2W_BACKEND=native`` forces the
compiled extension, and raises where it cannot serve a call: a backend never changes silently.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ..errors import InputError

library = torch.library.Library("w2w_fast", "DEF")

OPS = ("reconstruct", "project", "adapted_linear", "merge", "edit")
NATIVE_OPS = frozenset({"reconstruct"})
NATIVE_DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # codes of the extension's interface


@cache
def native() -> ModuleType | None:
    """The extension module, None where it was not built; one that fails to import raises."""
    name = "w2w_fast._native"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def _native_gap(op: str, tensors: tuple[Tensor, ...]) -> str | None:
    """Why the extension cannot serve this call, None if it can."""
    if op not in NATIVE_OPS:
        return "no native kernel for this op: plain torch is its definition"
    if native() is None:
        return "the extension is not built (pip install . with a C++ compiler builds it)"
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return f"a tensor is on {tensor.device}, the native kernel runs on the CPU"
        if tensor.dtype not in NATIVE_DTYPES:
            return f"a tensor is {tensor.dtype}, the native kernel takes float32 and bfloat16"
    return None


def backend(op: str, *tensors: Tensor) -> tuple[str, str]:
    """("native" or "torch", the reason) for a call of ``op`` with these tensors."""
    wish = os.environ.get("W2W_BACKEND", "")
    if wish not in ("", "torch", "native"):
        raise InputError(f"W2W_BACKEND: wanted torch or native (or unset), got {wish!r}")
    if wish == "torch":
        return "torch", "W2W_BACKEND=torch"
    gap = _native_gap(op, tensors)
    if gap is None:
        return "native", "W2W_BACKEND=native" if wish else "the extension is built"
    if wish == "native" and op in NATIVE_OPS:
        raise InputError(f"W2W_BACKEND=native: {op}: {gap}; unset W2W_BACKEND to allow torch")
    return "torch", gap


def report() -> list[tuple[str, str, bool, str]]:
    """(op, backend in use on the CPU, native available, reason) for ``w2w doctor``."""
    return [(op, *backend(op)[:1], _native_gap(op, ()) is None, backend(op)[1]) for op in OPS]
