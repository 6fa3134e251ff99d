"""reconstruct: w = mean + std * (c V^T), against the oracle; every backend alike."""

import awkward
import oracle
import pytest
import torch

from w2w_fast import ops
from w2w_fast.errors import InputError
from w2w_fast.ops import _dispatch
from w2w_fast.ops.reconstruct import reconstruct_reference
from w2w_fast.testing import allowed, assert_close

BITS = [32, 16, 8, 4]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.usefixtures("poisoned")


def check(got, c, basis, mean, std, exact, dtype=torch.float32):
    """got equals the oracle; plain: what torch makes of the same numbers in float32."""
    want = oracle.reconstruct(c, exact, mean, std)
    plain = (mean + std * (c.float() @ exact.float().mT)).to(dtype)
    terms = mean.abs() + std * (c.float().abs() @ exact.float().abs().mT)
    assert got.dtype == dtype and got.is_contiguous()
    assert_close("w", got, want, allowed(plain, want, terms))


@pytest.mark.parametrize("m", [1, 7, 8, 1000])
@pytest.mark.parametrize("k", [0, 1, 3, 16, 33])
@pytest.mark.parametrize("bits", BITS)
def test_equals_oracle(backend, k, m, bits):
    basis, mean, std, scale, exact = awkward.space(61, m, bits, seed=k + m)
    c = awkward.normal(k, m, seed=5)
    for dtype in DTYPES:
        got = ops.reconstruct(c, basis, mean, std, dtype, **scale)
        check(got, c, basis, mean, std, exact, dtype)


@pytest.mark.parametrize("k", [1, 16])
@pytest.mark.parametrize("bits", BITS)
def test_ten_thousand_components(backend, k, bits):
    basis, mean, std, scale, exact = awkward.space(9, 10_000, bits)
    c = awkward.normal(k, 10_000, seed=5)
    check(ops.reconstruct(c, basis, mean, std, **scale), c, basis, mean, std, exact)


@pytest.mark.parametrize("d", [1, 2, 15, 17, 4097])
def test_every_length_is_written_whole(backend, d):
    basis, mean, std, scale, exact = awkward.space(d, 16, 16)
    c = awkward.normal(3, 16, seed=5)
    check(ops.reconstruct(c, basis, mean, std, **scale), c, basis, mean, std, exact)


