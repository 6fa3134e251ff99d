"""WeightSpace: PCA and readers against the oracle, files, limits and warnings."""

import json
import shutil
import warnings

import awkward
import numpy as np
import oracle
import pytest
import torch

from w2w_fast.errors import InputError
from w2w_fast.layout import Layout, Module
from w2w_fast.space import WeightSpace
from w2w_fast.start import same_start
from w2w_fast.testing import assert_close

LAYOUT = Layout((Module("a.to_q", 20, 10), Module("a.to_v", 12, 8)), 1, 8.0)
D = LAYOUT.size


def population(n=40, factors=6, seed=0, frozen_A=False):
    """Adapters from one start, moved along a few shared directions; labels of two of them."""
    start, noise = awkward.normal(D, seed=seed), awkward.normal(n, D, seed=seed + 1)
    hidden = awkward.normal(n, factors, seed=seed + 2)
    moves = hidden @ awkward.normal(factors, D, seed=seed + 3) * 0.2 + 0.02 * noise
    if frozen_A:
        for rows, _ in LAYOUT.slices():
            moves[:, rows] = 0
    labels = torch.stack([(hidden[:, 0] > 0).float(), 3 * hidden[:, 1] + 5], dim=1)
    return start + moves, labels


@pytest.fixture
def space():
    w, labels = population()
    return WeightSpace.from_population(
        w, LAYOUT, 8, labels=labels, attributes=["beard", "age"],
        names=[f"s{i}" for i in range(40)], meta={"prompt": "sks person"},
    )  # fmt: skip


def test_fixed_coordinates_stay_and_carry_nothing():
    w, _ = population(frozen_A=True)
    with pytest.warns(UserWarning, match=r"64.0% of an adapter's numbers never moved"):
        space = WeightSpace.from_population(w, LAYOUT, 6, dtype=torch.float32)
    assert space.meta["fit"]["fixed"] == 0.64
    is_A = torch.zeros(D, dtype=torch.bool)
    for rows, _ in LAYOUT.slices():
        is_A[rows] = True
    assert torch.equal(space.std == 0, is_A)
    assert bool((space.basis[is_A] == 0).all())
    back = space.reconstruct(space.coefficients)
    assert_close("A", back[:, is_A], w[:, is_A], 2e-7 * float(w.abs().max()))


