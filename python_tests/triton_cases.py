"""The Triton kernels against the float64 oracle; run by test_triton.py in a process of its own.

Whether kernels are interpreted is settled when triton is first imported, so not in a process that
other tests share. On a machine with a GPU the same cases run there.
"""

from __future__ import annotations

import awkward
import numpy as np
import oracle
import pytest
import torch

from w2w_fast.errors import InputError
from w2w_fast.kernels import _basis, adapted_linear, edit, merge, project, reconstruct
from w2w_fast.testing import allowed, assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = (torch.bfloat16, torch.float16)
pytestmark = pytest.mark.usefixtures("poisoned")


def on(t):
    """t on the device under test, strides kept there."""
    return t if t is None or DEVICE == "cpu" or not hasattr(t, "device") else t.to(DEVICE)


def normal(*shape, **kw):
    return on(awkward.normal(*shape, **kw))


def hollow(*shape, dtype=torch.float32):
    """(NaN rows to be written, the larger tensor of 7 around them)."""
    around = torch.full((*shape[:-1], shape[-1] + 9), 7.0, dtype=dtype, device=DEVICE)
    return around[..., 4:-5].fill_(torch.nan), around


def stored(d, m, bits, seed=0):
    """(stored basis, row_scale or None, the numbers they stand for in float64)."""
    generator = torch.Generator().manual_seed(seed)
    if bits >= 16:
        basis = awkward.normal(d, m, seed=seed, dtype={32: torch.float32, 16: torch.bfloat16}[bits])
        return on(basis), None, basis.double()
    top = 1 << (bits - 1)
    numbers = torch.randint(-top, top, (d, m), generator=generator, dtype=torch.int8)
    row_scale = awkward.normal(d, seed=seed + 1).abs() / top
    basis, exact = numbers, numbers.double() * row_scale.double()[:, None]
    if bits == 4:
        # The unused half of the last byte holds 15: nothing may come of it.
        nibbles = torch.full((d, m + m % 2), 15, dtype=torch.uint8)
        nibbles[:, :m] = (numbers + 8).to(torch.uint8)
        basis = nibbles[:, ::2] | nibbles[:, 1::2] << 4
    return on(basis), on(row_scale), exact


def space(d, m, bits, seed=0):
    basis, row_scale, exact = stored(d, m, bits, seed)
    std = normal(d, seed=seed + 2).abs() + 0.1  # else one term outweighs all others in a sum
    std[::5] = 0
    return (basis, normal(d, seed=seed + 3), std, row_scale), exact.to(DEVICE)


def check_reconstruct(c, args, exact):
    basis, mean, std, row_scale = args
    out, around = hollow(c.shape[0], exact.shape[0])
    reconstruct.reconstruct(c, basis, mean, std, row_scale, out)
    want = oracle.reconstruct(c, exact, mean, std)
    plain = mean + std * (c @ exact.float().mT)
    terms = mean.abs() + std * (c.abs() @ exact.float().abs().mT)
    assert_close("w", out, want, allowed(plain, want, terms.cpu()))
    assert (around[:, :4] == 7).all() and (around[:, -5:] == 7).all()
    return out


