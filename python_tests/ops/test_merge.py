"""merge: W' = W + scale * B A, rounded once, from pristine weights; every backend alike."""

import awkward
import numpy as np
import oracle
import pytest
import torch

from w2w_fast import ops
from w2w_fast.errors import InputError
from w2w_fast.ops.merge import _table
from w2w_fast.testing import allowed, assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(7, 33), (64, 64), (1, 1), (65, 128), (130, 8)]
pytestmark = pytest.mark.usefixtures("poisoned")


def inputs(r, wide=(33, 7), dtype=torch.float32, seed=0):
    shapes = [(wide[1], wide[0]), (r, wide[0]), (wide[1], r)]
    return [awkward.normal(*s, seed=seed + i, dtype=dtype) for i, s in enumerate(shapes)]


def modules(r, dtype, sizes=SIZES, seed=0):
    """Weights, and A and B as views of one flat float32 adapter, as reconstruct leaves them."""
    weights = [awkward.normal(*size, seed=seed + i, dtype=dtype) for i, size in enumerate(sizes)]
    flat = awkward.normal(sum(r * (n + k) for n, k in sizes), seed=seed + 99)
    A, B, at = [], [], 0
    for n, k in sizes:
        A.append(flat[at : at + r * k].view(r, k))
        B.append(flat[at + r * k : at + r * (n + k)].view(n, r))
        at += r * (n + k)
    return weights, A, B


def check(got, weight, A, B, scale):
    want = oracle.merge(weight, A, B, scale)
    plain = weight + scale * (B @ A).to(weight.dtype)
    assert got.dtype == weight.dtype
    terms = oracle.merge(weight.abs(), A.abs(), B.abs(), scale)
    assert_close("W'", got, want, allowed(plain, want, terms))


