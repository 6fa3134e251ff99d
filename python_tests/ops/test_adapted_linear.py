"""adapted_linear and low_rank: one adapter a sample, against the oracle; every backend alike."""

from importlib import import_module

import awkward
import numpy as np
import oracle
import pytest
import torch

from w2w_fast import ops
from w2w_fast.errors import InputError
from w2w_fast.ops.adapted_linear import adapted_linear_reference, add_low_rank
from w2w_fast.testing import allowed, assert_close

module = import_module("w2w_fast.ops.adapted_linear")  # its name is also the function's
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.usefixtures("poisoned")


def inputs(b, r, k=None, t=5, wide=(6, 9), dtype=torch.float32, seed=0):
    k = b if k is None else k
    shapes = [(b, t, wide[0]), (wide[1], wide[0]), (wide[1],), (k, r, wide[0]), (k, wide[1], r)]
    return [awkward.normal(*s, seed=seed + i, dtype=dtype) for i, s in enumerate(shapes)]


def check(got, x, weight, bias, A, B, scale):
    want = oracle.adapted_linear(x, weight, bias, A, B, scale)
    plain = adapted_linear_reference(x, weight, bias, A, B, scale)
    assert got.dtype == x.dtype
    assert_close("y", got, want, allowed(plain, want))


def check_both_ways(backend, x, A, B, index, scale, g, base):
    """The term added to base, and its gradients: sums in float32, each result rounded once.

    Plain torch rounds s and u to its dtype in between, and is allowed that.
    """
    leaves = [t.detach().requires_grad_() for t in (x, A, B)]
    scales, number = (scale, 1.0) if isinstance(scale, torch.Tensor) else (None, scale)
    y = add_low_rank(base, *leaves, index, scales, number)
    grads = torch.autograd.grad(y, leaves, g)
    *wants, delta = oracle.low_rank_gradients(g, x, A, B, index, scale)
    magnitudes = oracle.low_rank_gradients(
        *(t.abs() for t in (g, x, A, B)), index, torch.as_tensor(scale).abs()
    )
    narrow = torch.finfo(x.dtype if backend == "torch" else torch.float32).eps
    pairs = zip(
        ("dx", "dA", "dB", "y"), (*grads, y), (*wants, delta + oracle.f64(base)), strict=True
    )
    for (name, got, want), terms in zip(pairs, magnitudes, strict=True):
        rounding = torch.finfo(got.dtype).eps / 2 * np.abs(want).max(initial=0)
        assert_close(name, got, want, float(rounding + 4 * narrow * terms.max(initial=0)))
    return y, grads


@pytest.mark.parametrize("r", [1, 2, 4, 16])
@pytest.mark.parametrize("b", [1, 3, 16, 33])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_oracle(backend, b, r, dtype):
    for k in {1, b}:
        x, weight, bias, A, B = inputs(b, r, k, dtype=dtype, seed=b + r)
        check(ops.adapted_linear(x, weight, bias, A, B, 0.5), x, weight, bias, A, B, 0.5)
        scale = awkward.normal(b, seed=7)
        want = oracle.low_rank(x, A, B, scale)
        plain = (x @ A.mT) @ (B * scale[:, None, None].to(dtype)).mT
        assert_close("delta", ops.low_rank(x, A, B, scale), want, allowed(plain, want))


