"""The CUDA kernels: run on the host under an emulator, compiled by nvcc, run on a GPU.

``cuda_emulator`` compiles csrc/cuda/*.cu with the C++ compiler: threads are fibers, and the few
instructions C++ has no word for are written out. So index arithmetic, barriers, copies and
rounding are tested where there is no GPU; speed and the hardware's own order of sums are not.
"""

from __future__ import annotations

import os
import re
import shutil

import awkward
import cuda_cases
import elsewhere
import numpy as np
import oracle
import pytest
import torch
from cuda_cases import (
    EPS,
    FLOATS,
    HALF,
    SIZES,
    SOURCES,
    adapters,
    check_adapted,
    check_project,
    check_reconstruct,
    compiled,
    hollow,
    module_table,
    modules,
    rows_of,
    space,
    to,
    untouched,
)

from w2w_fast.ops import _dispatch
from w2w_fast.ops._native import Kernels
from w2w_fast.testing import assert_close


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    return cuda_cases.emulated(tmp_path_factory.mktemp("cuda"))


@pytest.fixture(scope="session")
def on_gpu():
    native = _dispatch.native()
    if native is None or not hasattr(native, "cuda"):
        pytest.skip("the extension has no CUDA half")
    return Kernels(native.cuda, True), "cuda"


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def run(request):
    """(the kernels, their device)"""
    if request.param == "emulated":
        return Kernels(request.getfixturevalue("emulated").cuda, True), "cpu"
    return request.getfixturevalue("on_gpu")


@pytest.fixture(autouse=True)
def guarded(monkeypatch):
    """Scratch is poisoned (it reads as NaN), and what lies behind it must stay as it was."""
    empty, scratch = torch.empty, []

    def poisoned(*args, **kwargs):
        if kwargs.get("dtype") is not torch.uint8:
            return empty(*args, **kwargs)
        whole = empty(args[0] + 64, **kwargs).fill_(255)
        scratch.append(whole[args[0] :])
        return whole[: args[0]]

    monkeypatch.setattr(torch, "empty", poisoned)
    yield
    assert all((tail == 255).all() for tail in scratch), "a kernel wrote behind its scratch"


def test_the_emulator_sees_mistakes(tmp_path):
    assert cuda_cases.mistakes(tmp_path) == [
        "block (cuda): emulator: a barrier that not all threads reach",
        "warp (cuda): emulator: threads meet at __shfl_xor_sync and at __syncwarp",
        "copy: -1 5",
        "memory: -1 0",
        "much (cuda): invalid argument",
    ]


def test_the_tests_of_ops(emulated):
    elsewhere.tests_of_ops("cuda", W2W_EMULATED=emulated.__file__)


# --- the basis ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
@pytest.mark.parametrize("m", [0, 1, 7, 8, 1000])
@pytest.mark.parametrize("k", [0, 1, 3, 16, 33])
def test_reconstruct_and_project(run, k, m, bits):
    args, exact = space(75, m, bits, seed=k + m, device=run[1])
    c = awkward.normal(k, m, seed=5)
    out = check_reconstruct(run, c, args, exact)
    if m <= 8:
        for dtype in HALF:
            narrow = check_reconstruct(run, c, args, exact, dtype)
            assert torch.equal(narrow, out.to(dtype)), "rounded once, to nearest even"
    for divide in (True, False):
        check_project(run, awkward.normal(k, 75, seed=6), args, exact, divide)


@pytest.mark.parametrize("how", ["tight", "off", "wide", "repeated"])
@pytest.mark.parametrize("bits", [32, 16, 8, 4])
@pytest.mark.parametrize("m", [40, 200, 203])
@pytest.mark.parametrize("k", [1, 5])
def test_rows_wherever_they_lie(run, k, m, bits, how):
    """Copies of 16, 8, 4 and 1 bytes; c, w and the basis with strides of their own."""
    args, exact = space(150, m, bits, seed=m, how=how, device=run[1])
    args[1] = to(awkward.normal(150, seed=m + 3), run[1])
    check_reconstruct(run, rows_of(awkward.normal(k, m, seed=1), how), args, exact)
    check_project(run, rows_of(awkward.normal(k, 150, seed=2), how), args, exact, True)