@pytest.mark.parametrize("view", awkward.VIEWS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("k", [1, 5])
def test_any_strides(backend, view, bits, k):
    basis, mean, std, scale, exact = awkward.space(33, 8, bits)
    if view is awkward.expanded:
        exact = exact[:1].expand_as(exact)
        exact = exact if bits > 8 else exact / scale["row_scale"][0] * scale["row_scale"][:, None]
    c = view(awkward.normal(k, 8, seed=5))
    mean, std = view(mean), view(std)
    got = ops.reconstruct(c, view(basis), mean, std, **scale)
    check(got, c, basis, mean, std, exact)


def test_no_mean_is_a_mean_of_zero(backend):
    basis, mean, std, scale, _ = awkward.space(40, 9, 8)
    c = awkward.normal(3, 9, seed=5)
    got = ops.reconstruct(c, basis, None, std, **scale)
    assert torch.equal(got, ops.reconstruct(c, basis, torch.zeros_like(mean), std, **scale))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("k", [1, 3])
def test_gradient_equals_oracle_and_its_own_bits(backend, bits, k):
    basis, mean, std, scale, exact = awkward.space(600, 50, bits)
    c = awkward.normal(k, 50, seed=5).requires_grad_()
    g = awkward.normal(k, 600, seed=9)
    grads = []
    for _ in range(20 if (k, bits) == (3, 16) else 2):
        (dc,) = torch.autograd.grad(ops.reconstruct(c, basis, mean, std, **scale), c, g)
        grads.append(dc)
    want = oracle.reconstruct_grad(g, exact, std)
    terms = (g * std).abs() @ exact.float().abs()
    assert_close("dc", grads[0], want, allowed((g * std) @ exact.float(), want, terms))
    assert all(torch.equal(dc, grads[0]) for dc in grads)


def test_gradient_and_the_gradient_of_it():
    basis, mean, std, *_ = awkward.space(20, 5, 64)
    c = awkward.normal(3, 5, seed=1, dtype=torch.float64).requires_grad_()
    call = lambda c: ops.reconstruct(c, basis, mean.double(), std.double())  # noqa: E731
    assert torch.autograd.gradcheck(call, (c,))
    assert torch.autograd.gradgradcheck(call, (c,))


@pytest.mark.parametrize("bits", [32, 16])
def test_nan_and_inf_stay_in_their_row(backend, bits):
    basis, mean, std, scale, _ = awkward.space(30, 8, bits)
    std += 1
    c = awkward.normal(4, 8, seed=5)
    c[1, 3], c[2, 5] = torch.nan, torch.inf
    w = ops.reconstruct(c, basis, mean, std, **scale)
    assert w[1].isnan().all() and not w[2].isfinite().any()
    assert w[0].isfinite().all() and w[3].isfinite().all()
    mean[4], std[5] = torch.inf, torch.nan
    w = ops.reconstruct(c[:1], basis, mean, std, **scale)
    assert w[0, 4] == torch.inf and w[0, 5].isnan() and int(w.isfinite().sum()) == 28


def test_blocks_of_a_wide_basis_join(monkeypatch):
    monkeypatch.setattr("w2w_fast.ops._basis._BLOCK_NUMBERS", 64)
    for bits in BITS:
        basis, mean, std, scale, exact = awkward.space(61, 7, bits)
        c = awkward.normal(3, 7, seed=5)
        got = ops.reconstruct(c, basis, mean, std, **scale, backend="torch")
        check(got, c, basis, mean, std, exact)


def test_fake_has_shape_and_dtype():
    basis, mean, std, *_ = (t.to("meta") for t in awkward.space(30, 8, 16)[:3])
    out = ops.reconstruct(torch.zeros(3, 8, device="meta"), basis, mean, std, torch.bfloat16)
    assert out.shape == (3, 30) and out.dtype == torch.bfloat16 and out.is_meta


@pytest.mark.parametrize("bits", [32, 4])
def test_opcheck(backend, bits):
    basis, mean, std, scale, _ = awkward.space(30, 8, bits)
    c = awkward.normal(3, 8, seed=5).requires_grad_()
    args = (c, basis, mean, std, scale["row_scale"], torch.float32)
    torch.library.opcheck(torch.ops.w2w_fast.reconstruct.default, args)


def test_compiles_whole():
    basis, mean, std, *_ = awkward.space(30, 8, 32)
    c = awkward.normal(3, 8, seed=5)

    def twice(c):
        return ops.reconstruct(c, basis, mean, std) * 2

    call = torch.compile(twice, backend="eager", fullgraph=True)
    assert torch.equal(call(c), ops.reconstruct(c, basis, mean, std) * 2)


def test_reference_is_what_is_tested(backend):
    basis, mean, std, *_, exact = awkward.space(30, 8, 16)
    c = awkward.normal(3, 8, seed=5)
    got, want = reconstruct_reference(c, basis, mean, std), oracle.reconstruct(c, exact, mean, std)
    assert_close("reference", got, want, allowed(ops.reconstruct(c, basis, mean, std), want))


@pytest.mark.parametrize(
    ("argument", "replace", "message"),
    [
        ("c", torch.zeros(3), r"c: wanted \[k, m\]"),
        ("basis", torch.zeros(30, 9), r"basis: wanted \[d, m\] with m = 8, got \[30, 9\]"),
        ("basis", torch.zeros(30, 8, dtype=torch.uint8), r"two a byte: \[d, 4\], got \[30, 8\]"),
        ("basis", torch.zeros(30, 8, dtype=torch.int8), r"row_scale: wanted \[d\], the scale of"),
        ("basis", torch.zeros(30, 8, dtype=torch.int32), "basis: wanted floats, int8 or uint8"),
        ("row_scale", torch.ones(30), "row_scale: wanted None for floats"),
        ("mean", torch.zeros(31), r"mean: wanted \[d\] with d = 30, got \[31\]"),
        ("std", torch.zeros(30, dtype=torch.int64), "std: wanted a floating-point tensor"),
        ("mean", torch.zeros(30, device="meta"), "mean: wanted it on cpu, got meta"),
        ("basis", torch.zeros(30, 8, requires_grad=True), "are constants"),
        pytest.param(
            "backend",
            "cuda",
            r"backend=cuda: reconstruct: .*(not built|without CUDA|is on cpu)",
            id="one that runs elsewhere",
        ),
        ("backend", "fastest", "backend: wanted torch, native, cuda, triton"),
    ],
)
def test_refuses(argument, replace, message):
    basis, mean, std, *_ = awkward.space(30, 8, 32)
    args = {"c": torch.zeros(3, 8), "basis": basis, "mean": mean, "std": std, argument: replace}
    with pytest.raises(InputError, match=message):
        ops.reconstruct(**args)


def test_backend_is_never_silent(monkeypatch):
    basis, mean, std, *_ = awkward.space(4, 2, 32)
    args = torch.zeros(1, 2), basis, mean, std
    for name in ("native", "triton"):
        monkeypatch.setattr(_dispatch, "_unavailable", lambda backend: "not built")
        with pytest.raises(InputError, match=f"backend={name}: reconstruct: not built"):
            ops.reconstruct(*args, backend=name)
        monkeypatch.setenv("W2W_BACKEND", name)
        with pytest.raises(InputError, match=f"W2W_BACKEND={name}: reconstruct: not built"):
            ops.reconstruct(*args)
        monkeypatch.delenv("W2W_BACKEND")
        assert _dispatch.choose("reconstruct", None, *args) == "torch"
    monkeypatch.undo()
    with pytest.raises(InputError, match="a tensor is torch.float64"):
        ops.reconstruct(args[0].double(), *args[1:], backend="triton")
    monkeypatch.setenv("W2W_BACKEND", "fastest")
    with pytest.raises(InputError, match="W2W_BACKEND: wanted torch, native"):
        ops.reconstruct(*args)


def test_choices_name_every_backend_and_a_reason():
    for op in _dispatch.OPS:
        rows = _dispatch.choices(op)
        assert [row[0] for row in rows] == list(_dispatch.BACKENDS)
        assert rows[0][1] and all(type(ok) is bool and why for _, ok, why in rows)