@pytest.mark.parametrize("r", [1, 2, 4, 16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adapters", ["one a sample", "one for all", "by index"])
def test_both_ways_equal_oracle(backend, r, dtype, adapters):
    index = torch.tensor([2, 0, 2], device=awkward.DEVICE)
    k, rows, scale = {
        "one a sample": (3, None, 0.5),
        "one for all": (1, None, awkward.normal(3, seed=8)),
        "by index": (4, index, awkward.normal(3, seed=9)),
    }[adapters]
    x, _, _, A, B = inputs(3, r, k, t=37, wide=(70, 41), dtype=dtype, seed=r + k)
    base, g = (awkward.normal(3, 37, 41, seed=s, dtype=dtype) for s in (6, 7))
    check_both_ways(backend, x, A, B, rows, scale, g, base)
    if rows is None and dtype != torch.float32:  # float32 adapters beside a model of 16 bits
        check_both_ways(backend, x, A.float(), B.float(), rows, scale, g, base)


@pytest.mark.parametrize("r", [1, 2, 16])
@pytest.mark.parametrize("scaled", ["number", "one a sample"])
@pytest.mark.parametrize("biased", [True, False])
def test_the_route_by_shape_equals_the_other(monkeypatch, r, scaled, biased):
    """Many rows of few numbers: weights are merged, sample by sample; the result is the same."""
    monkeypatch.delenv("W2W_BACKEND", raising=False)
    x, weight, bias, A, B = (t.cpu() for t in inputs(3, r, t=70, wide=(40, 69), seed=r))
    bias = bias if biased else None
    scale = 0.5 if scaled == "number" else awkward.normal(3, seed=7).cpu()
    assert module.route("cpu", x.dtype, 70, 40, 69) == "merged"
    with monkeypatch.context() as patch:
        patch.setattr(module, "add_low_rank", None)  # the other route would call it
        y = ops.adapted_linear(x, weight, bias, A, B, scale)
    want = oracle.adapted_linear(x, weight, 0 * x[0, 0, 0] if bias is None else bias, A, B, scale)
    plain = adapted_linear_reference(x, weight, bias, A, B, scale)
    assert_close("y", y, want, allowed(plain, want))
    assert_close("forced", ops.adapted_linear(x, weight, bias, A, B, scale, backend="torch"), want,
                 allowed(plain, want))  # fmt: skip
    leaf = A.clone().requires_grad_()
    ops.adapted_linear(x, weight, bias, leaf, B, scale).sum().backward()
    assert leaf.grad.abs().max() > 0


def test_routes_by_shape():
    route = module.route
    assert route("cpu", torch.float32, 1024, 320, 320) == "merged"
    assert route("cpu", torch.float32, 64, 1280, 1280) == "added"
    assert route("cpu", torch.float32, 77, 768, 320) == "added"
    assert route("cpu", torch.bfloat16, 4096, 320, 320) == "added"
    assert route("cuda", torch.float32, 4096, 320, 320) == "added"


@pytest.mark.parametrize("r", [1, 4])
@pytest.mark.parametrize("wide", [(64, 128), (3, 5), (320, 1)])
def test_other_widths(backend, r, wide):
    x, _, _, A, B = inputs(2, r, t=19, wide=wide, dtype=torch.bfloat16)
    base, g = (awkward.normal(2, 19, wide[1], seed=s, dtype=torch.bfloat16) for s in (6, 7))
    check_both_ways(backend, x, A, B, None, 2.0, g, base)


@pytest.mark.parametrize("view", awkward.VIEWS)
@pytest.mark.parametrize("r", [1, 4])
def test_any_strides(backend, view, r):
    args = [view(t) for t in inputs(3, r)]
    check(ops.adapted_linear(*args, 2.0), *args, 2.0)
    x, _, _, A, B = args
    base, g = (view(awkward.normal(3, 5, 9, seed=s)) for s in (6, 7))
    check_both_ways(backend, x, A, B, None, 2.0, g, base)


@pytest.mark.parametrize("t", [1, 7, 77, 300])
def test_empty_batch_and_odd_lengths(backend, t):
    args = inputs(2, 1, t=t, wide=(1, 3))
    check(ops.adapted_linear(*args), *args, 1.0)
    x, _, _, A, B = inputs(0, 2, t=t)
    assert ops.low_rank(x, A, B).shape == (0, t, 9)
    x, _, _, A, B = (v.requires_grad_() for v in inputs(2, 2, t=0))
    y = ops.low_rank(x, A, B)
    y.sum().backward()
    assert y.shape == (2, 0, 9) and not A.grad.any() and not B.grad.any()


@pytest.mark.parametrize("r", [1, 3])
@pytest.mark.parametrize("k", [1, 4])
def test_gradient_of_everything(r, k):
    args = [t.requires_grad_() for t in inputs(4, r, k, dtype=torch.float64)]
    scale = awkward.normal(4, seed=3, dtype=torch.float64)
    index = torch.tensor([0, k - 1, 0, k - 1])
    for s in (2.0, scale, scale.clone().requires_grad_()):
        for rows in (None, index):
            call = lambda *a, s=s, rows=rows: ops.adapted_linear(*a, s, index=rows)  # noqa: E731
            assert torch.autograd.gradcheck(call, args)
    wanted = scale.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: ops.adapted_linear(*args, s), (wanted,))


@pytest.mark.parametrize("r", [1, 4])
def test_gradients_are_the_same_bits_each_time(backend, r):
    x, _, _, A, B = (t.requires_grad_() for t in inputs(3, r, 2, t=300))
    g = awkward.normal(3, 300, 9, seed=11)
    index = torch.tensor([1, 0, 1], device=awkward.DEVICE)
    interpreted = backend == "triton" and awkward.DEVICE == "cpu"
    runs = [
        torch.autograd.grad(ops.low_rank(x, A, B, 3.0, index=index), (x, A, B), g)
        for _ in range(3 if interpreted else 20)
    ]
    assert all(torch.equal(p, q) for run in runs for p, q in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)])