@pytest.mark.parametrize("k", [1, 2, 16])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_many_columns(run, k, bits):
    """Copies go round their ring several times, and there are more columns than a block takes."""
    args, exact = space(20, 2600, bits, seed=k, device=run[1])
    check_reconstruct(run, awkward.normal(k, 2600, seed=5), args, exact)
    check_project(run, awkward.normal(k, 20, seed=6), args, exact, True)


def test_many_blocks_and_parts(run):
    """More rows than a block takes, and more than one part."""
    for bits in (32, 16, 8, 4):
        for k in (1, 16):
            args, exact = space(2100 if k == 1 else 300, 90, bits, seed=bits, device=run[1])
            check_reconstruct(run, awkward.normal(k, 90, seed=1), args, exact)
            for dtype in FLOATS:
                source = awkward.normal(k, len(exact), seed=2, dtype=dtype)
                first = check_project(run, source, args, exact, True)
            assert torch.equal(first, check_project(run, source, args, exact, True))


def test_no_mean_and_equal_bits_in_every_batch_of_a_kind(run):
    args, exact = space(70, 130, 16, device=run[1])
    args[1] = None
    c = awkward.normal(16, 130, seed=1)
    together, three = (check_reconstruct(run, rows, args, exact) for rows in (c, c[:3]))
    assert torch.equal(together[:3], three)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("bits", [32, 16, 8])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_nan_and_infinities_reach_only_what_they_touch(run, k, bits):
    kernels, device = run
    args, exact = space(40, 19, bits, device=device)
    args[2].add_(1)
    args[1][20], args[2][21] = torch.inf, torch.nan
    c = awkward.normal(k, 19, seed=1)
    if bits == 8:
        exact[exact == 0] = 1e-30  # infinity times an integer 0 is NaN, as in the definition
        args[0][args[0] == 0] = 1
        exact = args[0].cpu().double() * args[3].cpu().double()[:, None]
    for value in (torch.nan, torch.inf, -torch.inf):
        c[0, 3] = value
        out = torch.empty(k, 40, device=device)
        kernels.reconstruct(to(c, device), *args, out)
        assert_close("w", out, oracle.reconstruct(c, exact, args[1], args[2]), 1e-4)
    w = awkward.normal(k, 40, seed=2)
    w[0, 5] = torch.inf
    args[1][20], args[2][21] = 0, 1
    out = torch.empty(k, 19, device=device)
    kernels.project(to(w, device), *args, False, out)
    assert_close("c", out, oracle.reconstruct_grad(w, exact, args[2]), 1e-4)
    args[2][5] = 0  # fixed: an infinite number in it still shows
    kernels.project(to(w, device), *args, True, out)
    assert out[0].isnan().all() and not out[1:].isinf().any()


@pytest.mark.parametrize("dtype", HALF)
def test_rounds_as_torch_does(run, dtype):
    """m = 0 leaves w = mean: ties, both neighbours of a tie, overflow, subnormals, signs, NaN."""
    kernels, device = run
    generator = torch.Generator().manual_seed(0)
    high = torch.randint(0, 1 << 16, (1000,), generator=generator)
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    every = torch.arange(1 << 16).to(torch.uint16).view(torch.float16).float()
    patterns = (high[:, None] << 16 | low).flatten().to(torch.int32).view(torch.float32)
    mean = torch.cat([patterns, patterns * 2.0**-100, every, every + 2.0**-12 * every])
    mean = mean.to(device)
    basis, c = mean.new_zeros(len(mean), 0), mean.new_zeros(1, 0)
    out = torch.empty(1, len(mean), dtype=dtype, device=device)
    kernels.reconstruct(c, basis, mean, torch.zeros_like(mean), None, out)
    nan = mean.isnan()
    assert nan.any() and out[0, nan].isnan().all()
    assert torch.equal(out[0, ~nan], mean[~nan].to(dtype))


