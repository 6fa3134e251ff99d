"""adapted_linear and low_rank: one adapter a sample, against the oracle."""

import awkward
import oracle
import pytest
import torch

from w2w_fast import ops
from w2w_fast.errors import InputError
from w2w_fast.ops.adapted_linear import adapted_linear_reference
from w2w_fast.testing import allowed, assert_close


def inputs(b, r, k=None, t=5, wide=(6, 9), dtype=torch.float32, seed=0):
    k = b if k is None else k
    shapes = [(b, t, wide[0]), (wide[1], wide[0]), (wide[1],), (k, r, wide[0]), (k, wide[1], r)]
    return [awkward.normal(*s, seed=seed + i, dtype=dtype) for i, s in enumerate(shapes)]


def check(got, x, weight, bias, A, B, scale):
    want = oracle.adapted_linear(x, weight, bias, A, B, scale)
    plain = adapted_linear_reference(x, weight, bias, A, B, scale)
    assert got.dtype == x.dtype
    assert_close("y", got, want, allowed(plain, want))


@pytest.mark.parametrize("r", [1, 2, 4, 16])
@pytest.mark.parametrize("b", [1, 3, 16, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_oracle(b, r, dtype):
    for k in {1, b}:
        x, weight, bias, A, B = inputs(b, r, k, dtype=dtype, seed=b + r)
        check(ops.adapted_linear(x, weight, bias, A, B, 0.5), x, weight, bias, A, B, 0.5)
        scale = awkward.normal(b, seed=7)
        want = oracle.low_rank(x, A, B, scale)
        plain = (x @ A.mT) @ (B * scale[:, None, None].to(dtype)).mT
        assert_close("delta", ops.low_rank(x, A, B, scale), want, allowed(plain, want))


@pytest.mark.parametrize("view", awkward.VIEWS)
@pytest.mark.parametrize("r", [1, 4])
def test_any_strides(view, r):
    args = [view(t) for t in inputs(3, r)]
    check(ops.adapted_linear(*args, 2.0), *args, 2.0)


@pytest.mark.parametrize("t", [1, 7, 77])
def test_empty_batch_and_odd_lengths(t):
    args = inputs(2, 1, t=t, wide=(1, 3))
    check(ops.adapted_linear(*args), *args, 1.0)
    x, _, _, A, B = inputs(0, 2, t=t)
    assert ops.low_rank(x, A, B).shape == (0, t, 9)


@pytest.mark.parametrize("r", [1, 3])
@pytest.mark.parametrize("k", [1, 4])
def test_gradient_of_everything(r, k):
    args = [t.requires_grad_() for t in inputs(4, r, k, dtype=torch.float64)]
    scale = awkward.normal(4, seed=3, dtype=torch.float64)
    for s in (2.0, scale):
        assert torch.autograd.gradcheck(lambda *a, s=s: ops.adapted_linear(*a, s), args)


@pytest.mark.parametrize("r", [1, 4])
def test_float32_gradients_equal_oracle(r):
    x, weight, bias, A, B = (t.requires_grad_() for t in inputs(8, r, t=33))
    g = awkward.normal(8, 33, 9, seed=11)
    ops.adapted_linear(x, weight, bias, A, B, 3.0).backward(g)
    wide = [t.detach().double() for t in (x, A, B)]
    s, u = wide[0] @ wide[1].mT, g.double() @ wide[2] * 3
    wants = {"dx": g.double() @ weight.detach().double() + u @ wide[1], "dA": u.mT @ wide[0],
             "dB": 3 * g.double().mT @ s}  # fmt: skip
    for (name, want), got in zip(wants.items(), (x, A, B), strict=True):
        assert_close(name, got.grad, want, 4e-6 * float(want.abs().max()))


def test_frozen_parts_get_no_gradient():
    x, _, _, A, B = inputs(4, 1)
    B.requires_grad_()
    ops.low_rank(x, A, B).sum().backward()
    assert B.grad is not None and A.grad is None and x.grad is None
    x.requires_grad_()
    ops.low_rank(x, A, B.detach()).sum().backward()
    assert_close("dx", x.grad, (B.detach().sum(1, keepdim=True) * A).expand_as(x), 1e-5)


def test_under_autocast_it_answers_as_the_linear_does():
    x, weight, bias, A, B = (t.requires_grad_() for t in inputs(4, 1, t=64))
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.adapted_linear(x, weight, bias, A, B)
    y.float().square().mean().backward()
    want = oracle.adapted_linear(x, weight, bias, A, B, 1.0)
    assert_close("y", y, want, 0.05 * abs(want).max())
    assert all(t.grad.dtype == torch.float32 for t in (x, weight, bias, A, B))


def test_nan_stays_in_its_row():
    x, weight, bias, A, B = inputs(3, 1)
    B[1, 2, 0] = torch.nan
    y = ops.adapted_linear(x, weight, bias, A, B)
    assert y[1, :, 2].isnan().all() and int(y.isnan().sum()) == y.shape[1]
    A[2, 0, 0] = torch.inf
    assert not ops.adapted_linear(x, weight, bias, A, B)[2].isfinite().any()


@pytest.mark.parametrize(
    ("position", "replace", "message"),
    [
        (3, torch.zeros(2, 1, 6), r"A: wanted \[b, r, in\] with b = 3"),
        (3, torch.zeros(3, 2, 6), r"B: wanted \[b, out, r\] with b = 3, out = 9, r = 2|out, r"),
        (4, torch.zeros(3, 8, 1), r"B: wanted \[k, out, r\] with .*out = 9.*got \[3, 8, 1\]"),
        (1, torch.zeros(9, 7), r"weight: wanted \[out, in\]"),
        (0, torch.zeros(3, 6), r"x: wanted \[b, t, in\]"),
    ],
)
def test_refuses(position, replace, message):
    args = inputs(3, 1)
    args[position] = replace
    with pytest.raises(InputError, match=message):
        ops.adapted_linear(*args)


def test_refuses_a_scale_of_another_length():
    x, _, _, A, B = inputs(3, 1)
    with pytest.raises(InputError, match=r"scale: wanted a number or \[3\]"):
        ops.low_rank(x, A, B, torch.ones(2))