def check_contract(source, args, exact, mode):
    basis, mean, std, row_scale = args
    out = torch.full((source.shape[0], exact.shape[1]), torch.nan, device=DEVICE)
    project.contract(source, basis, mean, std, row_scale, mode, out)
    wide = source.float()
    if mode == "project":
        want = oracle.project(source, exact, mean, std)
        z = (wide - mean) / std.masked_fill(std == 0, torch.inf)
    else:
        want = oracle.reconstruct_grad(source, exact, std)
        z = wide * std
    terms = z.abs() @ exact.float().abs()
    assert_close(mode, out, want, allowed(z @ exact.float(), want, terms.cpu()))
    return out


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
@pytest.mark.parametrize("m", [0, 1, 7, 8, 1000])
@pytest.mark.parametrize("k", [0, 1, 3, 16, 33])
def test_reconstruct_and_its_contraction(k, m, bits):
    args, exact = space(75, m, bits, seed=k + m)
    out = check_reconstruct(normal(k, m, seed=5), args, exact)
    for dtype in HALF:
        narrow = hollow(*out.shape, dtype=dtype)[0]
        reconstruct.reconstruct(normal(k, m, seed=5), *args, narrow)
        assert torch.equal(narrow, out.to(dtype)), "rounded once, to nearest even"
    for mode in ("project", "backward"):
        check_contract(normal(k, 75, seed=6), args, exact, mode)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_many_parts_give_the_same_bits_each_time(k, bits):
    args, exact = space(600, 9, bits)
    shape = _basis.Shape(k, 600, 9, bits)
    assert _basis.splits(shape, _basis.blocks(shape, sums_over_d=True))[0] > 1
    for dtype in (torch.float32, *HALF):
        source = normal(k, 600, seed=4, dtype=dtype)
        first = check_contract(source, args, exact, "project")
    for _ in range(20 if (bits, k) == (16, 3) else 2):
        again = torch.empty_like(first)
        project.contract(source, *args, "project", again)
        assert torch.equal(again, first)


@pytest.mark.parametrize("view", awkward.VIEWS)
@pytest.mark.parametrize("k", [1, 5])
def test_any_strides_of_a_space(view, k):
    (basis, mean, std, _), _ = space(70, 21, 16)
    c, w, basis, mean, std = (
        view(t.cpu()).to(DEVICE)
        for t in (normal(k, 21, seed=1), normal(k, 70, seed=2), basis, mean, std)
    )
    args = (basis, mean, std, None)
    check_reconstruct(c, args, basis.double())
    check_contract(w, args, basis.double(), "project")


def test_a_row_is_the_same_whatever_shares_its_block():
    args, exact = space(70, 130, 16)
    c = normal(16, 130, seed=1)
    together, three = check_reconstruct(c, args, exact), check_reconstruct(c[:3], args, exact)
    assert torch.equal(together[:3], three)


@pytest.mark.parametrize("k", [1, 4])
def test_nan_and_infinities_reach_only_what_they_touch(k):
    args, exact = space(40, 19, 16)
    args[2].add_(1)
    args[1][20], args[2][21] = torch.inf, torch.nan
    c = normal(k, 19, seed=1)
    for value in (torch.nan, torch.inf, -torch.inf):
        c[0, 3] = value
        out = torch.empty(k, 40, device=DEVICE)
        reconstruct.reconstruct(c, *args, out)
        want = oracle.reconstruct(c, exact, args[1], args[2])
        assert_close("w", out, want, 1e-4)
    w = normal(k, 40, seed=2)
    w[0, 5] = torch.inf
    out, z = torch.empty(k, 19, device=DEVICE), oracle.f64(w) * oracle.f64(args[2])
    args[2][21] = 1
    z[:, 21] = oracle.f64(w)[:, 21]
    project.contract(w, *args, "backward", out)
    assert_close("c", out, z @ oracle.f64(exact), 1e-4)
    args[2][5] = 0  # fixed: an infinite number in it still shows
    project.contract(w, *args, "project", out)
    assert out[0].isnan().all()


def test_every_row_of_d_belongs_to_one_part():
    for d in (1, 63, 64, 1000, 99_648, 3_000_000):
        for m in (1, 1000, 10_000):
            for bits in (32, 16, 8, 4):
                shape = _basis.Shape(16, d, m, bits)
                block = _basis.blocks(shape, sums_over_d=True)
                parts, rows = _basis.splits(shape, block)
                assert (parts - 1) * rows < d <= parts * rows and rows % block.d == 0


def adapters(b, a, r, dtype, t=37, wide=(70, 41), seed=0):
    n_in, n_out = wide
    shapes = [(b, t, n_in), (b, t, n_out), (a, r, n_in), (a, n_out, r)]
    return [normal(*s, seed=seed + i, dtype=dtype) for i, s in enumerate(shapes)]


