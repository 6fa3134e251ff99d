"""project: c = ((w - mean) / std) V, against the oracle; every backend alike."""

import awkward
import oracle
import pytest
import torch

from w2w_fast import ops
from w2w_fast.errors import InputError
from w2w_fast.testing import allowed, assert_close

BITS = [32, 16, 8, 4]
pytestmark = pytest.mark.usefixtures("poisoned")


def check(got, w, mean, std, exact):
    want = oracle.project(w, exact, mean, std)
    z = torch.where(std > 0, (w.float() - mean) / std, 0)
    assert got.dtype == torch.float32
    terms = z.abs() @ exact.float().abs()
    assert_close("c", got, want, allowed(z @ exact.float(), want, terms))


@pytest.mark.parametrize("m", [1, 7, 8, 1000])
@pytest.mark.parametrize("k", [0, 1, 3, 16, 33])
@pytest.mark.parametrize("bits", BITS)
def test_equals_oracle(backend, k, m, bits):
    basis, mean, std, scale, exact = awkward.space(61, m, bits, seed=k + m)
    w = awkward.normal(k, 61, seed=5)
    check(ops.project(w, basis, mean, std, **scale, m=m), w, mean, std, exact)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("bits", BITS)
def test_many_rows_and_the_same_bits_each_time(backend, k, bits):
    basis, mean, std, scale, exact = awkward.space(700, 9, bits)
    w = awkward.normal(k, 700, seed=5)
    first = ops.project(w, basis, mean, std, **scale, m=9)
    check(first, w, mean, std, exact)
    for _ in range(20 if (k, bits) == (3, 16) else 2):
        assert torch.equal(ops.project(w, basis, mean, std, **scale, m=9), first)


def test_ten_thousand_components(backend):
    basis, mean, std, scale, exact = awkward.space(9, 10_000, 16)
    w = awkward.normal(1, 9, seed=5)
    check(ops.project(w, basis, mean, std, **scale), w, mean, std, exact)


@pytest.mark.parametrize("view", awkward.VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 5])
def test_any_strides(backend, view, dtype, k):
    basis, mean, std, _, exact = awkward.space(33, 7, 16)
    w, basis = view(awkward.normal(k, 33, seed=5, dtype=dtype)), view(basis)
    mean, std = view(mean), view(std)
    exact = basis.double()
    check(ops.project(w, basis, mean, std), w, mean, std, exact)


def test_blocks_of_a_wide_basis_join(monkeypatch):
    monkeypatch.setattr("w2w_fast.ops._basis._BLOCK_NUMBERS", 64)
    basis, mean, std, scale, exact = awkward.space(61, 7, 4)
    w = awkward.normal(3, 61, seed=5)
    check(ops.project(w, basis, mean, std, **scale, m=7, backend="torch"), w, mean, std, exact)


@pytest.mark.parametrize("bits", BITS)
def test_gradient_equals_oracle(backend, bits):
    basis, mean, std, scale, exact = awkward.space(70, 50, bits)
    w = awkward.normal(3, 70, seed=5).requires_grad_()
    g = awkward.normal(3, 50, seed=9)
    ops.project(w, basis, mean, std, **scale, m=50).backward(g)
    divisor = std.masked_fill(std == 0, torch.inf)
    want = oracle.reconstruct(g, exact, torch.zeros_like(std), 1 / divisor.double())
    terms = (g.abs() @ exact.float().abs().mT) / divisor
    assert_close("dw", w.grad, want, allowed(g @ exact.float().mT / divisor, want, terms))
    assert not w.grad[:, ::3].any()


def test_gradcheck():
    basis, mean, std, *_ = awkward.space(20, 5, 64)
    w = awkward.normal(3, 20, seed=1, dtype=torch.float64).requires_grad_()
    call = lambda w: ops.project(w, basis, mean.double(), std.double())  # noqa: E731
    assert torch.autograd.gradcheck(call, (w,))
    assert torch.autograd.gradgradcheck(call, (w,))


def test_undoes_reconstruct_for_an_orthonormal_basis():
    c, mean = awkward.normal(4, 6, seed=1), awkward.normal(50, seed=2)
    std = awkward.normal(50, seed=3).abs() + 0.1
    basis = torch.linalg.qr(awkward.normal(50, 6, seed=4))[0]
    back = ops.project(ops.reconstruct(c, basis, mean, std), basis, mean, std)
    assert_close("c", back, c, 1e-5)


def test_fixed_coordinates_add_nothing_and_poison_shows(backend):
    basis, mean, std, _, _ = awkward.space(33, 7, 32)
    w = awkward.normal(3, 33, seed=5)
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


@pytest.mark.parametrize("bits", [32, 4])
def test_opcheck(backend, bits):
    basis, mean, std, scale, _ = awkward.space(30, 7, bits)
    w = awkward.normal(3, 30, seed=5).requires_grad_()
    args = (w, basis, mean, std, scale["row_scale"], 7, True)
    torch.library.opcheck(torch.ops.w2w_fast.project.default, args)


@pytest.mark.parametrize(
    ("argument", "replace", "message"),
    [
        ("w", torch.zeros(3, 34), r"basis: wanted \[d, m\] with d = 34"),
        ("basis", torch.zeros(33), r"basis: wanted \[d, m\]"),
        ("m", 8, r"basis: wanted \[d, m\] with m = 8, got \[33, 7\]"),
        ("std", torch.ones(33, requires_grad=True), "are constants"),
    ],
)
def test_refuses(argument, replace, message):
    basis, mean, std, *_ = awkward.space(33, 7, 32)
    args = {"w": torch.zeros(3, 33), "basis": basis, "mean": mean, "std": std, argument: replace}
    with pytest.raises(InputError, match=message):
        ops.project(**args)
