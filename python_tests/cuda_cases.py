"""Inputs and checks of test_cuda.py, and how it builds the kernels for the host."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import awkward
import numpy as np
import oracle
import pytest
import torch

from w2w_fast.testing import allowed, assert_close

EMULATOR = Path(__file__).parent / "cuda_emulator"
CSRC = Path(__file__).parents[1] / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
HALF = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, *HALF)
EPS = torch.finfo(torch.float32).eps
SIZES = [(7, 33), (64, 64), (0, 5), (1, 1), (65, 128), (130, 8)]


# --- building -----------------------------------------------------------------------------------


def compiled(commands: list[list[str]]) -> list[str]:
    """What the commands print, two at a time; fails with the last words of one that fails."""

    def run(command: list[str]) -> str:
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr[-4000:]}"
        return done.stdout + done.stderr

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, commands))


def host_flags() -> list[str]:
    """The command that compiles a kernel for the host, up to its source."""
    cxx = os.environ.get("CXX") or shutil.which("c++")
    if cxx is None:
        pytest.skip("no C++ compiler")
    flags = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas"]
    return [cxx, *flags, f"-I{CSRC}", f"-I{EMULATOR}", "-DW2W_EMULATED"]


def mistakes(out: Path) -> list[str]:
    """What the emulator says to kernels that are wrong."""
    program = str(out / "mistakes")
    compiled([[*host_flags(), str(EMULATOR / "mistakes.cpp"), "-o", program]])
    return compiled([[program]])[0].splitlines()


def emulated(out: Path) -> ModuleType:
    """The extension with its CUDA half for the host and no CPU half, built in ``out``."""
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 compiles the bindings")
    flags = host_flags()
    named = ['-DW2W_CUDA="emulated"', '-DW2W_VERSION="0"']
    named += [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    sources = {
        CSRC / "bindings.cpp": named,
        EMULATOR / "cpu_stub.cpp": [],
        **dict.fromkeys(SOURCES, ["-xc++"]),
    }
    objects = [str(out / f"{source.name}.o") for source in sources]
    compiled(
        [
            [*flags, *more, "-c", str(source), "-o", name]
            for (source, more), name in zip(sources.items(), objects, strict=True)
        ]
    )
    library = str(out / "_native.so")
    link = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    compiled([[*flags, "-shared", *objects, *link, "-o", library]])
    spec = importlib.util.spec_from_file_location("_native", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- inputs -------------------------------------------------------------------------------------


def hollow(*shape, dtype=torch.float32, device="cpu"):
    """(NaN rows to be written, the larger tensor of 7 around them)."""
    around = torch.full((*shape[:-1], shape[-1] + 9), 7.0, dtype=dtype, device=device)
    return around[..., 4:-5].fill_(torch.nan), around


def untouched(around):
    return bool((around[..., :4] == 7).all() and (around[..., -5:] == 7).all())


def rows_of(t, how):
    """t with its rows as they may lie: aligned, one element off, in a wider tensor, or all one."""
    if how == "repeated":
        return t[:1].expand_as(t)
    pad, start = {"tight": (0, 0), "off": (3, 1), "wide": (32, 16)}[how]
    around = torch.full((t.shape[0], t.shape[1] + pad), 113, dtype=t.dtype)
    view = around[:, start : start + t.shape[1]]
    return view.copy_(t)


def space(d, m, bits, seed=0, how="tight", device="cpu"):
    """((basis, mean, std, row_scale), the numbers the basis stands for)."""
    generator = torch.Generator().manual_seed(seed)
    row_scale = None
    if bits >= 16:
        basis = awkward.normal(d, m, seed=seed, dtype={32: torch.float32, 16: torch.bfloat16}[bits])
    else:
        top = 1 << (bits - 1)
        basis = torch.randint(-top, top, (d, m), generator=generator, dtype=torch.int8)
        row_scale = awkward.normal(d, seed=seed + 1).abs() / top
    basis = (
        rows_of(basis, how)
        if bits > 4
        else basis[:1].expand_as(basis)
        if how == "repeated"
        else basis
    )
    exact = basis.double() if row_scale is None else basis.double() * row_scale.double()[:, None]
    if bits == 4:
        # The unused half of the last byte holds 15: nothing may come of it.
        nibbles = torch.full((d, m + m % 2), 15, dtype=torch.uint8)
        nibbles[:, :m] = (basis + 8).to(torch.uint8)
        basis = rows_of(nibbles[:, ::2] | nibbles[:, 1::2] << 4, how)
    std = awkward.normal(d, seed=seed + 2).abs() + 0.1  # else one term outweighs all others
    std[::5] = 0
    args = (basis, awkward.normal(d, seed=seed + 3), std, row_scale)
    return [t if t is None else to(t, device) for t in args], exact


def to(t, device):
    """t there, its strides kept."""
    if device == "cpu":
        return t
    storage = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
    return storage.copy_(t)


def check_reconstruct(run, c, args, exact, dtype=torch.float32):
    kernels, device = run
    basis, mean, std, row_scale = args
    out, around = hollow(c.shape[0], exact.shape[0], dtype=dtype, device=device)
    kernels.reconstruct(to(c, device), basis, mean, std, row_scale, out)
    assert untouched(around)
    if dtype == torch.float32:
        mean = torch.zeros(len(std)) if mean is None else mean.cpu()
        plain = mean + std.cpu() * (c @ exact.float().mT)
        want = oracle.reconstruct(c, exact, mean, std)
        terms = mean.abs() + std.cpu() * (c.abs() @ exact.float().abs().mT)
        assert_close("w", out, want, allowed(plain, want, terms))
    return out


def check_project(run, source, args, exact, divide):
    kernels, device = run
    basis, mean, std, row_scale = args
    out = torch.full((source.shape[0], exact.shape[1]), torch.nan, device=device)
    kernels.project(to(source, device), basis, mean, std, row_scale, divide, out)
    wide, std, mean = source.float(), std.cpu(), mean.cpu()
    if divide:
        want = oracle.project(source, exact, mean, std)
        z = (wide - mean) / std.masked_fill(std == 0, torch.inf)
    else:
        want = oracle.reconstruct_grad(source, exact, std)
        z = wide * std
    terms = z.abs() @ exact.float().abs()
    assert_close("c", out, want, allowed(z @ exact.float(), want, terms))
    return out


# --- adapters -----------------------------------------------------------------------------------


def adapters(b, a, r, dtype, t=37, wide=(70, 41), seed=0):
    n_in, n_out = wide
    shapes = [(b, t, n_in), (b, t, n_out), (a, r, n_in), (a, n_out, r)]
    return [awkward.normal(*s, seed=seed + i, dtype=dtype) for i, s in enumerate(shapes)]


def check_adapted(run, x, base, A, B, index, scale, g):
    """Both directions, against the oracle: summed in float32, each result rounded once."""
    kernels, device = run
    x_, base_, A_, B_, g_ = (to(t, device) for t in (x, base, A, B, g))
    index_ = None if index is None else index.to(device)
    scale_ = scale.to(device) if isinstance(scale, torch.Tensor) else scale
    out, around = hollow(*base.shape, dtype=x.dtype, device=device)
    dx, around_dx = hollow(*x.shape, dtype=x.dtype, device=device)
    s, u = (x_.new_full((*x.shape[:2], A.shape[1]), torch.nan, dtype=torch.float32) for _ in "su")
    dA, dB = (
        torch.full_like(t, torch.nan, memory_format=torch.contiguous_format) for t in (A_, B_)
    )
    kernels.low_rank(base_, x_, A_, B_, index_, scale_, out, s)
    kernels.low_rank(None, g_, B_.mT, A_.mT, index_, scale_, dx, u)
    kernels.outer(u, x_, index_, scale_, dA)
    kernels.outer(s, g_, index_, scale_, dB.mT)
    assert untouched(around) and untouched(around_dx)
    wants = oracle.low_rank_gradients(g, x, A, B, index, scale)
    wants = (*wants[:3], wants[3] + oracle.f64(base))
    magnitudes = oracle.low_rank_gradients(
        *(t.abs() for t in (g, x, A, B)), index, torch.as_tensor(scale).abs()
    )
    names = zip(("dx", "dA", "dB", "y"), wants, (dx, dA, dB, out), magnitudes, strict=True)
    for name, want, got, terms in names:
        rounding = torch.finfo(got.dtype).eps / 2 * np.abs(want).max(initial=0)
        assert_close(name, got, want, float(rounding + 4 * EPS * terms.max(initial=0)))
    return out, s, (dA, dB)


def module_table(outs, weights, A, B, device):
    """(table, tiles): csrc/merge.h"""
    rows, tiles = [], 0
    for module in zip(outs, weights, A, B, strict=True):
        firsts = (outs[0], weights[0], A[0], B[0])
        at = [t.data_ptr() - f.data_ptr() for t, f in zip(module, firsts, strict=True)]
        n, k = module[1].shape
        rows.append([*at, n, k, tiles, 0])
        tiles += -(-n // 64) * -(-k // 64)
    return torch.tensor(rows, device=device), tiles


def modules(r, dtype, sizes, device, seed=0):
    """Weights, and A and B as views of one flat adapter, as reconstruct leaves them."""
    normal = awkward.normal
    weights = [normal(*s, seed=seed + i, dtype=dtype).to(device) for i, s in enumerate(sizes)]
    flat, at, A, B = (
        normal(sum(r * (n + k) for n, k in sizes), seed=seed + 99).to(device),
        0,
        [],
        [],
    )
    for n, k in sizes:
        A.append(flat[at : at + r * k].view(r, k))
        B.append(flat[at + r * k : at + r * (n + k)].view(n, r))
        at += r * (n + k)
    return weights, A, B