def gradients(g, x, A, B, index, scale):
    """(dx, dA, dB, forward's delta) in float64, a sample at a time."""
    g, x, A, B = map(oracle.f64, (g, x, A, B))
    scale = np.broadcast_to(oracle.f64(scale), len(x))
    dx, dA, dB, y = np.zeros_like(x), np.zeros_like(A), np.zeros_like(B), np.zeros_like(g)
    for i in range(len(x)):
        a = (i if len(A) > 1 else 0) if index is None else int(index[i])
        u, s = g[i] @ B[a], x[i] @ A[a].T
        dx[i], y[i] = scale[i] * u @ A[a], scale[i] * s @ B[a].T
        dA[a] += scale[i] * u.T @ x[i]
        dB[a] += scale[i] * g[i].T @ s
    return dx, dA, dB, y


def check_adapted(x, base, A, B, index, scale, g):
    """Both directions, against the oracle: summed in float32, each result rounded once."""
    dtype = x.dtype
    out = hollow(*base.shape, dtype=dtype)[0]
    s = adapted_linear.forward(base, x, A, B, index, scale, out)
    dx, dA, dB, y = gradients(g, x, A, B, index, scale)
    grads = adapted_linear.backward(g, x, A, B, s, index, scale, (True, True, True))
    wants = {"dx": dx, "dA": dA, "dB": dB, "y": y + oracle.f64(base)}
    magnitudes = gradients(*(t.abs() for t in (g, x, A, B)), index, torch.as_tensor(scale).abs())
    for (name, want), got, terms in zip(wants.items(), (*grads, out), magnitudes, strict=True):
        rounding = torch.finfo(got.dtype).eps / 2 * np.abs(want).max(initial=0)
        sums = 4 * torch.finfo(torch.float32).eps * terms.max(initial=0)
        assert_close(name, got, want, float(rounding + sums))
    return out, grads, s


