"""edit: w' = w + amount * delta, against the oracle; every backend alike."""

import awkward
import oracle
import pytest
import torch

from w2w_fast import ops
from w2w_fast.errors import InputError
from w2w_fast.testing import allowed, assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.usefixtures("poisoned")


def check(got, w, delta, amount):
    want = oracle.edit(w, delta, amount)
    plain = w + torch.as_tensor(amount, device=w.device).to(w.dtype)[..., None] * delta
    assert got.dtype == w.dtype
    assert_close("w'", got, want, allowed(plain.to(w.dtype), want))


@pytest.mark.parametrize("d", [1, 7, 8, 1000, 5000])
@pytest.mark.parametrize("k", [0, 1, 3, 16, 33])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_oracle(backend, k, d, dtype):
    w = awkward.normal(k, d, seed=1, dtype=dtype)
    amounts = awkward.normal(k, seed=2, dtype=dtype)
    for delta in (awkward.normal(d, seed=3, dtype=dtype), awkward.normal(d, seed=4)):
        for amount in (1.5, -2, amounts):
            check(ops.edit(w, delta, amount), w, delta, amount)


@pytest.mark.parametrize("view", awkward.VIEWS)
def test_any_strides(backend, view):
    w, delta = view(awkward.normal(5, 7, seed=1)), view(awkward.normal(7, seed=2))
    check(ops.edit(w, delta, 0.5), w, delta, 0.5)
    assert torch.equal(ops.edit(w, delta, 0.0), w)


@pytest.mark.parametrize("view", awkward.VIEWS)
def test_a_delta_for_each(view):
    w, delta = view(awkward.normal(5, 7, seed=1)), view(awkward.normal(5, 7, seed=2))
    check(ops.edit(w, delta, 0.5), w, delta, 0.5)
    with pytest.raises(InputError, match=r"one delta \[d\] for all"):
        ops.edit(w, delta, 0.5, backend="native")


def test_a_list_of_amounts_and_gradients():
    w = awkward.normal(2, 3, seed=1, dtype=torch.float64).requires_grad_()
    delta = awkward.normal(3, seed=2, dtype=torch.float64).requires_grad_()
    amount = torch.tensor([0.5, -1.0], dtype=torch.float64, requires_grad=True)
    assert torch.equal(ops.edit(w, delta, [0.5, -1.0]), ops.edit(w, delta, amount))
    assert torch.equal(ops.edit(w, delta, torch.tensor(2)), ops.edit(w, delta, 2.0))
    assert torch.autograd.gradcheck(ops.edit, (w, delta, amount))
    assert torch.autograd.gradcheck(lambda w, v: ops.edit(w, v, 2.0), (w, delta))


def test_there_and_back_and_nan(backend):
    w, delta = awkward.normal(2, 3, seed=1), awkward.normal(3, seed=2)
    assert_close("w", ops.edit(ops.edit(w, delta, 2.0), delta, -2.0), w, 1e-6)
    got = ops.edit(w, delta, [torch.nan, 1.0])
    assert got[0].isnan().all() and got[1].isfinite().all()


def test_a_step_of_coefficients_is_a_step_of_adapters(backend):
    basis, mean, std, scale, _ = awkward.space(70, 9, 16)
    c, v = awkward.normal(3, 9, seed=5), awkward.normal(9, seed=6)
    delta = ops.reconstruct(v[None], basis, None, std, **scale)[0]
    want = ops.reconstruct(ops.edit(c, v, 1.5), basis, mean, std, **scale)
    got = ops.edit(ops.reconstruct(c, basis, mean, std, **scale), delta, 1.5)
    assert_close("w", got, want, 1e-5)


def test_opcheck(backend):
    w = awkward.normal(3, 9, seed=1).requires_grad_()
    delta, amounts = awkward.normal(9, seed=2), awkward.normal(3, seed=3)
    edit = torch.ops.w2w_fast.edit.default
    torch.library.opcheck(edit, (w, delta.requires_grad_(), amounts.requires_grad_(), 1.0))
    torch.library.opcheck(edit, (w, delta, None, -2.0))


@pytest.mark.parametrize(
    ("delta", "amount", "message"),
    [
        (torch.zeros(4), 1.0, r"delta: wanted \[d\] with d = 3, got \[4\]"),
        (torch.zeros(1, 3), 1.0, r"delta: wanted \[k, d\] with k = 2"),
        (torch.zeros(3), [1.0, 2.0, 3.0], r"amount: wanted a number or \[2\]"),
        (torch.zeros(3, dtype=torch.int64), 1.0, "delta: wanted a floating-point"),
    ],
)
def test_refuses(delta, amount, message):
    with pytest.raises(InputError, match=message):
        ops.edit(torch.zeros(2, 3), delta, amount)
