"""merge: W' = W + scale * B A, rounded once, from pristine weights."""

import awkward
import oracle
import pytest
import torch

from w2w_fast import ops
from w2w_fast.errors import InputError
from w2w_fast.testing import allowed, assert_close


def inputs(r, wide=(33, 7), dtype=torch.float32, seed=0):
    shapes = [(wide[1], wide[0]), (r, wide[0]), (wide[1], r)]
    return [awkward.normal(*s, seed=seed + i, dtype=dtype) for i, s in enumerate(shapes)]


def check(got, weight, A, B, scale):
    want = oracle.merge(weight, A, B, scale)
    plain = weight + scale * (B @ A).to(weight.dtype)
    assert got.dtype == weight.dtype
    terms = oracle.merge(weight.abs(), A.abs(), B.abs(), scale)
    assert_close("W'", got, want, allowed(plain, want, terms))


@pytest.mark.parametrize("r", [1, 2, 4, 16])
@pytest.mark.parametrize("wide", [(1, 1), (7, 8), (8, 7), (320, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_oracle(r, wide, dtype):
    args = inputs(r, wide, dtype, seed=r)
    check(ops.merge(*args, 1.7), *args, 1.7)


@pytest.mark.parametrize("view", awkward.VIEWS)
def test_any_strides(view):
    args = [view(t) for t in inputs(2)]
    check(ops.merge(*args), *args, 1.0)


def test_narrow_weight_and_wide_adapter_round_once():
    weight, A, B = inputs(4)
    weight = weight.bfloat16()
    exact = torch.from_numpy(oracle.merge(weight, A, B, 0.3))
    got = ops.merge(weight, A, B, 0.3).double()
    assert_close("W'", got, exact, float(torch.finfo(torch.bfloat16).eps / 2 * exact.abs().max()))


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


def test_nan_propagates():
    weight, A, B = inputs(1)
    A[0, 3] = torch.nan
    got = ops.merge(weight, A, B)
    assert got[:, 3].isnan().all() and int(got.isnan().sum()) == len(weight)


@pytest.mark.parametrize(
    ("position", "replace", "message"),
    [
        (0, torch.zeros(33), r"weight: wanted \[out, in\]"),
        (1, torch.zeros(1, 34), r"A: wanted \[r, in\] with in = 33|with .*in = 33"),
        (2, torch.zeros(7, 2), r"B: wanted \[out, r\] with out = 7, r = 1"),
    ],
)
def test_refuses(position, replace, message):
    args = inputs(1)
    args[position] = replace
    with pytest.raises(InputError, match=message):
        ops.merge(*args)


def test_refuses_to_overwrite_the_pristine_weight():
    weight, A, B = inputs(1)
    with pytest.raises(InputError, match="pristine"):
        ops.merge(weight, A, B, out=weight)
    with pytest.raises(InputError, match=r"out: wanted \[7, 33\]"):
        ops.merge(weight, A, B, out=torch.zeros(7, 32))