@pytest.mark.parametrize("r", [1, 2, 4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_adapted_linear_equals_oracle(r, dtype):
    index = torch.tensor([2, 0, 2], device=DEVICE)
    for a, rows, scale in (
        (3, None, 0.5),
        (1, None, normal(3, seed=8)),
        (4, index, normal(3, seed=9)),
    ):
        x, base, A, B = adapters(3, a, r, dtype, seed=r + a)
        g = normal(*base.shape, seed=7, dtype=dtype)
        out, _, s = check_adapted(x, base, A, B, rows, scale, g)
        inplace = base.clone()
        adapted_linear.forward(inplace, x, A, B, rows, scale, inplace)
        assert torch.equal(inplace, out)
        both = adapted_linear.backward(g, x, A, B, s, rows, scale, (True, False, False), x)[0]
        alone = adapted_linear.backward(g, x, A, B, s, rows, scale, (True, False, False))[0]
        bound = 4 * torch.finfo(dtype).eps * float(both.float().abs().max() + 1)
        assert_close("dx", both.float(), x.float() + alone.float(), bound)


@pytest.mark.parametrize("view", awkward.VIEWS)
@pytest.mark.parametrize("r", [1, 4])
def test_any_strides_of_an_adapted_linear(view, r):
    x, base, A, B = (view(t.cpu()).to(DEVICE) for t in adapters(3, 3, r, torch.float32))
    g = view(awkward.normal(*base.shape, seed=7)).to(DEVICE)
    check_adapted(x, base, A, B, None, 2.0, g)


@pytest.mark.parametrize(("b", "t"), [(0, 5), (2, 0), (1, 1), (1, 300)])
def test_adapted_linear_of_odd_sizes(b, t):
    x, base, A, B = adapters(b, 1, 2, torch.float32, t, wide=(3, 5))
    check_adapted(x, base, A, B, None, 1.0, torch.ones_like(base))


@pytest.mark.parametrize("r", [1, 4])
def test_gradients_are_the_same_bits_each_time_and_only_those_asked_for(r):
    x, base, A, B = adapters(4, 2, r, torch.float32, t=300)
    index = torch.tensor([1, 0, 1, 1], device=DEVICE)
    s = adapted_linear.forward(None, x, A, B, index, 1.0, torch.empty_like(base))
    arguments = (base, x, A, B, s, index, 1.0)
    first = adapted_linear.backward(*arguments, (True, True, True))
    for _ in range(3):
        again = adapted_linear.backward(*arguments, (True, True, True))
        assert all(torch.equal(p, q) for p, q in zip(first, again, strict=True))
    for i in range(3):
        needs = tuple(j == i for j in range(3))
        alone = adapted_linear.backward(*arguments, needs)
        assert [t is not None for t in alone] == list(needs) and torch.equal(alone[i], first[i])


@pytest.mark.parametrize("r", [1, 4])
def test_nan_stays_with_its_sample(r):
    x, base, A, B = adapters(3, 3, r, torch.float32)
    index = torch.tensor([0, 2, 2], device=DEVICE)
    x[0, 0, 0] = torch.nan
    out = torch.empty_like(base)
    s = adapted_linear.forward(base, x, A, B, index, torch.ones(3, device=DEVICE), out)
    assert out[0, 0].isnan().all() and int(out.isnan().sum()) == out.shape[2]
    _, dA, dB = adapted_linear.backward(base, x, A, B, s, index, 1.0, (False, True, True))
    assert dA[0].isnan().any() and dB[0].isnan().all() and not dA[1].any() and not dB[1].any()
    assert dA[2].isfinite().all() and dB[2].isfinite().all()


SIZES = [(7, 33), (64, 64), (1, 1), (65, 128), (130, 8)]


def modules(r, dtype, sizes=SIZES, seed=0):
    """Weights, and A and B as views of one flat adapter, as reconstruct leaves them."""
    weights = [normal(*size, seed=seed + i, dtype=dtype) for i, size in enumerate(sizes)]
    flat = normal(sum(r * (n + k) for n, k in sizes), seed=seed + 99)
    A, B, at = [], [], 0
    for n, k in sizes:
        A.append(flat[at : at + r * k].view(r, k))
        B.append(flat[at + r * k : at + r * (n + k)].view(n, r))
        at += r * (n + k)
    return weights, A, B


@pytest.mark.parametrize("r", [1, 2, 4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_merge_equals_oracle(r, dtype):
    weights, A, B = modules(r, dtype)
    outs = [torch.empty_like(w) for w in weights]
    merge.merge(outs, weights, A, B, 1.7)
    for out, w, a, b in zip(outs, weights, A, B, strict=True):
        want = oracle.merge(w, a, b, 1.7)
        terms = oracle.merge(w.abs(), a.abs(), b.abs(), 1.7).max()
        rounding = torch.finfo(dtype).eps / 2 * np.abs(want).max()
        assert_close("W'", out, want, float(rounding + 4 * torch.finfo(torch.float32).eps * terms))
    merge.merge(outs, weights, A, B, 0.0)
    assert all(torch.equal(out, w) for out, w in zip(outs, weights, strict=True))


def test_merge_of_aligned_modules_and_the_next_identity():
    sizes = [(64, 64), (65, 128), (130, 8)]
    weights, A, B = modules(1, torch.bfloat16, sizes)
    outs = [torch.empty_like(w) for w in weights]
    merge.merge(outs, weights, A, B, 1.0)
    first, misses = [out.clone() for out in outs], merge._table.cache_info().misses
    _, A2, B2 = modules(1, torch.bfloat16, sizes, seed=5)
    merge.merge(outs, weights, A2, B2, 1.0)
    assert not torch.equal(outs[0], first[0])
    merge.merge(outs, weights, A, B, 1.0)
    assert all(torch.equal(p, q) for p, q in zip(outs, first, strict=True))
    assert merge._table.cache_info().misses == misses, "the same layout, the same table"


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("k", [0, 1, 3])
def test_edit_equals_oracle(k, dtype):
    w, delta = normal(k, 2500, seed=1, dtype=dtype), normal(2500, seed=2)
    for amount in (-1.5, normal(k, seed=3)):
        out = hollow(k, 2500, dtype=dtype)[0]
        edit.edit(w, delta, amount, out)
        want = oracle.edit(w, delta, amount)
        size = np.abs(want).max(initial=0)
        sums = 4 * torch.finfo(torch.float32).eps * (size + 10)
        assert_close("w'", out, want, float(torch.finfo(dtype).eps / 2 * size + sums))
        edit.edit(w, delta, 0.0, out)
        assert torch.equal(out, w)


def test_edit_of_one_adapter_for_all_rows_and_in_place():
    w, delta = normal(1, 99, seed=1).expand(4, 99), normal(99, seed=2)
    out = torch.empty(4, 99, device=DEVICE)
    edit.edit(w, delta, torch.arange(4.0, device=DEVICE), out)
    assert_close("w'", out, oracle.edit(w, delta, torch.arange(4.0)), 1e-5)
    want, again = out + delta, out.clone()
    edit.edit(again, delta, 1.0, again)
    assert_close("w'", again, want, 1e-6)


def refused(message, call, *args):
    with pytest.raises(InputError, match=message):
        call(*args)


def test_refuses_what_does_not_fit():
    (basis, mean, std, scale), _ = space(12, 5, 8)
    c, w = torch.zeros(2, 5, device=DEVICE), torch.zeros(2, 12, device=DEVICE)
    wide, narrow = w.new_zeros(2, 13), c[:, :4]
    call = reconstruct.reconstruct
    refused(r"row_scale: wanted a scale a row, got None", call, c, basis, mean, std, None, w)
    refused(r"basis: wanted 4 columns, got 5", call, narrow, basis, mean, std, scale, w)
    refused(r"basis: wanted .*got torch.float64", call, c, basis.double(), mean, std, scale, w)
    refused(r"out: wanted \[2, 12\].*got \[2, 13\]", call, c, basis, mean, std, scale, wide)
    refused(r"out: .*of torch.int8", call, c, basis, mean, std, scale, w.to(torch.int8))
    rows = w[:1].expand(2, 12)
    refused(r"out: wanted contiguous rows, none repeated", call, c, basis, mean, std, scale, rows)
    args = (w, basis, mean, std, scale)
    refused("mode: wanted project or backward, got up", project.contract, *args, "up", c)
    refused(r"out: wanted \[2, 5\] of float32", project.contract, *args, "project", c.half())

    x, base, A, B = adapters(3, 3, 2, torch.float32)
    ok, index = torch.empty_like(base), torch.tensor([0, 1, 2], device=DEVICE)
    call = adapted_linear.forward
    refused(r"A: wanted 1 or 3 adapters, got 2", call, base, x, A[:2], B[:2], None, 1.0, ok)
    refused(r"index: wanted contiguous \[3\]", call, base, x, A, B, index[:2], 1.0, ok)
    refused(r"scale: wanted a number or", call, base, x, A, B, index, torch.ones(2), ok)
    refused(r"B: wanted \[3, out, 2\]", call, base, x, A, B[:, :, :1], index, 1.0, ok)
    many = A.repeat(1, 9, 1)
    refused(r"A: wanted rank 1 to 16, got rank 18", call, base, x, many, B, None, 1.0, ok)
    refused(r"x: .*got torch.float64", call, base, x.double(), A, B, None, 1.0, ok)

    weights, A, B = modules(2, torch.float32, [(4, 6), (3, 5)])
    outs = [torch.empty_like(t) for t in weights]
    refused(r"outs\[0\]: wanted other memory", merge.merge, weights, weights, A, B, 1.0)
    refused(r"A: wanted 2 tensors, got 1", merge.merge, outs, weights, A[:1], B, 1.0)
    refused(r"A\[1\]: wanted contiguous \[2, 5\]", merge.merge, outs, weights, A[:1] * 2, B, 1.0)
    refused(r"amount: wanted a number or \[2\]", edit.edit, w, mean, torch.ones(3), w)
    refused(r"delta: wanted \[12\], got \[5\]", edit.edit, w, mean[:5], 1.0, w)
