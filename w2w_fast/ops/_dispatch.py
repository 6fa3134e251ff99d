"""The operator library ``torch.ops.w2w_fast`` and the one place that chooses a backend.

    torch     the definition in plain torch: every device, every dtype
    native    the compiled extension on CPUs (C++)
    cuda      the compiled extension on NVIDIA GPUs of compute capability 8.0 and later
    triton    Triton on GPUs, AMD's too, and where CUDA was not built

``W2W_BACKEND``, or the argument ``backend`` of an op, forces one of them: where it cannot serve a
call that raises; a backend never changes silently.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ._native import CODES, Kernels

library = torch.library.Library("w2w_fast", "DEF")

OPS = ("reconstruct", "project", "adapted_linear", "merge", "edit")
BACKENDS = ("torch", "native", "cuda", "triton")
DEVICES = {"native": "cpu", "cuda": "cuda", "triton": "cuda"}
_ORDER = {"cpu": ("native",), "cuda": ("cuda", "triton")}  # what is tried before torch
_BUILD = "pip install . with a C++ compiler builds it"


@cache
def native() -> ModuleType | None:
    """The extension module, None where it was not built; one that fails to import raises."""
    name = "w2w_fast._native"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


@cache
def _kernels(backend: str) -> Any:
    """The six launches of a backend: see ``_native.Kernels``."""
    if backend != "triton":
        return Kernels(getattr(native(), backend.replace("native", "cpu")), backend == "cuda")
    from ..kernels import adapted_linear, edit, merge, project, reconstruct

    modules = (reconstruct, project, adapted_linear, merge, edit)
    names = ("reconstruct", "project", "low_rank", "outer", "merge", "edit")
    found = {n: getattr(m, n) for m in modules for n in names if hasattr(m, n)}
    return SimpleNamespace(**found)


@cache
def _unavailable(backend: str) -> str | None:
    """Why a backend is not there at all, None if it is."""
    if backend == "torch":
        return None
    if backend == "triton":
        known = importlib.util.find_spec("triton") and importlib.util.find_spec("w2w_fast.kernels")
        return None if known else "triton is not installed (pip install 'w2w_fast[triton]')"
    if native() is None:
        return f"the extension is not built ({_BUILD})"
    if backend == "cuda" and not hasattr(native(), "cuda"):
        return "the extension was built without CUDA (nvcc on PATH and another pip install add it)"
    return None


def _device_gap(backend: str, device: torch.device) -> str | None:
    """Why a backend cannot serve this device."""
    if device.type != DEVICES[backend]:
        interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
        if not (interpreted and device.type == "cpu"):
            return f"a tensor is on {device}, it runs on {DEVICES[backend].upper()}"
    elif backend == "cuda" and device.type == "cuda":
        if torch.version.hip:
            return "this is an AMD GPU, it runs on NVIDIA's"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "this GPU is older than compute capability 8.0"
    return None


def gap(backend: str, *tensors: Tensor | None) -> str | None:
    """Why ``backend`` cannot serve a call with these tensors, None if it can."""
    reason = _unavailable(backend)
    if reason or backend == "torch":
        return reason
    device = None
    for t in tensors:
        if t is None:
            continue
        if t.dtype not in CODES:
            return f"a tensor is {t.dtype}, kernels take float32, bfloat16 and float16"
        if t.device != device:
            device = t.device
            reason = _device_gap(backend, device)
            if reason:
                return reason
    return None


def choose(op: str, wish: str | None, *tensors: Tensor | None) -> str:
    """The backend of a call of ``op``; InputError if the one forced cannot serve it."""
    source = "backend"
    if wish is None:
        wish, source = os.environ.get("W2W_BACKEND") or None, "W2W_BACKEND"
    if wish is not None:
        if wish not in BACKENDS:
            raise InputError(f"{source}: wanted {', '.join(BACKENDS)} (or none), got {wish!r}")
        reason = gap(wish, *tensors)
        if reason:
            raise InputError(f"{source}={wish}: {op}: {reason}; leave it unset to allow others")
        return wish
    device = next((t.device.type for t in tensors if t is not None), "cpu")
    served = (backend for backend in _ORDER.get(device, ()) if gap(backend, *tensors) is None)
    return next(served, "torch")


def kernels(op: str, wish: str | None, *tensors: Tensor | None) -> Any | None:
    """The chosen backend's launches; None: the op's own torch definition."""
    backend = choose(op, wish, *tensors)
    return None if backend == "torch" else _kernels(backend)


def forced(wish: str | None) -> bool:
    """Whether a backend is forced, by argument or by environment."""
    return bool(wish or os.environ.get("W2W_BACKEND"))


def plain(*tensors: Tensor | None) -> bool:
    """Whether a call of an op needs no autograd and no tracer, so that its function will do.

    The way through torch.library costs tens of microseconds of Python, which an eager model pays
    at each of its modules.
    """
    if torch.compiler.is_compiling():
        return False
    grad = torch.is_grad_enabled()
    return all(t is None or (type(t) is Tensor and not (grad and t.requires_grad)) for t in tensors)


def choices(op: str) -> list[tuple[str, bool, str]]:
    """(backend, available here, why) of ``op``, for ``w2w doctor`` and the benchmarks."""
    assert op in OPS
    gpu = torch.cuda.is_available()
    rows = []
    for backend in BACKENDS:
        reason = _unavailable(backend)
        if reason is None and DEVICES.get(backend) == "cuda":
            here = torch.device("cuda", torch.cuda.current_device()) if gpu else None
            reason = _device_gap(backend, here) if here else "no GPU is visible"
        rows.append((backend, reason is None, reason or _GOOD[backend]))
    return rows


_GOOD = {
    "torch": "the definition, for every device and dtype",
    "native": "compiled kernels for the CPU",
    "cuda": "compiled kernels for the GPU",
    "triton": "Triton kernels for the GPU",
}


def rows(t: Tensor | None) -> Tensor | None:
    """t itself where its last dimension is contiguous (any other strides, 0 too), else a copy."""
    if t is None or t.shape[-1] <= 1 or t.stride(-1) == 1:
        return t
    return t.contiguous()


def vector(t: Tensor | None) -> Tensor | None:
    """A constant of the space, or scales, as contiguous float32."""
    return None if t is None else t.to(torch.float32).contiguous()
