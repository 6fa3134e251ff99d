"""project: c = ((w - mean) / std) V, against the oracle."""

import awkward
import oracle
import pytest
import torch

from w2w_fast import ops
from w2w_fast.errors import InputError
from w2w_fast.testing import allowed, assert_close

DTYPES = [torch.float32, torch.bfloat16]


def inputs(k, m, d, dtype=torch.float32, seed=0):
    w, mean = awkward.normal(k, d, seed=seed), awkward.normal(d, seed=seed + 1)
    std = awkward.normal(d, seed=seed + 2).abs() + 0.1
    std[::3] = 0
    return w, awkward.normal(d, m, seed=seed + 3, dtype=dtype), mean, std


def check(got, w, basis, mean, std):
    want = oracle.project(w, basis, mean, std)
    z = torch.where(std > 0, (w.float() - mean) / std, 0)
    assert got.dtype == torch.float32
    assert_close("c", got, want, allowed(z @ basis.float(), want))


@pytest.mark.parametrize("m", [1, 7, 8, 1000])
@pytest.mark.parametrize("k", [0, 1, 3, 16, 33])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_oracle(k, m, dtype):
    args = inputs(k, m, 61, dtype, seed=k + m)
    check(ops.project(*args), *args)


@pytest.mark.parametrize("view", awkward.VIEWS)
def test_any_strides(view):
    args = [view(t) for t in inputs(5, 7, 33)]
    check(ops.project(*args), *args)


def test_narrow_adapters_are_widened_not_the_result_narrowed():
    w, *rest = inputs(3, 7, 33)
    w = w.bfloat16()
    check(ops.project(w, *rest), w, *rest)


def test_blocks_of_a_wide_basis_join(monkeypatch):
    monkeypatch.setattr("w2w_fast.ops._basis._BLOCK_NUMBERS", 64)
    args = inputs(3, 7, 61, torch.bfloat16)
    check(ops.project(*args), *args)


def test_gradient():
    args = [t.double() for t in inputs(3, 5, 20)]
    w = args[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda w: ops.project(w, *args[1:]), (w,))


def test_undoes_reconstruct_for_an_orthonormal_basis():
    c, mean = awkward.normal(4, 6, seed=1), awkward.normal(50, seed=2)
    std = awkward.normal(50, seed=3).abs() + 0.1
    basis = torch.linalg.qr(awkward.normal(50, 6, seed=4))[0]
    back = ops.project(ops.reconstruct(c, basis, mean, std), basis, mean, std)
    assert_close("c", back, c, 1e-5)


def test_fixed_coordinates_add_nothing_and_poison_shows():
    w, basis, mean, std = inputs(3, 7, 33)
    moved = w.clone()
    moved[:, ::3] += 100
    args = basis, mean, std
    assert torch.equal(ops.project(moved, *args), ops.project(w, *args))
    for value in (torch.nan, torch.inf):
        for column in (0, 1):  # a fixed coordinate and a free one
            bad = w.clone()
            bad[1, column] = value
            c = ops.project(bad, *args)
            assert not c[1].isfinite().any() and c[0].isfinite().all()


@pytest.mark.parametrize(
    ("position", "replace", "message"),
    [
        (0, torch.zeros(3, 34), r"basis: wanted \[d, m\] with d = 34"),
        (1, torch.zeros(33), r"basis: wanted \[d, m\]"),
        (3, torch.ones(33, requires_grad=True), "are constants"),
    ],
)
def test_refuses(position, replace, message):
    args = list(inputs(3, 7, 33))
    args[position] = replace
    with pytest.raises(InputError, match=message):
        ops.project(*args)
