"""Streamed statistics and principal components against the oracle, on every route."""

import subprocess
import sys

import awkward
import oracle
import pytest
import torch

from w2w_fast import components
from w2w_fast.components import (
    ROUTES,
    Stack,
    Standardised,
    moments,
    principal_components,
    route,
)
from w2w_fast.errors import InputError
from w2w_fast.linear import largest_angle
from w2w_fast.testing import assert_close


def falling(n, d, power=1.0, seed=0):
    """w [n, d] whose standardised singular values fall about as 1 / i^power; means far from 0."""
    u = torch.linalg.qr(awkward.normal(n, min(n, d), seed=seed).double())[0]
    v = torch.linalg.qr(awkward.normal(d, min(n, d), seed=seed + 1).double())[0]
    values = torch.arange(1, min(n, d) + 1, dtype=torch.float64) ** -power
    scale = 0.1 + awkward.normal(d, seed=seed + 2).abs()
    return (5 + scale * (u * values @ v.mT) * d**0.5).float()


def pca(w, m, **options):
    stack = Stack([w] if isinstance(w, torch.Tensor) else w)
    known = moments(stack)
    z = Standardised(stack, known.mean, known.std)
    return principal_components(z, known.n, m, **options)


# --- blocks and moments


@pytest.mark.parametrize("rows", [None, torch.tensor([0, 1, 4, 9, 10, 11, 19])])
def test_a_stack_is_one_matrix(rows):
    w = awkward.normal(20, 7, seed=1)
    stack = Stack(w.split([3, 1, 8, 8]), rows)
    want = w if rows is None else w[rows]
    assert len(stack) == len(want) and stack.d == 7
    for start, stop in [(0, len(want)), (1, 2), (2, 6)]:
        assert torch.equal(stack.rows(start, stop), want[start:stop])
        assert torch.equal(stack.columns(start, stop), want[:, start:stop])


@pytest.mark.parametrize("shard", [1, 7, 40])
def test_moments_are_those_of_all(shard, monkeypatch):
    monkeypatch.setattr(components, "BLOCK_NUMBERS", 3 * 11)
    w = 1000 + 0.01 * awkward.normal(40, 11, seed=2)
    w[:, 3] = 7
    got = moments(Stack(w.split(shard)))
    assert got.n == 40
    assert_close("mean", got.mean, oracle.f64(w).mean(0), 1e-10)
    std = oracle.f64(w).std(0)
    assert_close("std", got.std, std, 1e-12)
    assert got.std[3] == 0
    halves = moments(Stack([w[:9]])) + moments(Stack([w[9:]]))
    assert_close("merged", halves.squares, got.squares, 1e-12)


def test_what_is_not_finite_has_a_name():
    w = awkward.normal(12, 5, seed=3)
    w[8, 2] = torch.inf
    for names, who in [(None, "model 8"), ([f"p{i}" for i in range(12)], "p8")]:
        with pytest.raises(InputError, match=f"w: {who} holds NaN"):
            moments(Stack(w.split(5)), names)


# --- principal components


@pytest.mark.parametrize("way", ROUTES)
@pytest.mark.parametrize(("n", "d"), [(5, 50), (40, 50), (80, 50)])
def test_every_route_is_the_svd(way, n, d):
    w = falling(n, d)
    m = min(n - 1, 6)
    got = pca(w, m, way=way, passes=12)
    _, _, basis, explained = oracle.pca(w, m)
    assert got.route == way
    assert_close("explained", got.explained, explained, 1e-6)
    assert_close("basis", got.basis, basis, 2e-5)
    assert_close("orthonormal", got.basis.mT @ got.basis, torch.eye(m), 1e-6)
    assert bool((got.basis.gather(0, got.basis.abs().argmax(0)[None]) > 0).all())


@pytest.mark.parametrize("way", ROUTES)
def test_shards_do_not_change_a_bit(way, monkeypatch):
    monkeypatch.setattr(components, "BLOCK_NUMBERS", 50 * 7)
    w = falling(40, 50)
    whole = pca(w, 5, way=way)
    for shard in (1, 3, 16):
        again = pca(w.split(shard), 5, way=way)
        assert torch.equal(again.basis, whole.basis)
        assert torch.equal(again.explained, whole.explained)
    monkeypatch.undo()
    assert largest_angle(pca(w, 5, way=way).basis, whole.basis) < 1e-5


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_the_filter_is_nearer_than_plain_passes(power, monkeypatch):
    w, m = falling(300, 500, power), 60
    exact = pca(w, m, way="gram").basis
    angle = {p: largest_angle(exact, pca(w, m, way="subspace", passes=p).basis) for p in (2, 8)}
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda square: torch.zeros(len(square)))
    plain = pca(w, m, way="subspace", passes=8).basis  # nothing is cut
    monkeypatch.undo()
    assert 10 * angle[8] < largest_angle(exact, plain) < angle[2]


