"""The compiled kernels by themselves, on every instruction set this machine runs."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import signal

import awkward
import numpy as np
import oracle
import pytest
import torch
from oracle import f64

from w2w_fast.ops import _dispatch
from w2w_fast.testing import allowed, assert_close

native = _dispatch.native()
if native is None:
    pytest.skip("the extension is not built", allow_module_level=True)

from w2w_fast.ops._native import Kernels  # noqa: E402

kernels = Kernels(native.cpu, False)
ISAS = native.cpu_features()["supported"]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
BASES = [torch.float32, torch.bfloat16, torch.int8, torch.uint8]


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def poisoned(*shape, dtype=torch.float32):
    """Rows of a larger tensor: NaN inside, sevens around, which ``untouched`` looks for."""
    around = torch.full((*shape[:-1], shape[-1] + 40), 7.0, dtype=dtype)
    return around[..., 19:-21].fill_(torch.nan)


def untouched(view):
    around = view._base
    return bool((around[..., :19] == 7).all() and (around[..., -21:] == 7).all())


class Space:
    """mean, std and a basis as it is stored; V the numbers that it stands for."""

    def __init__(self, d, m, dtype=torch.float32, seed=0):
        self.mean, self.std = awkward.normal(d, seed=seed + 1), awkward.normal(d, seed=seed + 2)
        self.std = self.std.abs()
        self.std[::5] = 0
        self.row_scale = None
        if dtype.is_floating_point:
            self.basis = awkward.normal(d, m, seed=seed + 3, dtype=dtype)
            self.V = self.basis.float()
            return
        generator = torch.Generator().manual_seed(seed + 3)
        self.row_scale = awkward.normal(d, seed=seed + 4).abs() + 0.1
        if dtype == torch.int8:
            self.basis = torch.randint(-128, 128, (d, m), generator=generator).to(dtype)
            self.V = self.basis.float()
        else:
            self.basis = torch.randint(0, 256, (d, (m + 1) // 2), generator=generator).to(dtype)
            pairs = torch.stack([self.basis & 15, self.basis >> 4], dim=2)
            self.V = pairs.flatten(1)[:, :m].float() - 8

    @property
    def gain(self):
        return self.std if self.row_scale is None else self.std * self.row_scale

    def reconstruct(self, c, dtype=torch.float32, out=None):
        out = poisoned(len(c), len(self.basis), dtype=dtype) if out is None else out
        kernels.reconstruct(c, self.basis, self.mean, self.std, self.row_scale, out)
        return out

    def project(self, source, m, divide=True):
        out = torch.full((len(source), m), torch.nan)
        kernels.project(source, self.basis, self.mean, self.std, self.row_scale, divide, out)
        return out


@pytest.mark.parametrize("m", [0, 1, 7, 8, 300, 1000, 1025, 10000])
@pytest.mark.parametrize("k", [0, 1, 2, 3, 16, 33])
@pytest.mark.parametrize("basis_dtype", BASES)
def test_reconstruct_equals_oracle(isa, m, k, basis_dtype):
    space = Space(77 if m < 10000 else 9, m, basis_dtype, seed=m + k)
    c = awkward.normal(k, m, seed=m + k)
    with threads(2):
        got = space.reconstruct(c)
    gain = f64(space.std) * (1 if space.row_scale is None else f64(space.row_scale))
    want = oracle.reconstruct(c, space.V, space.mean, gain)
    plain = space.mean + space.gain * (c @ space.V.mT)
    # A handful of rows of plain torch may be lucky: the floor is one rounding of what is summed.
    terms = space.mean.abs() + space.gain * (c.abs() @ space.V.abs().mT)
    assert_close("w", got, want, allowed(plain, want, terms))
    for dtype in FLOATS[1:]:
        assert torch.equal(space.reconstruct(c, dtype), got.to(dtype))
    assert untouched(got)


@pytest.mark.parametrize("m", [0, 1, 7, 8, 300, 1000, 1025, 10000])
@pytest.mark.parametrize("k", [0, 1, 2, 3, 16, 33])
@pytest.mark.parametrize("basis_dtype", BASES)
@pytest.mark.parametrize("divide", [True, False])
def test_project_equals_oracle(isa, m, k, basis_dtype, divide):
    space = Space(203 if m < 10000 else 59, m, basis_dtype, seed=m + k)
    space.std[space.std > 0] += 0.5
    w = awkward.normal(k, len(space.basis), seed=m)
    with threads(2):
        got = space.project(w, m, divide)
    V = f64(space.V) * (1 if space.row_scale is None else f64(space.row_scale)[:, None])
    if divide:
        want = oracle.project(w, V, space.mean, space.std)
        z = (w - space.mean) / space.std.masked_fill(space.std == 0, torch.inf)
    else:
        want = oracle.reconstruct_grad(w, V, space.std)
        z = w * space.std
    z = z if space.row_scale is None else z * space.row_scale
    assert_close("c", got, want, allowed(z @ space.V, want, z.abs() @ space.V.abs()))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("basis_dtype", BASES)
def test_project_takes_narrow_sources_and_no_mean(isa, dtype, basis_dtype):
    space = Space(150, 65, basis_dtype)
    w = awkward.normal(6, 150, seed=9, dtype=dtype)
    around = torch.full((6, 190), torch.nan, dtype=dtype)
    assert torch.equal(space.project(around[:, 7:157].copy_(w), 65), space.project(w.float(), 65))
    space.mean = None
    without = space.project(w, 65)
    space.mean = torch.zeros(150)
    assert torch.equal(without, space.project(w, 65))


def every_rounding():
    """Ties, both neighbours of a tie, overflow, subnormals, signs, NaN: for 16-bit floats."""
    high = torch.randint(0, 1 << 16, (20_000,), generator=torch.Generator().manual_seed(0))
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bfloat16 = (high[:, None] << 16 | low).flatten().int().view(torch.float32)
    halves = torch.arange(-(1 << 15), 1 << 15).short().view(torch.float16).float()
    between = halves.view(torch.int32)[:, None] + torch.tensor([-1, 0, 1, 0xFFF, 0x1000, 0x1001])
    subnormal = (torch.arange(4097) / 4096 * 2**-14)[:, None] + torch.tensor([0, 2**-25, 2**-26])
    return torch.cat([bfloat16, between.flatten().int().view(torch.float32), subnormal.flatten()])


@pytest.mark.parametrize("dtype", FLOATS)
def test_rounds_as_torch_does(isa, dtype):
    """m = 0 leaves w = mean."""
    mean = every_rounding()
    space = Space(len(mean), 0)
    space.mean, space.std = mean, torch.zeros_like(mean)
    got = space.reconstruct(torch.zeros(1, 0), dtype)[0]
    nan = mean.isnan()
    assert nan.any() and got[nan].isnan().all()
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    want = (mean + 0.0)[~nan].to(dtype)  # a sum with zero has no negative zero
    assert torch.equal(got[~nan].contiguous().view(bits), want.view(bits))


def test_widens_every_float16(isa):
    numbers = torch.arange(-(1 << 15), 1 << 15).short().view(torch.float16)
    finite = numbers.isfinite()
    got = torch.empty_like(numbers)[None]
    kernels.edit(numbers[None], torch.zeros_like(numbers), 0.0, got)
    assert torch.equal(got[0][finite], numbers[finite]) and got[0][numbers.isnan()].isnan().all()
    assert torch.equal(got[0][numbers.isinf()], numbers[numbers.isinf()])


@pytest.mark.parametrize("basis_dtype", BASES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_strided_rows_are_read_alone(isa, basis_dtype, count):
    space = Space(101, 37, basis_dtype)
    c = awkward.normal(5, 37, seed=5)
    want = space.reconstruct(c)
    width = space.basis.shape[1]
    fill = torch.nan if basis_dtype.is_floating_point else 77
    around = torch.full((101, width + 13), fill, dtype=basis_dtype)
    space.basis = around[:, 3 : 3 + width].copy_(space.basis)
    with threads(count):
        got = space.reconstruct(torch.full((5, 60), torch.nan)[:, 11:48].copy_(c))
    assert torch.equal(got, want) and untouched(got)


def test_one_identity_for_all_rows(isa):
    space, c = Space(60, 50), awkward.normal(1, 50, seed=5)
    assert torch.equal(space.reconstruct(c.expand(6, 50)), space.reconstruct(c).expand(6, 60))
    w = awkward.normal(1, 60, seed=6)
    assert torch.equal(space.project(w.expand(6, 60), 50), space.project(w, 50).expand(6, 50))


@pytest.mark.parametrize("basis_dtype", BASES)
def test_same_bits_alone_in_a_batch_and_on_any_number_of_threads(isa, basis_dtype):
    space = Space(1999, 1500, basis_dtype)
    c, w = awkward.normal(21, 1500, seed=1), awkward.normal(21, 1999, seed=2)
    together = space.reconstruct(c), space.project(w, 1500)
    assert torch.equal(torch.cat([space.reconstruct(row[None]) for row in c]), together[0])
    assert torch.equal(torch.cat([space.project(row[None], 1500) for row in w]), together[1])
    for run in range(20):
        with threads(1 + run % 3):
            assert torch.equal(space.reconstruct(c), together[0])
            assert torch.equal(space.project(w, 1500), together[1])


def test_a_forked_child_has_threads_too(isa):
    space, c = Space(1999, 1500), awkward.normal(2, 1500, seed=1)
    with threads(3):
        want = space.reconstruct(c)
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # a deadlock would be silent
            os._exit(not torch.equal(space.reconstruct(c), want))
    assert os.waitpid(child, 0)[1] == 0


def test_nan_and_inf_reach_only_what_they_touch(isa):
    space, c = Space(40, 19), awkward.normal(4, 19, seed=5)
    space.std += 1
    c[1, 18], c[2, 0] = torch.nan, -torch.inf
    space.basis[7, 3], space.basis[8, 17] = torch.nan, torch.inf
    space.mean[20], space.std[21] = torch.inf, torch.nan
    got = space.reconstruct(c)
    assert_close("w", got, oracle.reconstruct(c, space.basis, space.mean, space.std), 1e-4)
    assert got[0].isfinite().sum() == 40 - 4 and got[1].isnan().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_project_shows_nan_and_inf_even_where_std_is_zero(isa, bad):
    space, w = Space(40, 19), awkward.normal(4, 40, seed=5)
    assert space.std[5] == 0
    w[1, 5], w[2, 6], w[3, 5] = bad, bad, 1e30
    got = space.project(w, 19)
    assert got[0].isfinite().all() and got[3].isfinite().all()
    assert got[1].isnan().all() and not got[2].isfinite().any()


# The low-rank term of a Linear, and its gradients.


def adapters(a, r, n_in, n_out, dtype, seed=0):
    return (
        awkward.normal(a, r, n_in, seed=seed, dtype=dtype),
        awkward.normal(a, n_out, r, seed=seed + 1, dtype=dtype),
    )


def low_rank(base, x, down, up, index, scale, dtype, in_place=False):
    """(y, s) of the kernel and of float64, and y of plain torch."""
    samples = range(len(x))
    which = [0] * len(x) if len(down) == 1 else samples if index is None else index.tolist()
    scales = scale if isinstance(scale, torch.Tensor) else torch.full((len(x),), scale)
    out = poisoned(*x.shape[:2], up.shape[1], dtype=dtype)
    if in_place:
        base = out.copy_(base)
    s = torch.full((*x.shape[:2], down.shape[1]), torch.nan)
    start = None if base is None else base.clone()
    kernels.low_rank(base, x, down, up, index, scale, out, s)
    assert untouched(out)
    want_s = np.stack([f64(x[b]) @ f64(down[which[b]]).T for b in samples])
    want = np.stack([f64(scales[b]) * want_s[b] @ f64(up[which[b]]).T for b in samples])
    down, up = down[which].float(), up[which].float()
    plain_s = x.float() @ down.mT
    plain = scales[:, None, None] * (plain_s @ up.mT)
    if base is not None:
        want, plain = want + f64(start), plain + start.float()
    terms = x.float().abs() @ down.abs().mT
    assert_close("s", s, want_s, allowed(plain_s, want_s, terms))
    rounds = torch.finfo(dtype).eps * np.abs(want).max()
    terms = scales.abs()[:, None, None] * (terms @ up.abs().mT)
    assert_close("y", out, want, allowed(plain, want, terms) + rounds)
    return out, s


@pytest.mark.parametrize("rank", [1, 2, 4, 16])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("adapter_dtype", FLOATS)
def test_low_rank_equals_oracle(isa, rank, dtype, adapter_dtype):
    for samples, tokens, n_in, n_out in ((1, 1, 1, 1), (3, 77, 45, 19), (2, 50, 1100, 67)):
        down, up = adapters(samples, rank, n_in, n_out, adapter_dtype)
        x = awkward.normal(samples, tokens, n_in, seed=3, dtype=dtype)
        base = awkward.normal(samples, tokens, n_out, seed=4, dtype=dtype)
        y, _ = low_rank(base, x, down, up, None, 0.7, dtype)
        again, _ = low_rank(base, x, down, up, None, 0.7, dtype, in_place=True)
        assert torch.equal(y, again)
        low_rank(None, x, down[:1], up[:1], None, torch.linspace(-1, 2, samples), dtype)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("view", awkward.VIEWS)
def test_low_rank_reads_any_strides(isa, rank, view):
    down, up = adapters(5, rank, 33, 21, torch.bfloat16)
    x = awkward.normal(4, 9, 33, seed=3)
    index = torch.tensor([4, 0, 0, 2])
    low_rank(None, x, view(down), view(up), index, 1.5, torch.float32)
    wide = torch.full((4, 11, 80), torch.nan)[:, 1:10, 5:38].copy_(x)
    got, s = low_rank(None, wide, down, up, index, 1.5, torch.float32)
    want, _ = low_rank(None, x.expand(4, 9, 33), down, up, index, 1.5, torch.float32)
    assert torch.equal(got, want)
    alone = torch.full_like(s, torch.nan)
    kernels.low_rank(None, x, down, up, index, 1.5, None, alone)
    assert torch.equal(alone, s)


def outer(coefficient, feature, index, scale, count, dtype, view=awkward.contiguous):
    """out of the kernel [a, r, n], compared with float64."""
    (b, _, r), n = coefficient.shape, feature.shape[2]
    out = view(torch.full((count, r, n), torch.nan).to(dtype))
    out.fill_(torch.nan)
    kernels.outer(coefficient, feature, index, scale, out)
    scales = scale if isinstance(scale, torch.Tensor) else torch.full((b,), scale)
    want, plain, terms = np.zeros((count, r, n)), torch.zeros(count, r, n), torch.zeros(1)
    for i in range(b):
        a = int(index[i]) if index is not None else 0 if count == 1 else i
        want[a] += f64(scales[i]) * f64(coefficient[i]).T @ f64(feature[i])
        plain[a] += scales[i] * (coefficient[i].mT @ feature[i].float())
        terms = terms + scales[i].abs() * (coefficient[i].abs().mT @ feature[i].float().abs())
    rounds = torch.finfo(dtype).eps * np.abs(want).max(initial=0)
    assert_close("g", out, want, allowed(plain, want, terms) + rounds)
    return out


@pytest.mark.parametrize("rank", [1, 2, 4, 16])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("out_dtype", FLOATS)
def test_outer_equals_oracle(isa, rank, dtype, out_dtype):
    for samples, tokens, n in ((1, 1, 1), (3, 77, 45), (2, 600, 1100), (2, 0, 7)):
        coefficient = awkward.normal(samples, tokens, rank, seed=1)
        feature = awkward.normal(samples, tokens, n, seed=2, dtype=dtype)
        outer(coefficient, feature, None, 0.7, samples, out_dtype)
        outer(coefficient, feature, None, torch.linspace(-1, 2, samples), 1, out_dtype)


@pytest.mark.parametrize("view", awkward.VIEWS[:3])
def test_outer_gathers_samples_into_any_strides(isa, view):
    """Adapter 1 has no sample: its gradient is zero."""
    index = torch.tensor([2, 0, 2, 2])
    coefficient = awkward.normal(4, 300, 3, seed=1)
    feature = torch.full((4, 301, 50), torch.nan)[:, 1:, 7:40]
    feature.copy_(awkward.normal(4, 300, 33, seed=2))
    out = outer(coefficient, feature, index, 2.0, 3, torch.float32, view)
    assert (out[1] == 0).all()


def test_adapted_linear_same_bits_on_any_number_of_threads(isa):
    down, up = adapters(6, 4, 640, 320, torch.bfloat16)
    x = awkward.normal(6, 1000, 640, seed=3, dtype=torch.bfloat16)
    results = []
    for run in range(20):
        with threads(1 + run % 3):
            s = torch.full((6, 1000, 4), torch.nan)
            y = torch.full((6, 1000, 320), torch.nan, dtype=torch.bfloat16)
            kernels.low_rank(None, x, down, up, None, 1.0, y, s)
            g = torch.full((1, 4, 640), torch.nan)
            kernels.outer(s, x, None, 1.0, g)
            results.append((y, s, g))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


# merge and edit.

SHAPES = [(1, 1), (64, 64), (65, 63), (3, 200), (130, 48), (0, 5), (7, 0), (320, 320)]


def modules(rank, dtype, adapter_dtype, shapes=SHAPES):
    """(outs, weights, A, B) of all modules, the table, the number of tiles."""
    lists = [], [], [], []
    for i, (n_out, n_in) in enumerate(shapes):
        lists[0].append(torch.full((n_out, n_in), torch.nan, dtype=dtype))
        lists[1].append(awkward.normal(n_out, n_in, seed=3 * i, dtype=dtype))
        lists[2].append(awkward.normal(rank, n_in, seed=3 * i + 1, dtype=adapter_dtype))
        lists[3].append(awkward.normal(n_out, rank, seed=3 * i + 2, dtype=adapter_dtype))
    rows, tiles = [], 0
    for i, (n_out, n_in) in enumerate(shapes):
        distances = [t[i].data_ptr() - t[0].data_ptr() for t in lists]
        rows.append([*distances, n_out, n_in, tiles, 0])
        tiles += -(-n_out // 64) * -(-n_in // 64)
    return lists, torch.tensor(rows), tiles


def merge(lists, table, tiles, rank, scale):
    kernels.merge(tuple(t[0] for t in lists), table, tiles, rank, scale, False)
    return lists[0]


@pytest.mark.parametrize("rank", [1, 2, 4, 16, 33])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("adapter_dtype", FLOATS)
def test_merge_equals_oracle(isa, rank, dtype, adapter_dtype):
    lists, table, tiles = modules(rank, dtype, adapter_dtype)
    for out, weight, a, b in zip(merge(lists, table, tiles, rank, 0.3), *lists[1:], strict=True):
        want = oracle.merge(weight, a, b, 0.3)
        plain = torch.addmm(weight.float(), b.float(), a.float(), alpha=0.3).to(dtype)
        assert_close("W'", out, want, allowed(plain, want))


@pytest.mark.parametrize("dtype", FLOATS)
def test_merge_of_nothing_is_the_weight_bit_for_bit(isa, dtype):
    lists, table, tiles = modules(1, dtype, torch.float32)
    lists[1][1][0, :3] = torch.tensor([-0.0, torch.nan, -torch.inf])
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    outs = merge(lists, table, tiles, 1, 0.0)
    assert all(torch.equal(o.view(bits), w.view(bits)) for o, w in zip(outs, lists[1], strict=True))


@pytest.mark.parametrize("width", [1024, 1030, 1027])
@pytest.mark.parametrize("dtype", FLOATS)
def test_large_merge_past_the_caches(isa, dtype, width):
    """Rows aligned for such stores, or not; equal bits on any number of threads."""
    lists, table, tiles = modules(2, dtype, dtype, [(2500, width), (2500, width)])
    first = [out.clone() for out in merge(lists, table, tiles, 2, 1.5)]
    weight, a, b = (t[1] for t in lists[1:])
    plain = torch.addmm(weight.float(), b.float(), a.float(), alpha=1.5).to(dtype)
    want = oracle.merge(weight, a, b, 1.5)
    assert_close("W'", first[1], want, allowed(plain, want))
    for count in (1, 3):
        with threads(count):
            assert all(map(torch.equal, merge(lists, table, tiles, 2, 1.5), first))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("delta_dtype", FLOATS)
def test_edit_equals_oracle(isa, dtype, delta_dtype):
    for k, d in ((1, 1), (3, 0), (3, 7), (5, 70_001)):
        w = awkward.normal(k, d, seed=1, dtype=dtype)
        delta = awkward.normal(d, seed=2, dtype=delta_dtype)
        for amount in (1.7, torch.linspace(-2, 2, k)):
            out = poisoned(k, d, dtype=dtype)
            kernels.edit(w, delta, amount, out)
            want = oracle.edit(w, delta, amount)
            steps = torch.as_tensor(amount).expand(k)[:, None] * delta.float()
            plain = (w.float() + steps).to(dtype)
            terms = w.float().abs() + steps.abs()
            assert_close("w", out, want, allowed(plain, want, terms))
            assert untouched(out)
            kernels.edit(same := w.clone(), delta, amount, same)
            assert torch.equal(same, out)


def test_refuses_bad_arguments():
    space, c = Space(4, 3), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="out stride: wanted at least 4, got 0"):
        space.reconstruct(c, out=torch.zeros(1, 4).expand(2, 4))
    rows = (0, 0, 4, 3, 3, 0, 0, 0)  # address, dtype, d, m, stride, mean, std, row_scale
    for call, message in {
        (*rows, 0, 2, 3, 0, 0, 4, 0): "threads: wanted at least 1, got 0",
        (*rows, 0, 2, 3, 0, 3, 4, 1): r"out dtype: wanted 0 \(f32\), 1 .*, got 3",
        (0, 2, *rows[2:], 0, 2, 3, 0, 0, 4, 1): "basis dtype: wanted 0 .* or 4 .*, got 2",
        (0, 0, 4, -1, *rows[4:], 0, 2, 3, 0, 0, 4, 1): "m: wanted at least 0, got -1",
    }.items():
        with pytest.raises(ValueError, match=message):
            native.cpu.reconstruct(*call)
    x, down, up = torch.zeros(2, 3, 4), torch.zeros(1, 17, 4), torch.zeros(1, 5, 17)
    with pytest.raises(ValueError, match="rank: wanted 1 to 16, got 17"):
        kernels.low_rank(None, x, down, up, None, 1.0, None, torch.zeros(2, 3, 17))
    index, s = torch.tensor([0, 1]), torch.zeros(2, 3, 2)
    with pytest.raises(ValueError, match="index: wanted 0 to 0, got 1"):
        kernels.low_rank(None, x, down[:, :2], up[..., :2], index, 1.0, None, s)
    with pytest.raises(ValueError, match="index: wanted 0 to 0, got -2"):
        kernels.outer(s, x, index - 2, 1.0, torch.zeros(1, 2, 4))


def test_features_and_version():
    features = native.cpu_features()
    assert features["isa"] == ISAS[0], "the best supported set is in use"
    assert ISAS[-1] == "portable" and set(ISAS) <= set(features["compiled"])
    assert native.__version__ == importlib.metadata.version("w2w_fast")
    with pytest.raises(ValueError, match=f"isa: wanted one of .*{ISAS[0]}.*, got mmx"):
        native.set_isa("mmx")
    assert native.cpu_features() == features