@pytest.mark.parametrize("r", [1, 2, 4, 16])
@pytest.mark.parametrize("wide", [(1, 1), (7, 8), (8, 7), (320, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_oracle(backend, r, wide, dtype):
    args = inputs(r, wide, dtype, seed=r)
    check(ops.merge(*args, 1.7), *args, 1.7)
    check(ops.merge(*args, 1.7, out=torch.empty_like(args[0])), *args, 1.7)


@pytest.mark.parametrize("r", [1, 2, 4, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_modules_round_once(backend, r, dtype):
    weights, A, B = modules(r, dtype)
    outs = ops.merge(weights, A, B, 1.7)
    for out, w, a, b in zip(outs, weights, A, B, strict=True):
        want = oracle.merge(w, a, b, 1.7)
        terms = oracle.merge(w.abs(), a.abs(), b.abs(), 1.7).max()
        rounding = torch.finfo(dtype).eps / 2 * np.abs(want).max()
        assert_close("W'", out, want, float(rounding + 4 * torch.finfo(torch.float32).eps * terms))


def test_scale_zero_restores_bit_for_bit(backend):
    for dtype in DTYPES:
        weights, A, B = modules(2, dtype)
        outs = ops.merge(weights, A, B, 1.0)
        ops.merge(weights, A, B, 0.0, outs)
        assert all(torch.equal(out, w) for out, w in zip(outs, weights, strict=True))


def test_the_next_identity_of_a_layout_finds_its_table(backend):
    sizes = [(64, 64), (65, 128), (130, 8)]
    weights, A, B = modules(1, torch.bfloat16, sizes)
    outs = ops.merge(weights, A, B)
    first, misses = [out.clone() for out in outs], _table.cache_info().misses
    _, A2, B2 = modules(1, torch.bfloat16, sizes, seed=5)
    ops.merge(weights, A2, B2, 1.0, outs)
    assert not torch.equal(outs[0], first[0])
    ops.merge(weights, A, B, 1.0, outs)
    assert all(torch.equal(p, q) for p, q in zip(outs, first, strict=True))
    assert _table.cache_info().misses == misses, "the same layout, the same table"


def test_writes_only_its_rows(backend):
    """Weights in the middle of a larger tensor of 7: nothing around them is written."""
    weights, A, B = modules(1, torch.float32, [(5, 9), (66, 7)])
    around = [torch.full((n + 2, k), 7.0, device=awkward.DEVICE) for n, k in [(5, 9), (66, 7)]]
    outs = ops.merge(weights, A, B, 1.0, [t[1:-1] for t in around])
    for t, out, w, a, b in zip(around, outs, weights, A, B, strict=True):
        assert (t[0] == 7).all() and (t[-1] == 7).all()
        check(out, w, a, b, 1.0)


@pytest.mark.parametrize("view", awkward.VIEWS)
def test_any_strides(view):
    args = [view(t) for t in inputs(2)]
    check(ops.merge(*args), *args, 1.0)
    check(ops.merge(*args, out=torch.zeros(7, 33)), *args, 1.0)


def test_adapters_of_any_strides(backend):
    for view in awkward.VIEWS:
        weight, A, B = inputs(2)
        A, B = view(A), view(B)
        check(ops.merge(weight, A, B), weight, A, B, 1.0)


def test_narrow_weight_and_wide_adapter_round_once(backend):
    weight, A, B = inputs(4)
    weight = weight.bfloat16()
    exact = oracle.merge(weight, A, B, 0.3)
    got = ops.merge(weight, A, B, 0.3).double()
    assert_close("W'", got, exact, float(torch.finfo(torch.bfloat16).eps / 2 * abs(exact).max()))


def test_gradient():
    args = [t.requires_grad_() for t in inputs(2, (5, 4), torch.float64)]
    assert torch.autograd.gradcheck(lambda *a: ops.merge(*a, 0.7), args)


def test_ten_thousand_swaps_leave_no_drift():
    pristine, A, B = inputs(1, dtype=torch.bfloat16)
    weight, first = pristine.clone(), ops.merge(pristine, A, B, 1.0)
    for i in range(10_000):
        ops.merge(pristine, A, B, 1.0 + i % 7, out=weight)
    assert torch.equal(ops.merge(pristine, A, B, 1.0, out=weight), first)
    assert torch.equal(ops.merge(pristine, A, B, 0.0, out=weight), pristine)


def test_nan_propagates(backend):
    weight, A, B = inputs(1)
    A[0, 3] = torch.nan
    got = ops.merge(weight, A, B)
    assert got[:, 3].isnan().all() and int(got.isnan().sum()) == len(weight)


def test_opcheck(backend):
    weights, A, B = modules(1, torch.float32, [(4, 8), (3, 5)])
    outs = [torch.zeros_like(w) for w in weights]
    torch.library.opcheck(torch.ops.w2w_fast.merge_.default, (outs, weights, A, B, 1.5))


def test_no_modules_and_empty_ones(backend):
    assert ops.merge([], [], []) == []
    weight, A, B = inputs(1, (0, 7))
    assert ops.merge([weight], [A], [B])[0].shape == (7, 0)


@pytest.mark.parametrize(
    ("position", "replace", "message"),
    [
        (0, torch.zeros(33), r"weight: wanted \[out, in\]"),
        (1, torch.zeros(1, 34), r"A: wanted \[r, in\] with r = 1, in = 33"),
        (2, torch.zeros(7, 2), r"B: wanted \[out, r\] with out = 7, r = 1"),
    ],
)
def test_refuses(position, replace, message):
    args = inputs(1)
    args[position] = replace
    with pytest.raises(InputError, match=message):
        ops.merge(*args)
    with pytest.raises(InputError, match=rf"{message[0]}\w*\[0\]: wanted"):
        ops.merge(*([t] for t in args))


def test_refuses_to_overwrite_the_pristine_weight():
    weight, A, B = inputs(1)
    with pytest.raises(InputError, match="pristine"):
        ops.merge(weight, A, B, out=weight)
    with pytest.raises(InputError, match=r"out: wanted \[7, 33\]"):
        ops.merge(weight, A, B, out=torch.zeros(7, 32))
    with pytest.raises(InputError, match="B: wanted 1 tensors, got 2"):
        ops.merge([weight], [A], [B, B])
    with pytest.raises(InputError, match="contiguous weights of one dtype"):
        ops.merge(weight.mT.contiguous().mT, A, B, out=weight.clone(), backend="native")