def test_every_bit_of_c_counts(run):
    """Numbers of all sizes, exactly: one column, and a basis of 1."""
    kernels, device = run
    bits = torch.randint(0, 2**31, (64,), generator=torch.Generator().manual_seed(0)).int()
    c = torch.cat([bits, bits | -(2**31)]).view(torch.float32)[:, None]
    c = c[c.isfinite().all(1) & (c.abs() > 1e-30).all(1)]
    one = torch.ones(16, device=device)
    for basis, row_scale in ((one[:, None].bfloat16(), None), (one[:, None].to(torch.int8), one)):
        out = torch.empty(len(c), 16, device=device)
        kernels.reconstruct(to(c, device), basis, None, one, row_scale, out)
        assert torch.equal(out.cpu(), c.expand(-1, 16))


# --- adapters -----------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [1, 2, 4, 16])
@pytest.mark.parametrize("dtype", FLOATS)
def test_adapted_linear_equals_oracle(run, r, dtype):
    kernels, device = run
    for a, index, scale in (
        (3, None, 0.5),
        (1, None, awkward.normal(3, seed=8)),
        (4, torch.tensor([2, 0, 2]), awkward.normal(3, seed=9)),
    ):
        x, base, A, B = adapters(3, a, r, dtype, t=5, wide=(72, 41), seed=r + a)
        g = awkward.normal(*base.shape, seed=7, dtype=dtype)
        out, s, _ = check_adapted(run, x, base, A, B, index, scale, g)
        inplace, alone = to(base.clone(), device), torch.full_like(s, torch.nan)
        args = [to(t, device) if isinstance(t, torch.Tensor) else t for t in (A, B, index, scale)]
        kernels.low_rank(inplace, to(x, device), *args, inplace, alone)
        assert torch.equal(inplace, out) and torch.equal(alone, s)
        kernels.low_rank(None, to(x, device), *args, None, alone.fill_(torch.nan))
        assert torch.equal(alone, s)


@pytest.mark.parametrize("r", [1, 4, 16])
def test_wide_layers_and_many_tokens(run, r):
    """More columns than shared memory has room for, 16 bytes at a time, more parts than one."""
    wide = {1: (4200, 4120), 4: (1100, 1040), 16: (640, 264)}[r]
    half = torch.bfloat16
    x, base, A, B = adapters(1, 1, r, half, t=3, wide=wide)
    check_adapted(run, x, base, A, B, None, 1.0, awkward.normal(*base.shape, seed=7, dtype=half))
    x, base, A, B = adapters(2, 2, r, torch.float32, t=270, wide=(8, 12))
    g = awkward.normal(*base.shape, seed=7)
    first = check_adapted(run, x, base, A, B, None, 2.0, g)[2]
    again = check_adapted(run, x, base, A, B, None, 2.0, g)[2]
    assert all(torch.equal(p, q) for p, q in zip(first, again, strict=True))


@pytest.mark.parametrize("r", [1, 4])
@pytest.mark.parametrize("view", awkward.VIEWS[1:])
def test_any_strides_of_an_adapted_linear(run, view, r):
    x, base, A, B = adapters(3, 3, r, torch.float32, t=5)
    g = awkward.normal(*base.shape, seed=7)
    x, base, g = (rows_of(t.flatten(0, 1), "off").unflatten(0, (3, 5)) for t in (x, base, g))
    check_adapted(run, x, base, view(A), view(B), None, 2.0, g)
    check_adapted(run, x[:1].expand_as(x), base, A, B, None, 2.0, g[:, :1].expand_as(g))


@pytest.mark.parametrize(("b", "t"), [(0, 5), (2, 0), (1, 1), (1, 20)])
def test_adapted_linear_of_odd_sizes(run, b, t):
    x, base, A, B = adapters(b, 1, 2, torch.float32, t, wide=(3, 5))
    check_adapted(run, x, base, A, B, None, 1.0, torch.ones_like(base))


