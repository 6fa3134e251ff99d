"""The backends that the tests of ops run on.

By default what this process can run: torch, the native extension where it is built, and on a
machine with a GPU cuda and triton there. Without one the same tests run on what stands for it:
W2W_TEST_BACKENDS=triton with TRITON_INTERPRET=1 on Triton's interpreter (test_triton.py), and
W2W_TEST_BACKENDS=cuda with W2W_EMULATED, the extension built for the emulator (test_cuda.py).
Tests that take ``isa`` run on each instruction set of this machine's CPU, or of the CPU that
W2W_EMULATED stands for (test_isa.py).
"""

from __future__ import annotations

import importlib.util
import os

import awkward
import pytest
import torch

from w2w_fast.ops import _dispatch

ON_GPU = ("cuda", "triton")
ASKED, EMULATED = os.environ.get("W2W_TEST_BACKENDS"), os.environ.get("W2W_EMULATED")
if EMULATED:
    spec = importlib.util.spec_from_file_location("_native", EMULATED)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    _dispatch.native, _dispatch.DEVICES["cuda"] = lambda: module, "cpu"
PARAMS = [
    pytest.param(name, marks=pytest.mark.gpu if name in ON_GPU and not ASKED else ())
    for name in (ASKED.split(",") if ASKED else _dispatch.BACKENDS)
]


@pytest.fixture(params=PARAMS)
def backend(request, monkeypatch):
    """A backend's name, forced on every op of the test; awkward makes tensors where it runs."""
    name = request.param
    gpu = name in ON_GPU and torch.cuda.is_available()
    monkeypatch.setattr(awkward, "DEVICE", "cuda" if gpu else "cpu")
    reason = _dispatch.gap(name, awkward.normal(1, seed=0))
    if reason:
        assert not ASKED, f"{name}: {reason}"
        pytest.skip(f"{name}: {reason}")
    monkeypatch.setenv("W2W_BACKEND", name)
    return name


@pytest.fixture(params=_dispatch.native().cpu_features()["supported"] if _dispatch.native() else [])
def isa(request):
    """An instruction set that the compiled CPU kernels run on during the test."""
    native = _dispatch.native()
    before = native.cpu_features()["isa"]
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)
