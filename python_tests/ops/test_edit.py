"""edit: c' = c + amount * direction, against the oracle."""

import awkward
import oracle
import pytest
import torch

from w2w_fast import ops
from w2w_fast.errors import InputError
from w2w_fast.testing import allowed, assert_close


@pytest.mark.parametrize("m", [1, 7, 8, 1000])
@pytest.mark.parametrize("k", [0, 1, 3, 16, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_oracle(k, m, dtype):
    c = awkward.normal(k, m, seed=1, dtype=dtype)
    amounts = awkward.normal(k, seed=2, dtype=dtype)
    for direction in (awkward.normal(m, seed=3, dtype=dtype), c.flip(0)):
        for amount in (1.5, -2, amounts):
            got, want = ops.edit(c, direction, amount), oracle.edit(c, direction, amount)
            plain = c + torch.as_tensor(amount).to(dtype)[..., None] * direction
            assert got.dtype == dtype
            assert_close("c'", got, want, allowed(plain, want))


@pytest.mark.parametrize("view", awkward.VIEWS)
def test_any_strides(view):
    c, direction = view(awkward.normal(5, 7, seed=1)), view(awkward.normal(5, 7, seed=2))
    want = oracle.edit(c, direction, 0.5)
    assert_close("c'", ops.edit(c, direction, 0.5), want, allowed(c + direction / 2, want))


def test_a_list_of_amounts_and_gradients():
    c = awkward.normal(2, 3, seed=1, dtype=torch.float64).requires_grad_()
    direction = awkward.normal(3, seed=2, dtype=torch.float64).requires_grad_()
    amount = torch.tensor([0.5, -1.0], dtype=torch.float64, requires_grad=True)
    assert torch.equal(ops.edit(c, direction, [0.5, -1.0]), ops.edit(c, direction, amount))
    assert torch.autograd.gradcheck(ops.edit, (c, direction, amount))


def test_there_and_back_and_nan():
    c, direction = awkward.normal(2, 3, seed=1), awkward.normal(3, seed=2)
    assert_close("c", ops.edit(ops.edit(c, direction, 2.0), direction, -2.0), c, 1e-6)
    got = ops.edit(c, direction, [torch.nan, 1.0])
    assert got[0].isnan().all() and got[1].isfinite().all()


@pytest.mark.parametrize(
    ("direction", "amount", "message"),
    [
        (torch.zeros(4), 1.0, r"direction: wanted \[m\] with m = 3, got \[4\]"),
        (torch.zeros(1, 3), 1.0, r"direction: wanted \[k, m\] with k = 2"),
        (torch.zeros(3), [1.0, 2.0, 3.0], r"amount: wanted a number or \[2\]"),
        (torch.zeros(3, dtype=torch.int64), 1.0, "direction: wanted a floating-point"),
    ],
)
def test_refuses(direction, amount, message):
    with pytest.raises(InputError, match=message):
        ops.edit(torch.zeros(2, 3), direction, amount)