@pytest.mark.parametrize("r", [1, 3])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_stay_with_their_sample(run, r, value):
    x, base, A, B = adapters(3, 3, r, torch.float32, t=5)
    x[0, 0, 0] = value
    kernels, device = run
    index = torch.tensor([0, 2, 2], device=device)
    x, base, A, B = (to(t, device) for t in (x, base, A, B))
    out, s = torch.empty_like(base), torch.empty(3, 5, r, device=device)
    kernels.low_rank(base, x, A, B, index, torch.ones(3, device=device), out, s)
    bad = ~out.isfinite()
    assert bad[0, 0].all() and int(bad.sum()) == out.shape[2]
    if r == 1:
        assert torch.equal(out[0, 0].isnan(), torch.full_like(out[0, 0], value != value).bool())
    dA = torch.full_like(A, torch.nan)
    kernels.outer(s, x, index, 1.0, dA)
    assert not dA[0].isfinite().all() and not dA[1].any() and dA[2].isfinite().all()


@pytest.mark.parametrize("r", [1, 2, 4, 16, 18])
@pytest.mark.parametrize("dtype", FLOATS)
def test_merge_equals_oracle(run, r, dtype):
    kernels, device = run
    weights, A, B = modules(r, dtype, SIZES, device)
    held = [hollow(w.numel(), dtype=dtype, device=device) for w in weights]
    outs = [out.view(w.shape) for (out, _), w in zip(held, weights, strict=True)]
    table, tiles = module_table(outs, weights, A, B, device)
    first = outs[0], weights[0], A[0], B[0]
    kernels.merge(first, table, tiles, r, 1.7, False)
    assert all(untouched(around) for _, around in held)
    for out, w, a, b in zip(outs, weights, A, B, strict=True):
        want = oracle.merge(w, a, b, 1.7)
        terms = oracle.merge(w.abs(), a.abs(), b.abs(), 1.7).max(initial=0)
        rounding = torch.finfo(dtype).eps / 2 * np.abs(want).max(initial=0)
        assert_close("W'", out, want, float(rounding + 4 * EPS * terms))
    kernels.merge(first, table, tiles, r, 0.0, False)
    assert all(torch.equal(out, w) for out, w in zip(outs, weights, strict=True))


def test_merge_of_aligned_modules_of_many(run):
    """More modules than a block has threads: the search for a tile's module goes on."""
    kernels, device = run
    weights, A, B = modules(1, torch.bfloat16, [(8, 8)] * 300 + [(66, 136)], device)
    outs = [torch.full_like(w, torch.nan) for w in weights]
    table, tiles = module_table(outs, weights, A, B, device)
    kernels.merge((outs[0], weights[0], A[0], B[0]), table, tiles, 1, -2.0, True)
    for i in (0, 255, 256, 299, 300):
        want = oracle.merge(weights[i], A[i], B[i], -2.0)
        assert_close("W'", outs[i], want, 2.0**-8 * float(np.abs(want).max()))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("k", [0, 1, 3])
def test_edit_equals_oracle(run, k, dtype):
    kernels, device = run
    for d, delta_type in ((2500, torch.float32), (2176, dtype), (0, dtype)):
        w = awkward.normal(k, d, seed=1, dtype=dtype).to(device)
        delta = awkward.normal(d, seed=2, dtype=delta_type).to(device)
        for amount in (-1.5, awkward.normal(k, seed=3).to(device)):
            out, around = hollow(k, d, dtype=dtype, device=device)
            inplace = w.clone()
            kernels.edit(w, delta, amount, out)
            kernels.edit(inplace, delta, amount, inplace)
            assert untouched(around) and torch.equal(inplace, out)
            want = oracle.edit(w, delta, amount)
            size = np.abs(want).max(initial=0)
            rounding = torch.finfo(dtype).eps / 2 * size
            assert_close("w'", out, want, float(rounding + 4 * EPS * (size + 10)))
            kernels.edit(w, delta, 0.0, out)
            assert torch.equal(out, w)
    w = awkward.normal(1, 99, seed=1, dtype=dtype).to(device).expand(4, 99)
    out = torch.empty(4, 99, dtype=dtype, device=device)
    kernels.edit(w, torch.zeros(99, device=device), 1.0, out)
    assert torch.equal(out, w)


# --- nvcc, and what only a GPU shows ------------------------------------------------------------