def test_only_the_gradients_asked_for(backend, needs):
    x, _, _, A, B = inputs(4, 1, t=33)
    g = awkward.normal(4, 33, 9, seed=11)
    leaves = [t.requires_grad_(bool(n)) for t, n in zip((x, A, B), needs, strict=True)]
    ops.low_rank(*leaves, 3.0).backward(g)
    for leaf, need, want in zip(
        leaves, needs, oracle.low_rank_gradients(g, x, A, B, None, 3.0), strict=False
    ):
        assert (leaf.grad is not None) == bool(need)
        if need:
            assert_close("gradient", leaf.grad, want, 1e-5 * np.abs(want).max())


def test_under_autocast_it_answers_as_the_linear_does():
    x, weight, bias, A, B = (t.requires_grad_() for t in inputs(4, 1, t=64))
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.adapted_linear(x, weight, bias, A, B)
    y.float().square().mean().backward()
    want = oracle.adapted_linear(x, weight, bias, A, B, 1.0)
    assert_close("y", y, want, 0.05 * abs(want).max())
    assert all(t.grad.dtype == torch.float32 for t in (x, weight, bias, A, B))


@pytest.mark.parametrize("r", [1, 4])
def test_nan_stays_with_its_sample(backend, r):
    x, weight, bias, A, B = inputs(3, r)
    B[1, 2, 0] = torch.nan
    y = ops.adapted_linear(x, weight, bias, A, B)
    assert y[1, :, 2].isnan().all() and int(y.isnan().sum()) == y.shape[1]
    A[2, 0, 0] = torch.inf
    assert not ops.adapted_linear(x, weight, bias, A, B)[2].isfinite().any()


@pytest.mark.parametrize("r", [1, 2])
def test_opcheck(backend, r):
    x, _, _, A, B = (t.requires_grad_() for t in inputs(3, r, 2))
    index = torch.tensor([1, 0, 1], device=awkward.DEVICE)
    base, scales = awkward.normal(3, 5, 9, seed=6), awkward.normal(3, seed=7)
    low_rank = torch.ops.w2w_fast.low_rank.default
    torch.library.opcheck(low_rank, (base, x, A, B, index, scales, 1.0))
    torch.library.opcheck(low_rank, (None, x[:2], A, B, None, None, 0.5))
    s = low_rank(None, x, A, B, index, None, 1.0)[1]
    args = [t.detach() for t in (base, x, A, B, s)]
    backward = torch.ops.w2w_fast.low_rank_backward.default
    torch.library.opcheck(backward, (*args, index, scales, 1.0, [True, False, True]))


@pytest.mark.parametrize(
    ("argument", "replace", "message"),
    [
        ("A", torch.zeros(2, 1, 6), r"A: wanted \[b, r, in\] with b = 3"),
        ("A", torch.zeros(3, 2, 6), r"B: wanted \[b, out, r\] with b = 3, .*r = 2"),
        ("B", torch.zeros(3, 8, 1), r"B: wanted \[k, out, r\] with .*out = 9.*got \[3, 8, 1\]"),
        ("weight", torch.zeros(9, 7), r"weight: wanted \[out, in\]"),
        ("x", torch.zeros(3, 6), r"x: wanted \[b, t, in\]"),
        ("scale", torch.ones(2), r"scale: wanted a number or \[3\]"),
        ("index", torch.tensor([0, 1]), r"index: wanted int64 \[3\]"),
        ("index", torch.tensor([0, 3, 1]), r"index: wanted 0 to 2, got \[0, 3, 1\]"),
        ("index", torch.zeros(3), r"index: wanted int64 \[3\] on cpu, got torch.float32"),
    ],
)
def test_refuses(argument, replace, message):
    names = ("x", "weight", "bias", "A", "B")
    args = dict(zip(names, inputs(3, 1), strict=True)) | {argument: replace}
    with pytest.raises(InputError, match=message):
        ops.adapted_linear(**args)
