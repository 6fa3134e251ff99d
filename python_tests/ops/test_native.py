"""The extension w2w_fast._native by itself, on every instruction set this machine runs."""

from __future__ import annotations

import importlib.metadata

import awkward
import oracle
import pytest
import torch

from w2w_fast.ops import _dispatch
from w2w_fast.testing import allowed, assert_close

native = _dispatch.native()
if native is None:
    pytest.skip("the extension is not built", allow_module_level=True)

CODES = {torch.float32: 0, torch.bfloat16: 1}
ISAS = native.cpu_features()["supported"]


@pytest.fixture(params=ISAS)
def isa(request):
    before = native.cpu_features()["isa"]
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


def call(c, basis, mean, std, dtype=torch.float32, threads=1, out=None):
    """native.reconstruct into memory that held NaN; strides as they come."""
    if out is None:
        out = torch.full((c.shape[0], basis.shape[0]), torch.nan, dtype=dtype)
    native.reconstruct(
        c.data_ptr(), *c.shape, c.stride(0),
        basis.data_ptr(), CODES[basis.dtype], basis.shape[0], basis.stride(0),
        mean.data_ptr(), std.data_ptr(),
        out.data_ptr(), CODES[out.dtype], out.stride(0), threads,
    )  # fmt: skip
    return out


def inputs(k, m, d, basis_dtype=torch.float32, seed=0):
    std = awkward.normal(d, seed=seed + 2).abs()
    std[::5] = 0
    return (
        awkward.normal(k, m, seed=seed),
        awkward.normal(d, m, seed=seed + 3, dtype=basis_dtype),
        awkward.normal(d, seed=seed + 1),
        std,
    )


@pytest.mark.parametrize("m", [0, 1, 7, 8, 300, 1000, 1025, 10000])
@pytest.mark.parametrize("k", [0, 1, 2, 3, 16, 33])
@pytest.mark.parametrize("basis_dtype", list(CODES))
def test_equals_oracle(isa, m, k, basis_dtype):
    c, basis, mean, std = args = inputs(k, m, 77 if m < 10000 else 9, basis_dtype, seed=m + k)
    got = call(*args, threads=2)
    want = oracle.reconstruct(*args)
    plain = mean + std * (c @ basis.float().mT)
    # A handful of rows of plain torch may be lucky: the floor is one rounding of what is summed.
    terms = mean.abs() + std * (c.abs() @ basis.float().abs().mT)
    assert_close("w", got, want, allowed(plain, want, terms))
    assert torch.equal(call(*args, dtype=torch.bfloat16), got.bfloat16())


def test_rounds_to_bfloat16_as_torch_does(isa):
    """m = 0 leaves w = mean: ties, both neighbours of a tie, overflow, subnormals, signs, NaN."""
    high = torch.randint(0, 1 << 16, (20_000,), generator=torch.Generator().manual_seed(0))
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    mean = (high[:, None] << 16 | low).flatten().int().view(torch.float32)
    none = torch.zeros(1, 0), torch.zeros(len(mean), 0)
    got = call(*none, mean, torch.zeros_like(mean), dtype=torch.bfloat16)[0]
    nan = mean.isnan()
    assert nan.any() and got[nan].isnan().all()
    assert torch.equal(got[~nan], mean[~nan].bfloat16())


@pytest.mark.parametrize("dtype", list(CODES))
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_strided_rows_and_untouched_neighbours(isa, dtype, threads):
    """Rows of larger tensors full of NaN: nothing outside the rows is read or written."""
    want = call(*(args := inputs(5, 37, 101, dtype)), dtype=dtype)
    c = torch.full((5, 60), torch.nan)[:, 11:48].copy_(args[0])
    basis = torch.full((101, 50), torch.nan, dtype=dtype)[:, 3:40].copy_(args[1])
    around = torch.full((5, 150), 7.0, dtype=dtype)
    out = around[:, 20:121].fill_(torch.nan)
    assert torch.equal(call(c, basis, *args[2:], threads=threads, out=out), want)
    assert (around[:, :20] == 7).all() and (around[:, 121:] == 7).all()


def test_one_identity_for_all_rows(isa):
    c, *space = inputs(1, 50, 60)
    assert torch.equal(call(c.expand(6, 50), *space), call(c, *space).expand(6, 60))


@pytest.mark.parametrize("basis_dtype", list(CODES))
def test_same_bits_alone_in_a_batch_and_on_any_number_of_threads(isa, basis_dtype):
    c, *space = inputs(21, 1500, 999, basis_dtype)
    together = call(c, *space)
    alone = torch.cat([call(row[None], *space) for row in c])
    assert torch.equal(alone, together)
    for run in range(20):
        assert torch.equal(call(c, *space, threads=1 + run % 3), together)


def test_nan_and_inf_reach_only_what_they_touch(isa):
    c, basis, mean, std = inputs(4, 19, 40)
    std += 1
    c[1, 18], c[2, 0], basis[7, 3], basis[8, 17] = torch.nan, -torch.inf, torch.nan, torch.inf
    mean[20], std[21] = torch.inf, torch.nan
    got, want = call(c, basis, mean, std), oracle.reconstruct(c, basis, mean, std)
    assert_close("w", got, want, 1e-4)
    assert got[0].isfinite().sum() == 40 - 4 and got[1].isnan().all()


def test_refuses_bad_arguments():
    c, *space = inputs(2, 3, 4)
    with pytest.raises(ValueError, match="threads: wanted at least 1, got 0"):
        call(c, *space, threads=0)
    with pytest.raises(ValueError, match="ldo: wanted at least 4, got 0"):
        call(c, *space, out=torch.zeros(1, 4).expand(2, 4))
    with pytest.raises(ValueError, match=r"basis_dtype: wanted 0 \(f32\) or 1 \(bf16\), got 2"):
        native.reconstruct(0, 1, 1, 1, 0, 2, 1, 1, 0, 0, 0, 0, 1, 1)
    with pytest.raises(ValueError, match="m: wanted at least 0, got -1"):
        native.reconstruct(0, 1, -1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1)


def test_features_and_version():
    features = native.cpu_features()
    assert features["isa"] == ISAS[0], "the best supported set is in use"
    assert ISAS[-1] == "portable" and set(ISAS) <= set(features["compiled"])
    assert native.__version__ == importlib.metadata.version("w2w_fast")
    with pytest.raises(ValueError, match=f"isa: wanted one of .*{ISAS[0]}.*, got mmx"):
        native.set_isa("mmx")
    assert native.cpu_features() == features