def kernel_name(mangled: str) -> str:
    """tensor_kernel<1, 2> of a mangled entry: the function and its template arguments."""
    for match in re.finditer(r"(?=(\d\d)([a-z0-9_]+_kernel)(I\w*?E)?(?:E|N|v))", mangled):
        if int(match[1]) == len(match[2]):
            values = re.findall(r"L(?:NS_5DtypeE|N3w2w5DtypeE|[ib])(\d+)E", mangled)
            return f"{match[2]}<{', '.join(values)}>"
    raise AssertionError(mangled)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles_and_spills_nothing(capability, tmp_path):
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc: put it on PATH or set CUDACXX")
    flags = ["-std=c++17", "-O3", "-Xptxas", "-v"]
    flags += [f"-gencode=arch=compute_{capability},code=sm_{capability}"]
    texts = compiled(
        [[nvcc, *flags, "-c", str(f), "-o", str(tmp_path / f"{f.stem}.o")] for f in SOURCES]
    )
    spilling, found = [], 0
    for source, text in zip(SOURCES, texts, strict=True):
        entries = re.findall(
            r"entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers",
            text,
            re.DOTALL,
        )
        for mangled, spills, registers in entries:
            line = f"{source.stem} {kernel_name(mangled)}"
            print(f"sm_{capability} {line}: {registers} registers, {spills} bytes spilled")
            spilling += [line] if int(spills) else []
            found += 1
    assert found >= 40 and spilling == []


@pytest.mark.gpu
def test_kernels_are_captured_in_a_graph(on_gpu):
    """Every launch in one CUDA graph; replayed with new inputs it gives what calls give."""
    kernels, device = on_gpu
    args, _ = space(3000, 500, 16, device=device)
    c = awkward.normal(3, 500, seed=1).to(device)
    x, base, A, B = (t.to(device) for t in adapters(3, 3, 2, torch.bfloat16))
    weights, As, Bs = modules(1, torch.bfloat16, SIZES, device)
    outs = [torch.empty_like(w) for w in weights]
    table, tiles = module_table(outs, weights, As, Bs, device)
    w, again, stepped = (torch.empty(3, n, device=device) for n in (3000, 500, 3000))
    y, s, dA = torch.empty_like(base), torch.empty(3, 37, 2, device=device), torch.empty_like(A)

    def calls() -> list[torch.Tensor]:
        kernels.reconstruct(c, *args, w)
        kernels.project(w, *args, True, again)
        kernels.edit(w, args[1], 0.5, stepped)
        kernels.low_rank(base, x, A, B, None, 1.0, y, s)
        kernels.outer(s, x, None, 1.0, dA)
        kernels.merge((outs[0], weights[0], As[0], Bs[0]), table, tiles, 1, 1.0, False)
        return [t.clone() for t in (w, again, stepped, y, dA, *outs)]

    calls()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = calls()
    for t in (c, x, As[0]):
        t.mul_(-2)
    graph.replay()
    assert all(torch.equal(p, q) for p, q in zip(captured, calls(), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_basis_of_more_than_2_to_the_31_numbers(on_gpu, bits):
    """The last rows of a basis, where 32-bit offsets would have gone round."""
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("less than 12 GiB of free GPU memory")
    kernels, m = on_gpu[0], 10_000
    d = (1 << (33 if bits == 4 else 32)) // m + 100
    (rows, mean, std, row_scale), exact = space(100, m, bits, device="cuda")
    basis = torch.zeros(d, rows.shape[1], dtype=rows.dtype, device="cuda")
    basis[-100:] = rows
    long = [None if t is None else torch.ones(d, device="cuda") for t in (mean, std, row_scale)]
    for t, values in zip(long, (mean, std, row_scale), strict=True):
        if t is not None:
            t[-100:] = values
    c = awkward.normal(2, m, seed=1)
    out = torch.empty(2, d, device="cuda")
    kernels.reconstruct(c.cuda(), basis, *long, out)
    short = check_reconstruct(on_gpu, c, [rows, mean, std, row_scale], exact)
    assert torch.equal(out[:, -100:], short)
    back, w = torch.empty(2, m, device="cuda"), out.clone()
    w[:, :-100] = 1
    kernels.project(w, basis, *long, True, back)
    want = oracle.project(w[:, -100:], exact, mean, std)
    assert_close("c", back, want, 1e-4 * float(np.abs(want).max()))
