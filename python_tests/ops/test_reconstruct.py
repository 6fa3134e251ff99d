"""reconstruct: w = mean + std * (c V^T), against the oracle; native and torch alike."""

import awkward
import oracle
import pytest
import torch

from w2w_fast import ops
from w2w_fast.errors import InputError
from w2w_fast.ops import _dispatch
from w2w_fast.ops.reconstruct import reconstruct_reference
from w2w_fast.testing import allowed, assert_close

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=["torch", "native"])
def backend(request, monkeypatch):
    if request.param == "native" and _dispatch.native() is None:
        pytest.skip("the extension is not built")
    monkeypatch.setenv("W2W_BACKEND", request.param)
    return request.param


def inputs(k, m, d, dtype=torch.float32, seed=0):
    c, mean = awkward.normal(k, m, seed=seed), awkward.normal(d, seed=seed + 1)
    std = awkward.normal(d, seed=seed + 2).abs()
    std[::3] = 0
    return c, awkward.normal(d, m, seed=seed + 3, dtype=dtype), mean, std


def check(got, c, basis, mean, std, dtype):
    want = oracle.reconstruct(c, basis, mean, std)
    plain = (mean + std * (c @ basis.float().mT)).to(dtype)
    assert got.dtype == dtype
    assert_close("w", got, want, allowed(plain, want))


@pytest.mark.parametrize("m", [1, 7, 8, 1000])
@pytest.mark.parametrize("k", [0, 1, 3, 16, 33])
@pytest.mark.parametrize("basis_dtype", DTYPES)
def test_equals_oracle(backend, k, m, basis_dtype):
    args = inputs(k, m, 61, basis_dtype, seed=k + m)
    for dtype in DTYPES:
        check(ops.reconstruct(*args, dtype=dtype), *args, dtype)


@pytest.mark.parametrize("d", [1, 2, 15, 17, 4097])
def test_every_length_is_written_whole(backend, poisoned, d):
    args = inputs(3, 16, d, torch.bfloat16)
    check(ops.reconstruct(*args), *args, torch.float32)


@pytest.mark.parametrize("view", awkward.VIEWS)
@pytest.mark.parametrize("basis_dtype", DTYPES)
def test_any_strides(backend, view, basis_dtype):
    args = [view(t) for t in inputs(5, 7, 33, basis_dtype)]
    check(ops.reconstruct(*args), *args, torch.float32)


def test_blocks_of_a_wide_basis_join(monkeypatch):
    monkeypatch.setenv("W2W_BACKEND", "torch")
    monkeypatch.setattr("w2w_fast.ops._basis._BLOCK_NUMBERS", 64)
    args = inputs(3, 7, 61, torch.bfloat16)
    check(ops.reconstruct(*args), *args, torch.float32)


def test_float16_output(backend):
    c, basis, mean, std = inputs(2, 8, 20)
    if backend == "native":
        with pytest.raises(InputError, match="float16"):
            ops.reconstruct(c, basis, mean, std, dtype=torch.float16)
    else:
        got = ops.reconstruct(c, basis, mean, std, dtype=torch.float16)
        check(got, c, basis, mean, std, torch.float16)


def test_gradient_is_the_contraction_with_std():
    args = [t.double() for t in inputs(3, 5, 20)]
    c = args[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda c: ops.reconstruct(c, *args[1:]), (c,))


@pytest.mark.parametrize("basis_dtype", DTYPES)
def test_gradient_equals_oracle(backend, basis_dtype):
    c, basis, mean, std = inputs(3, 50, 200, basis_dtype)
    c.requires_grad_()
    g = awkward.normal(3, 200, seed=9)
    ops.reconstruct(c, basis, mean, std).backward(g)
    want = oracle.reconstruct_grad(g, basis, std)
    assert_close("dc", c.grad, want, allowed((g * std) @ basis.float(), want))


def test_nan_and_inf_stay_in_their_row(backend):
    c, basis, mean, std = inputs(4, 8, 30)
    std += 1
    c[1, 3], c[2, 5] = torch.nan, torch.inf
    w = ops.reconstruct(c, basis, mean, std)
    assert w[1].isnan().all() and not w[2].isfinite().any()
    assert w[0].isfinite().all() and w[3].isfinite().all()


def test_fake_has_shape_and_dtype():
    meta = [t.to("meta") for t in inputs(3, 8, 30)]
    out = ops.reconstruct(*meta, dtype=torch.bfloat16)
    assert out.shape == (3, 30) and out.dtype == torch.bfloat16 and out.is_meta


def test_compiles_whole():
    args = inputs(3, 8, 30)
    call = torch.compile(lambda *a: ops.reconstruct(*a) * 2, backend="eager", fullgraph=True)
    assert torch.equal(call(*args), ops.reconstruct(*args) * 2)


def test_reference_is_what_is_tested(backend):
    args = inputs(3, 8, 30)
    want = oracle.reconstruct(*args)
    got = reconstruct_reference(*args, torch.float32)
    assert_close("reference", got, want, allowed(ops.reconstruct(*args), want))


@pytest.mark.parametrize(
    ("position", "replace", "message"),
    [
        (0, torch.zeros(3), r"c: wanted \[k, m\]"),
        (1, torch.zeros(30, 9), r"basis: wanted \[d, m\] with d = 30, m = 8, got \[30, 9\]"),
        (2, torch.zeros(31), r"mean: wanted \[d\] with d = 30, got \[31\]"),
        (3, torch.zeros(30, dtype=torch.int64), "std: wanted a floating-point tensor"),
        (2, torch.zeros(30, device="meta"), "mean: wanted it on cpu, got meta"),
        (1, torch.zeros(30, 8, requires_grad=True), "are constants"),
    ],
)
def test_refuses(position, replace, message):
    args = list(inputs(3, 8, 30))
    args[position] = replace
    with pytest.raises(InputError, match=message):
        ops.reconstruct(*args)


def test_backend_is_never_silent(monkeypatch):
    monkeypatch.setattr(_dispatch, "native", lambda: None)
    assert _dispatch.backend("reconstruct") == ("torch", _dispatch.backend("reconstruct")[1])
    assert "not built" in _dispatch.backend("reconstruct")[1]
    monkeypatch.setenv("W2W_BACKEND", "native")
    with pytest.raises(InputError, match="not built"):
        ops.reconstruct(*inputs(1, 2, 3))
    monkeypatch.setenv("W2W_BACKEND", "fastest")
    with pytest.raises(InputError, match="W2W_BACKEND: wanted torch or native"):
        ops.reconstruct(*inputs(1, 2, 3))


def test_report_names_every_op_and_a_reason():
    rows = _dispatch.report()
    assert [row[0] for row in rows] == list(_dispatch.OPS)
    assert all(row[1] in ("native", "torch") and row[3] for row in rows)
