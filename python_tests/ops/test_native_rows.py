"""reconstruct's rows of c, of every kind: an instruction set may multiply some as V is stored."""

from __future__ import annotations

import awkward
import oracle
import pytest
import torch

from w2w_fast.ops import _dispatch
from w2w_fast.ops.reconstruct import reconstruct_reference
from w2w_fast.testing import allowed, assert_close

native = _dispatch.native()
if native is None:
    pytest.skip("the extension is not built", allow_module_level=True)

from w2w_fast.ops._native import Kernels  # noqa: E402

kernels = Kernels(native.cpu, False)
BITS = [16, 8, 4]


def run(c, basis, mean, std, row_scale=None):
    """w, written over NaN into rows of a larger tensor, of which nothing else changes."""
    around = torch.full((len(c), len(basis) + 9), 7.0)
    out = around[:, 4:-5].fill_(torch.nan)
    kernels.reconstruct(c, basis, mean, std, row_scale, out)
    assert (around[:, :4] == 7).all() and (around[:, -5:] == 7).all()
    return out.clone()


def check(c, exact, basis, mean, std, row_scale=None):
    """Every row by itself, as others may be larger; alone it has the same bits as in the batch."""
    got = run(c, basis, mean, std, row_scale)
    plain = reconstruct_reference(c, basis, mean, std, row_scale, torch.float32)
    want = oracle.reconstruct(c, exact, 0 if mean is None else mean, std)
    terms = oracle.reconstruct(c.abs(), exact.abs(), 0 if mean is None else mean.abs(), std)
    # Sums of four lanes are longer than torch's: one large number costs them more.
    factor = 4 if native.cpu_features()["isa"] == "portable" else 2
    for i in range(len(c)):
        assert_close(f"w[{i}]", got[i], want[i], allowed(plain[i], want[i], terms[i], factor))
        assert torch.equal(run(c[i : i + 1], basis, mean, std, row_scale)[0], got[i])
    return got


def rows(m):
    """Rows that are bf16 and not, of one size and of many, in a wider tensor of NaN."""
    plain = awkward.normal(9, m, seed=m + 50)
    j = torch.arange(m)
    plain[1] *= 30 / (j + 1)  # as principal components may be
    plain[2, m // 2] = 1e4
    plain[3] *= 10.0 ** -(j % 7)
    plain[4] *= 1e30
    plain[5] *= 1e-30
    plain[6] *= 1e-40
    plain[7] = 0
    plain[8, m // 3] = 25  # most others are more than a 128th of it
    both = torch.cat([plain, plain.bfloat16().float()])
    order = torch.randperm(len(both), generator=torch.Generator().manual_seed(0))
    return torch.full((len(both), m + 7), torch.nan)[:, 3 : 3 + m].copy_(both[order])


@pytest.mark.parametrize("m", [1, 7, 8, 31, 64, 129, 1000, 2100])
@pytest.mark.parametrize("bits", BITS)
def test_rows_of_every_kind(isa, m, bits):
    basis, mean, std, more, exact = awkward.space(77, m, bits, seed=m)
    got = check(rows(m), exact, basis, None, std, **more)
    for k in (1, 3):
        assert torch.equal(run(rows(m)[:k], basis, None, std, **more), got[:k])
    check(awkward.normal(3, m, seed=2).bfloat16().float(), exact, basis, mean, std, **more)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("m", [8, 100])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_reach_only_what_they_touch(isa, m, bits, bad):
    basis, mean, std, more, exact = awkward.space(40, m, bits, seed=m)
    std += 1
    c = awkward.normal(6, m, seed=5).bfloat16().float()
    c[3:] += 0.001
    c[1, m - 1] = c[4, 2] = bad
    if bits == 16:
        basis[7, 3], basis[8, m - 1] = bad, -bad
        exact = basis.double()
    got = run(c, basis, mean, std, **more)
    assert_close("w", got, oracle.reconstruct(c, exact, mean, std), 1e-3)
    assert got[0].isfinite().sum() == (38 if bits == 16 else 40)
    assert not got[1].isfinite().any() and not got[4].isfinite().any()


@pytest.mark.parametrize("every", [1, 2])
def test_subnormal_numbers_of_a_basis_count(isa, every):
    """Alone and beside others, with c that brings them up to size and c that does not."""
    basis = awkward.normal(60, 200, seed=1)
    basis[:, ::every] *= 1e-39
    basis = basis.bfloat16()
    c = awkward.normal(6, 200, seed=2).bfloat16().float()
    c[1:5] *= torch.tensor([[2.0**90], [2.0**19], [2.0**-90], [2.0**-120]])
    check(c, basis.double(), basis, None, torch.ones(60))


@pytest.mark.parametrize("small", ["basis", "c"])
def test_subnormal_numbers_count_where_others_are_little_larger(isa, small):
    """Products are of ordinary size: that of a sum does not tell what was lost in it."""
    a, b = awkward.normal(60, 200, seed=1) * 1e-37, awkward.normal(60, 200, seed=2) * 1e30
    a[:, ::2] /= 100
    a, b = a.bfloat16(), b.bfloat16()
    basis, c = (a, b) if small == "basis" else (b, a)
    check(c[:6].float(), basis.double(), basis, None, torch.ones(60))


@pytest.mark.parametrize("bits", BITS)
def test_a_large_number_that_v_does_not_count(isa, bits):
    """Fixed point relative to it would lose the others, which are all of the result."""
    basis, mean, std, more, exact = awkward.space(30, 100, bits)
    exact[:, 6:8] = 0
    basis[:, 6:8] = 0
    if bits == 4:
        basis[:, 6:8], basis[:, 3] = awkward.space(30, 100, bits)[0][:, 6:8], 0x88
    c = awkward.normal(3, 100, seed=5)
    c[:, 6] = 1e7
    check(c, exact, basis, mean, std, **more)


@pytest.mark.parametrize("bits", [8, 4])
def test_largest_sums_of_integers(isa, bits):
    """Limbs of -128 and numbers at both ends, in more columns than are summed as integers."""
    m = 5000
    low, high = (-128, 127) if bits == 8 else (0, 255)
    width, dtype = (m, torch.int8) if bits == 8 else (m // 2, torch.uint8)
    basis = torch.tensor([[low], [high]], dtype=dtype).expand(2, width).contiguous()
    ends = torch.tensor([low, high] if bits == 8 else [-8, 7]).double()[:, None].expand(2, m)
    c = torch.tensor([[0x3F7F7F80 / 2**30], [-0x3F7F7F80 / 2**30], [1.0], [-1.0]]).repeat(1, m)
    check(c, ends, basis, None, torch.ones(2), torch.ones(2))


@pytest.mark.parametrize("bits", BITS)
def test_every_bit_of_c_counts(isa, bits):
    """Numbers of all sizes, exactly: one column, and a basis of ones."""
    words = torch.randint(0, 2**31, (500,), generator=torch.Generator().manual_seed(0)).int()
    c = torch.cat([words, words | -(2**31), words & -65536]).view(torch.float32)[:, None]
    c = c[c.isfinite().all(1)]
    dtype, one = {16: (torch.bfloat16, 1), 8: (torch.int8, 1), 4: (torch.uint8, 0xF9)}[bits]
    ones, basis = torch.ones(40), torch.full((40, 1), one, dtype=dtype)
    assert torch.equal(run(c, basis, None, ones, None if bits == 16 else ones), c.expand(-1, 40))