def test_components_are_limited_by_models_and_by_rank():
    w, _ = population(5)
    for m in (0, 5, 10**9):
        with pytest.raises(InputError, match=r"components: wanted 1 to n - 1 = 4"):
            WeightSpace.from_population(w, LAYOUT, m)
    twins = torch.cat([w, w])
    with pytest.raises(InputError, match="the population spans 4 dimensions, got 5"):
        WeightSpace.from_population(twins, LAYOUT, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_components_give_the_population_back(dtype):
    w, _ = population(20)
    space = WeightSpace.from_population(w, LAYOUT, 19, dtype=dtype)
    assert space.basis.dtype == dtype
    want = oracle.project(w, space.basis, space.mean, space.std)
    assert_close("coefficients", space.coefficients, want, 1e-5 * np.abs(want).max())
    error = (space.reconstruct(space.coefficients) - w).abs().max() / (w - w.mean(0)).abs().max()
    assert error < (1e-5 if dtype == torch.float32 else 0.02)
    assert_close("mu", space.mu, space.coefficients.double().mean(0), 1e-5)
    assert_close("sigma", space.sigma, oracle.f64(space.coefficients).std(0), 1e-5)


def test_population_refuses():
    w, _ = population()
    w[7, 3] = torch.nan
    with pytest.raises(InputError, match="w: model 7 holds NaN"):
        WeightSpace.from_population(w, LAYOUT, 5)
    with pytest.raises(InputError, match="w: s7 holds NaN"):
        WeightSpace.from_population(w.split(9), LAYOUT, 5, names=[f"s{i}" for i in range(40)])
    with pytest.raises(InputError, match=r"w: wanted floats \[n, 50\]"):
        WeightSpace.from_population(w[:, :-1], LAYOUT, 5)


def test_mixed_starts_are_noticed():
    w, _ = population()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        WeightSpace.from_population(w, LAYOUT, 5)
    own = w + 3 * awkward.normal(40, D, seed=9) - 0.9 * w.mean(0)
    assert same_start(own, LAYOUT) < 0.1 < 0.5 < same_start(w, LAYOUT) <= 1
    with pytest.warns(UserWarning, match="did not start from the same adapter"):
        WeightSpace.from_population(own, LAYOUT, 5)
    units = [oracle.f64(own[:, rows]) for rows, _ in LAYOUT.slices()]
    cosines = []
    for A in units:
        A = A / np.linalg.norm(A, axis=1, keepdims=True)
        cosines.append((A @ A.T)[~np.eye(40, dtype=bool)].mean())
    assert abs(same_start(own, LAYOUT) - np.mean(cosines)) < 1e-12


# --- readers and directions


@pytest.mark.parametrize("method", ["ridge", "lstsq", "logistic"])
def test_directions_are_one_sd_long_and_raise_their_label(space, method):
    w, labels = population()
    report = space.fit_directions(labels, ["beard", "age"], method=method)
    assert report["beard"]["accuracy"] > 0.85 and report["age"]["r2"] > 0.9
    assert "accuracy" not in report["age"] and space.meta["readers"] == report
    centred = space.coefficients - space.mu
    for row, reader, column in zip(space.directions, space.classifiers, labels.mT, strict=True):
        along = centred @ (row / row.norm())
        assert abs(float(along.std(correction=0)) / float(row.norm()) - 1) < 1e-4
        assert torch.corrcoef(torch.stack([along, column]))[0, 1] > 0.6
        assert torch.corrcoef(torch.stack([centred @ reader, column]))[0, 1] > 0.75
        assert row @ reader > 0
    # S c is proportional to C^T Y for least squares: the difference of means of a binary label.
    if method == "lstsq":
        means = centred[labels[:, 0] > 0].mean(0) - centred[labels[:, 0] == 0].mean(0)
        cosine = torch.nn.functional.cosine_similarity(means, space.directions[0], dim=0)
        assert cosine > 0.9999


def test_too_many_components_for_the_labels_warn():
    w, labels = population()
    with pytest.warns(UserWarning, match="14 components for 40 labelled models"):
        WeightSpace.from_population(w, LAYOUT, 14, labels=labels, attributes=["b", "a"])


def test_too_many_components_for_the_models_warn():
    w, _ = population()
    with pytest.warns(UserWarning, match="14 components for 40 models: keep m below a third"):
        WeightSpace.from_population(w, LAYOUT, 14)


def test_fit_directions_refuses(space):
    _, labels = population()
    for bad, names, message in [
        (labels[:-1], ["b", "a"], r"labels: wanted \[40, 2\]"),
        (labels, ["b"], r"labels: wanted \[40, 1\]"),
        (labels, ["b", "b"], "distinct attributes"),
        (torch.ones(40, 1), ["flat"], "flat: wanted finite numbers of two or more values"),
        (labels / 0, ["b", "a"], "b: wanted finite"),
    ]:
        with pytest.raises(InputError, match=message):
            space.fit_directions(bad, names)
    with pytest.raises(InputError, match="method: wanted ridge, lstsq or logistic"):
        space.fit_directions(labels, ["b", "a"], method="svm")
    space.coefficients = None
    with pytest.raises(InputError, match="holds no coefficients"):
        space.fit_directions(labels, ["b", "a"])


def test_cut_keeps_the_first_components(space):
    small = space.cut(3)
    assert (small.m, small.d, small.n) == (3, D, 40)
    w = space.reconstruct(space.coefficients[:4])
    assert_close("c", small.project(w), space.project(w)[:, :3], 1e-4)
    for row in small.directions:
        along = (small.coefficients - small.mu) @ (row / row.norm())
        assert abs(float(along.std(correction=0)) / float(row.norm()) - 1) < 1e-4
    for m in (0, 9):
        with pytest.raises(InputError, match="m: wanted 1 to 8"):
            space.cut(m)


def test_to_changes_the_basis_only(space):
    wide = space.to(dtype=torch.float32)
    assert wide.basis.dtype == torch.float32 and wide.mean.dtype == torch.float32
    assert torch.equal(wide.basis.bfloat16(), space.basis) and space.to("cpu").n == 40


@pytest.mark.parametrize(("kind", "worst"), [("int8", 0.01), ("int4", 0.15)])
def test_quantized_spaces(space, tmp_path, kind, worst):
    small = space.quantize(kind)
    assert small.quantized and small.basis.dtype == {"int8": torch.int8, "int4": torch.uint8}[kind]
    assert small.m == space.m and small.d == space.d
    # The error that is kept is the one that is made.
    c = space.coefficients
    exact, got = space.reconstruct(c), small.reconstruct(c)
    error = (got - exact).square().mean().sqrt() / (exact - space.mean).square().mean().sqrt()
    report = small.meta["quantized"]
    assert report["kind"] == kind and abs(report["relative_error"] - float(error)) < 1e-6
    assert 0 < error < worst and "quantized" not in space.meta
    # No step of a row is wider than its scale allows, and 8 bits miss by half a step at most.
    numbers = small.reconstruct(torch.eye(space.m)) - space.mean
    want = space.reconstruct(torch.eye(space.m)) - space.mean
    if kind == "int8":
        bound = (space.std * small.row_scale / 2 * 1.01 + 1e-7).expand_as(numbers)
        assert bool(((numbers - want).abs() <= bound).all())
    small.save(tmp_path / "small")
    back = WeightSpace.load(tmp_path / "small")
    assert torch.equal(back.basis, small.basis) and torch.equal(back.row_scale, small.row_scale)
    assert torch.equal(back.reconstruct(c), got) and back.meta == small.meta
    cut = back.cut(3)
    assert cut.m == 3 and torch.equal(cut.row_scale, small.row_scale)
    first = torch.nn.functional.pad(c[:, :3], (0, space.m - 3))
    assert_close("cut", cut.reconstruct(c[:, :3]), small.reconstruct(first), 1e-6)
    with pytest.raises(InputError, match="the basis is quantised"):
        small.to(dtype=torch.float32)
    with pytest.raises(InputError, match="quantize: wanted int8 or int4 of a space of floats"):
        small.quantize("int8")
    with pytest.raises(InputError, match="quantize: wanted int8 or int4"):
        space.quantize("int2")


def test_an_odd_number_of_components_in_4_bits(space):
    odd = space.cut(5).quantize("int4")
    assert odd.basis.shape == (50, 3) and odd.m == 5 and odd.cut(4).basis.shape == (50, 2)
    w = odd.reconstruct(odd.coefficients)
    assert odd.project(w).shape == (40, 5)


def test_delta_is_what_an_edit_changes(space):
    step = space.directions[0]
    want = space.reconstruct(space.coefficients + 2 * step) - space.reconstruct(space.coefficients)
    got = (2 * space.delta(step)).expand_as(want)
    assert_close("delta", got, want, 1e-5 * float(want.abs().max()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": torch.zeros(51)}, r"mean: wanted \[d = 50\]"),
        ({"mean": torch.zeros(50).double()}, "mean: wanted .*float32"),
        ({"std": -torch.ones(50)}, "no negative std"),
        ({"basis": torch.zeros(49, 8)}, r"basis: wanted \[d = 50"),
        ({"basis": torch.zeros(50, 8).half()}, "basis: wanted"),
        ({"basis": torch.full((50, 8), torch.nan)}, "basis: holds NaN or infinite"),
        ({"mean": torch.full((50,), torch.inf)}, "mean: holds NaN or infinite"),
        ({"basis": torch.zeros(50, 8, dtype=torch.int8)}, "row_scale: wanted it with a basis of"),
        ({"row_scale": torch.ones(50)}, "row_scale: wanted it with a basis of integers and only"),
        ({"basis": torch.zeros(50, 8, dtype=torch.uint8)}, r"basis: wanted \[d = 50, m = 8\]"),
        ({"coefficients": torch.zeros(39, 8)}, r"coefficients: wanted \[n = 40, m = 8\]"),
        ({"attributes": ["one"]}, r"labels: wanted \[n = 40, a = 1\]"),
        ({"coefficients": None, "mu": None}, "wanted mu"),
        ({"explained": torch.zeros(7)}, r"explained: wanted \[m = 8\]"),
    ],
)
def test_construction_refuses(space, change, message):
    import dataclasses

    with pytest.raises(InputError, match=message):
        dataclasses.replace(space, **change)


# --- files


def same(a, b):
    for name, value in vars(a).items():
        other = getattr(b, name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


@pytest.mark.parametrize("options", [{}, {"mmap": False}, {"verify": False}, {"device": "cpu"}])
def test_saved_and_loaded_is_the_same(space, tmp_path, options):
    space.save(tmp_path / "s")
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == [
        "manifest.json", "space.json", "space.safetensors",
    ]  # fmt: skip
    same(space, WeightSpace.load(tmp_path / "s", **options))


def test_same_space_same_bytes(space, tmp_path):
    for name in "ab":
        space.save(tmp_path / name)
    read = [(tmp_path / name / "manifest.json").read_bytes() for name in "ab"]
    assert read[0] == read[1]


def test_a_space_without_a_population_keeps_its_statistics(space, tmp_path):
    import dataclasses

    bare = dataclasses.replace(
        space, coefficients=None, names=None, labels=None, directions=None, classifiers=None,
        attributes=[], explained=None,
    )  # fmt: skip
    bare.save(tmp_path / "s")
    loaded = WeightSpace.load(tmp_path / "s")
    same(bare, loaded)
    assert loaded.n == 0 and torch.equal(loaded.sigma, space.sigma)
    assert_close("S", loaded.covariance().diagonal().sqrt(), space.sigma, 1e-6)


def test_save_never_overwrites_unasked(space, tmp_path):
    space.save(tmp_path / "s")
    with pytest.raises(InputError, match="wanted a new or an empty folder"):
        space.save(tmp_path / "s")
    space.cut(3).save(tmp_path / "s", overwrite=True)
    assert WeightSpace.load(tmp_path / "s").m == 3
    space.meta["bad"] = float("nan")
    with pytest.raises(InputError, match="cannot be written as JSON"):
        space.save(tmp_path / "s", overwrite=True)
    assert WeightSpace.load(tmp_path / "s").m == 3


def test_load_by_name(space, tmp_path, monkeypatch):
    monkeypatch.setenv("W2W_HOME", str(tmp_path))
    space.save(tmp_path / "spaces" / "people")
    assert WeightSpace.load("people").m == 8
    for name in ("nobody", "../people", "spaces/../people"):
        with pytest.raises(InputError, match="space: no folder"):
            WeightSpace.load(name)


@pytest.mark.parametrize("file", ["space.json", "space.safetensors"])
def test_damage_is_detected(space, tmp_path, file):
    space.save(tmp_path / "s")
    path = tmp_path / "s" / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="sha256 differs"):
        WeightSpace.load(tmp_path / "s")
    path.unlink()
    with pytest.raises(InputError, match="no such file"):
        WeightSpace.load(tmp_path / "s")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "not a weight space"),
        ({"version": 2}, "version 2, this w2w_fast reads 1"),
        ({"layout": None}, "layout: wanted"),
        ({"layout": LAYOUT.to_json() | {"rank": 2}}, "mean: wanted"),
        ({"names": ["one"]}, "wanted .n = 1"),
        ({"names": 3}, "names: missing or of the wrong kind"),
        ({"attributes": [1, 2]}, "names, attributes or tensors"),
        ({"attributes": None}, "attributes: missing"),
        ({"tensors": {}}, "unknown: "),
        ({"tensors": {"mean": [50], "other": [1]}}, "names, attributes or tensors"),
        ({"tensors": {"mean": 50}}, "unknown"),
        ({"meta": []}, "meta: missing"),
    ],
)
def test_inconsistent_files_are_refused(space, tmp_path, change, message):
    space.save(tmp_path / "s")
    path = tmp_path / "s" / "space.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        WeightSpace.load(tmp_path / "s", verify=False)


def test_nan_in_a_file_is_refused_by_key(space, tmp_path):
    space.directions[0, 0] = torch.nan
    space.save(tmp_path / "s")
    with pytest.raises(InputError, match=r"s/space.safetensors: space: directions: holds NaN"):
        WeightSpace.load(tmp_path / "s")


def test_numbers_are_looked_at_once(space, tmp_path, monkeypatch):
    from w2w_fast import files
    from w2w_fast import space as module

    space.save(tmp_path / "s")
    seen = []
    for owner in (files, module):
        monkeypatch.setattr(owner, "all_finite", lambda t: seen.append(tuple(t.shape)) or True)
    WeightSpace.load(tmp_path / "s")
    assert seen.count((D, 8)) == 1


def test_a_manifest_that_skips_a_file_is_refused(space, tmp_path):
    space.save(tmp_path / "s")
    (tmp_path / "s" / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match="space.safetensors is not in the manifest"):
        WeightSpace.load(tmp_path / "s")
    shutil.rmtree(tmp_path / "s")
    with pytest.raises(InputError, match="no folder"):
        WeightSpace.load(tmp_path / "s")