def test_rounding_to_tf32_keeps_the_subspace(monkeypatch):
    """What tensor cores read: 10 bits of mantissa; the sums are float32's."""
    w, m = falling(200, 300), 40
    exact = pca(w, m, way="subspace", passes=8)

    def rounded(x):
        bits = x.view(torch.int32)
        return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)

    plain = Standardised.rows
    monkeypatch.setattr(Standardised, "rows", lambda *a: rounded(plain(*a)))
    coarse = pca(w, m, way="subspace", passes=8)
    assert_close("explained", coarse.explained, exact.explained, 1e-5)
    # The last of the components have near neighbours: a rounding turns them, whoever computes.
    assert largest_angle(exact.basis[:, :20], coarse.basis[:, :20]) < 0.01


def test_fixed_coordinates_are_zero_on_every_route():
    w = falling(30, 40)
    w[:, 5:9] = 3
    for way in ROUTES:
        basis = pca(w, 4, way=way).basis
        assert bool((basis[5:9] == 0).all()) and bool(basis[4].any())


def test_components_are_limited_by_models_and_by_rank():
    w = falling(5, 50)
    with pytest.raises(InputError, match="wanted 1 to n - 1 = 4 for 5 models, got 5"):
        pca(w, 5)
    for way in ROUTES:
        with pytest.raises(InputError, match=r"the population spans \d dimensions, got 6"):
            pca(torch.cat([w, w]), 6, way=way)
    assert pca(torch.cat([w, w]), 9, at_most=True).basis.shape == (50, 4)
    with pytest.raises(InputError, match="spans 0 dimensions"):
        pca(torch.ones(5, 50), 2)


def test_bad_options():
    for options, said in [
        ({"way": "best"}, "route: wanted auto, gram, covariance, subspace, got 'best'"),
        ({"passes": 0}, "passes, oversample: wanted 1 and 0 at least, got 0"),
        ({"oversample": -1}, "got 8, -1"),
    ]:
        with pytest.raises(InputError, match=said):
            pca(falling(9, 20), 2, **options)


def test_the_route_follows_from_the_sizes():
    assert route(1_000, 99_648, 300) == route(4_000, 99_648, 1_000) == "gram"
    assert route(64_974, 99_648, 10_000) == "subspace"  # a Gram matrix of 34 GB
    assert route(16_000, 99_648, 100) == "subspace"
    assert route(64_974, 4_480, 1_000) == "covariance"


STREAM = """
import sys, threading, torch
from w2w_fast import components
from w2w_fast.components import Stack, Standardised, moments, principal_components

torch.set_num_threads(1)
components.BLOCK_NUMBERS = 1 << 20
stop, worst = threading.Event(), [0]

def held():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))

def watch():
    while not stop.wait(0.002):
        worst[0] = max(worst[0], held())

stack = Stack(torch.from_file(sys.argv[1], size=500 * 80_000).view(500, 80_000).split(7))
torch.linalg.eigh(torch.eye(500, dtype=torch.float64))  # what libraries set up
before = held()
thread = threading.Thread(target=watch)
thread.start()
known = moments(stack)
z = Standardised(stack, known.mean, known.std)
for way in ("gram", "subspace"):
    principal_components(z, known.n, 8, way=way, passes=2, oversample=8)
stop.set()
thread.join()
print(worst[0] - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_population_is_never_in_memory(tmp_path):
    """160 MB on disk; a block, the basis and small squares in memory."""
    row = awkward.normal(80_500, seed=1).numpy()
    with (tmp_path / "w").open("wb") as file:
        for i in range(500):
            file.write((row[i : i + 80_000] * (1 + i % 7)).tobytes())
    done = subprocess.run(
        [sys.executable, "-c", STREAM, str(tmp_path / "w")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 120_000  # KiB; the matrix and a standardised one are 320,000


@pytest.mark.gpu
@pytest.mark.parametrize("way", ROUTES)
def test_a_gpu_finds_the_same(way):
    w = falling(200, 300)
    stack = Stack(w.split(30)).near("cuda")
    known = moments(stack, device="cuda")
    z = Standardised(stack, known.mean, known.std, device="cuda")
    got = principal_components(z, known.n, 40, way=way)
    want = pca(w, 40, way="gram")
    assert_close("explained", got.explained, want.explained, 1e-4)
    assert largest_angle(want.basis[:, :20].contiguous(), got.basis.cpu()) < 0.01
