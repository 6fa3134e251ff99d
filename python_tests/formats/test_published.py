"""The published files, made here in their format: imported exactly, or refused."""

from __future__ import annotations

import datetime
import pickle
import zipfile
from collections import OrderedDict

import pytest
import torch

from w2w_fast import formats
from w2w_fast.attach import attach
from w2w_fast.errors import InputError
from w2w_fast.labels import read_labels
from w2w_fast.layout import Layout
from w2w_fast.space import WeightSpace

D, M, N = 99_648, 12, 40


def dimensions(spelling="base_model.model.{name}.lora_{half}.weight"):
    table = OrderedDict()
    for module in Layout.sd15().modules:
        for half, shape in (("A", (1, module.in_features)), ("B", (module.out_features, 1))):
            key = spelling.format(name=module.name, half=half)
            table[key] = (torch.Size([max(shape)]), torch.Size(shape))
    return table


@pytest.fixture(scope="session")
def published():
    """The tensors by file name; some entries of std are negative, as in the published ones."""
    generator = torch.Generator().manual_seed(7)
    std = 0.002 + 0.004 * torch.rand(D, generator=generator)
    std[::97] *= -1
    proj = torch.randn(N, M, generator=generator) * torch.linspace(90, 20, M)
    return {
        "V": torch.linalg.qr(torch.randn(D, M, generator=generator)).Q,
        "mean": 0.03 * torch.randn(D, generator=generator),
        "std": std,
        "proj_1000pc": proj,
        "pinverse_1000pc": torch.linalg.pinv(proj),
        "weight_dimensions": dimensions(),
    }


@pytest.fixture
def folder(published, tmp_path):
    path = tmp_path / "files"
    path.mkdir()
    for name, value in published.items():
        torch.save(value, path / f"{name}.pt")
    return path


def load(folder, **options):
    options = {"components": M, "allow_pickle": True} | options
    return formats.import_published(folder, folder.parent / "space", **options)


def refused(folder, *words, **options):
    with pytest.raises(InputError) as error:
        load(folder, **options)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)
    assert [path.name for path in folder.parent.iterdir() if path != folder] == []


def formula(published, c):
    """w as the published code computes it, with their std as it is, in float64."""
    v, std, mean = (published[name].double() for name in ("V", "std", "mean"))
    return c.double() @ v[:, : c.shape[1]].T * std + mean


def test_imported_space_is_the_published_one(folder, published):
    space = load(folder)
    assert isinstance(space, WeightSpace)
    assert space.layout == Layout.sd15() and (space.d, space.m) == (D, M)
    assert space.basis.dtype == torch.bfloat16
    assert (space.std >= 0).all()
    assert space.meta["negative_std"] == len(range(0, D, 97)) and space.meta["n"] == N
    torch.testing.assert_close(space.coefficients, published["proj_1000pc"], rtol=0, atol=0)
    c = space.coefficients[:3]
    wanted = formula(published, c).float()
    error = space.reconstruct(c, dtype=torch.float32) - wanted
    moved = (wanted - published["mean"]).norm()
    assert error.norm() < 0.004 * moved  # the basis is bfloat16: 8 bits
    torch.testing.assert_close(space.project(wanted), c, rtol=0.01, atol=0.2)


def test_eight_bits_on_request(folder, published):
    wide = load(folder)
    (folder.parent / "space").rename(folder.parent / "wide")
    small = load(folder, dtype="int8")
    assert small.basis.dtype == torch.int8 and small.meta["quantized"]["relative_error"] < 0.01
    assert small.meta["negative_std"] == wide.meta["negative_std"] and bool((small.std >= 0).all())
    error = small.reconstruct(small.coefficients[:2]) - wide.reconstruct(wide.coefficients[:2])
    assert error.norm() < 0.01 * (wide.reconstruct(wide.coefficients[:2]) - wide.mean).norm()
    with pytest.raises(InputError, match="dtype: wanted bf16 or int8, got 'int3'"):
        load(folder, dtype="int3")


def test_fewer_components(folder, published):
    space = load(folder, components=5)
    assert space.m == 5 and space.coefficients.shape == (N, 5)
    wanted = formula(published, space.coefficients[:1]).float()
    error = space.reconstruct(space.coefficients[:1], dtype=torch.float32) - wanted
    assert error.norm() < 0.004 * (wanted - published["mean"]).norm()


@pytest.mark.parametrize(
    "spelling",
    [
        "base_model.model.{name}.lora_{half}.default.weight",
        "base_model.model.{name}.lora_{half}.identity1.weight",
        "lora_unet_{name}_lora_{half}.weight",
    ],
)
def test_other_spellings_of_names(folder, spelling):
    torch.save(dimensions(spelling), folder / "weight_dimensions.pt")
    assert load(folder).layout == Layout.sd15()


def test_labels_give_directions(folder, published):
    signs = published["proj_1000pc"][:, :2] > 0
    for suffix in ("csv", "parquet"):
        path = folder / f"labels.{suffix}"
        names = [f"person {i}" for i in range(N)]
        write_table(path, {"name": names, "age": signs[:, 0].int(), "hat": signs[:, 1]})
        got, attributes, labels = read_labels(path)
        assert (got, attributes) == (names, ["age", "hat"])
        assert torch.equal(labels, signs.float())
    space = load(folder, labels=folder / "labels.csv")
    assert space.attributes == ["age", "hat"] and space.directions.shape == (2, M)
    assert space.directions[0, 0] > space.directions[0, 1:].abs().max()


def write_table(path, columns):
    import pyarrow as pa
    from pyarrow import csv, parquet

    columns = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in columns.items()}
    table = pa.table(columns)
    csv.write_csv(table, path) if path.suffix == ".csv" else parquet.write_table(table, path)


@pytest.mark.parametrize(
    "name, columns, words",
    [
        ("short.csv", {"age": [0.0, 1.0]}, ("2 rows", "each of 40")),
        ("text.csv", {"a": ["x"] * N, "b": ["y"] * N}, ("text in 2", "one column of text at most")),
        (
            "empty.csv",
            {"age": [1.0] * (N - 1) + [None], "hat": [1.0] * N},
            ("'age'", "not numbers"),
        ),
        ("index.csv", {"": range(N), "age": [1.0] * N}, ("column ''", "index")),
        ("dates.parquet", {"day": [datetime.date(2024, 1, 1)] * N}, ("'day'", "not numbers")),
        ("missing.csv", None, ("missing.csv", "wanted an existing")),
        ("labels.pt", {}, ("labels.pt", ".parquet")),
        ("broken.parquet", b"PAR1 nothing", ("broken.parquet",)),
        ("broken.csv", b"a,b\n1\n1,2,3\n", ("broken.csv",)),
    ],
)
def test_labels_refused(folder, name, columns, words):
    path = folder / name
    if isinstance(columns, bytes):
        path.write_bytes(columns)
    elif columns:
        write_table(path, columns)
    refused(folder, *words, labels=path)


def test_not_without_permission(folder):
    refused(folder, "allow_pickle=True", allow_pickle=False)


def test_not_with_an_old_torch(folder, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    refused(folder, "2.9.1", "2.10")


def test_more_components_than_coefficients(folder, published, tmp_path):
    """The published V has 10,000 columns, the coefficients 1,000: spreads beyond are continued."""
    sd = 300 * torch.arange(1, M + 1) ** -0.5
    generator = torch.Generator().manual_seed(3)
    proj = sd[:8] * torch.randn(4000, 8, generator=generator)
    torch.save(proj, folder / "proj_1000pc.pt")
    write_table(folder / "labels.csv", {"age": proj[:, 0]})
    space = load(folder, labels=folder / "labels.csv")
    assert space.coefficients is None and space.meta["sigma_known"] == 8 and space.m == M
    torch.testing.assert_close(space.sigma[:8], proj.std(0), rtol=1e-3, atol=0)
    torch.testing.assert_close(space.sigma, sd, rtol=0.1, atol=0)
    torch.testing.assert_close(space.mu[:8], proj.mean(0))
    assert not space.mu[8:].any() and not space.directions[:, 8:].any()
    torch.testing.assert_close(space.directions[0, 0], sd[0], rtol=0.1, atol=0)
    c = torch.cat([proj[:1], torch.ones(1, M - 8)], dim=1)
    wanted = formula(published, c).float()
    error = space.reconstruct(c, dtype=torch.float32) - wanted
    assert error.norm() < 0.004 * (wanted - published["mean"]).norm()


@pytest.mark.parametrize("components", [0, -1, M + 1])
def test_components_refused(folder, components):
    refused(folder, f"components = {components}", f"V.pt has {M}", components=components)


@pytest.mark.parametrize("name", ["V", "mean", "std", "proj_1000pc", "weight_dimensions"])
def test_missing_file(folder, name):
    (folder / f"{name}.pt").unlink()
    refused(folder, f"{name}.pt", "not found")


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("mean", lambda t: t[:-1], ("mean.pt", "[99647]", "[99648]")),
        ("mean", lambda t: t.int(), ("mean.pt", "floating")),
        ("mean", lambda t: t.to_sparse(), ("mean.pt",)),
        ("mean", lambda t: torch.nn.Parameter(t), ("mean.pt", "Parameter")),
        ("mean", lambda t: t.to("meta"), ("mean.pt",)),
        ("mean", lambda t: {"mean": t}, ("mean.pt", "dict")),
        ("std", lambda t: t.index_fill(0, torch.tensor([5]), float("nan")), ("std.pt", "NaN")),
        ("proj_1000pc", lambda t: t.index_fill(0, torch.tensor([5]), float("inf")), ("proj",)),
        ("proj_1000pc", lambda t: t[:, 0], ("proj_1000pc.pt", "[40]")),
        ("V", lambda t: t[1:], ("V.pt", "[99647, 12]")),
        ("V", lambda t: t[:, :0], ("V.pt", "[99648, 0]")),
        ("V", lambda t: t * 2, ("V.pt", "length 1", "column 0")),
        ("V", lambda t: t.index_fill(0, torch.tensor([9]), float("nan")), ("V.pt", "column 0")),
    ],
)
def test_wrong_tensor(folder, published, name, change, words):
    torch.save(change(published[name]), folder / f"{name}.pt")
    refused(folder, *words)


def swap_first_two(table):
    (a, x), (b, y), *rest = table.items()
    return OrderedDict([(b, y), (a, x), *rest])


@pytest.mark.parametrize(
    "change, words",
    [
        (swap_first_two, ("lora_B", "has A of down_blocks.0")),
        (lambda t: OrderedDict(list(t.items())[2:]), ("126 entries", "128")),
        (lambda t: OrderedDict(reversed(t.items())), ("up_blocks.3", "has A of down_blocks.0")),
        (lambda t: {k.replace("attn1", "attn3"): v for k, v in t.items()}, ("attn3",)),
        (lambda t: dict.fromkeys(t, ((320,), (320, 1))), ("(1, 320)",)),
        (lambda t: dict.fromkeys(t, ((320,),)), ("(1, 320)",)),
        (lambda t: dict.fromkeys(t, "text"), ("(1, 320)",)),
        (lambda t: list(t), ("mapping",)),
        (lambda t: dict(enumerate(t.values())), ("mapping",)),
    ],
)
def test_wrong_dimensions(folder, published, change, words):
    torch.save(change(published["weight_dimensions"]), folder / "weight_dimensions.pt")
    refused(folder, "weight_dimensions.pt", *words)


def test_compressed_archive(folder):
    """A few kilobytes of zip may hold gigabytes: refused before it is unpacked."""
    source = folder / "mean.pt"
    with zipfile.ZipFile(source) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(source, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    refused(folder, "mean.pt", "compressed")


def test_large_pickle(folder):
    torch.save(["x" * 2_000_000], folder / "mean.pt")
    refused(folder, "mean.pt", "bytes long")


def test_tensor_larger_than_its_data(folder):
    torch.save(torch.zeros(1).expand(D), folder / "mean.pt")
    refused(folder, "mean.pt", "larger than the data")


class Reduce:
    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


def payloads(marker):
    import builtins
    import importlib
    import os
    import runpy
    import subprocess

    touch = f"open({str(marker)!r}, 'w').close()"
    shell = f"touch {marker}"
    return {
        "system": Reduce(os.system, (shell,)),
        "popen": Reduce(subprocess.Popen, (["touch", str(marker)],)),
        "eval": Reduce(builtins.eval, (touch,)),
        "exec": Reduce(builtins.exec, (touch,)),
        "open": Reduce(builtins.open, (str(marker), "w")),
        "import": Reduce(importlib.import_module, ("this",)),
        "runpy": Reduce(runpy.run_path, (str(marker),)),
        "path": Reduce(type(marker).touch, (marker,)),
        "torch.save": Reduce(torch.save, ({}, str(marker))),
        "torch.hub": Reduce(torch.hub.load, (str(marker.parent), "x")),
        "state": Reduce(OrderedDict, (), Reduce(builtins.exec, (touch,))),
        "inside a tensor's state": [torch.zeros(3), Reduce(builtins.exec, (touch,))],
        "key of a dictionary": {Reduce(builtins.exec, (touch,)): 1},
    }


NAMES = list(payloads(__import__("pathlib").Path("x")))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", NAMES)
def test_payloads_do_not_run(folder, tmp_path, name, legacy):
    marker = tmp_path / "files" / "ran"
    for file in ("V", "mean", "proj_1000pc", "weight_dimensions"):
        path = folder / f"{file}.pt"
        good = path.read_bytes()
        torch.save(
            payloads(marker)[name],
            path,
            _use_new_zipfile_serialization=not legacy,
        )
        refused(folder, f"{file}.pt")
        assert not marker.exists()
        path.write_bytes(good)


def test_a_payload_would_run_elsewhere(tmp_path):
    """The payloads above do something when they are unpickled without restriction."""
    marker = tmp_path / "ran"
    pickle.loads(pickle.dumps(payloads(marker)["exec"]))
    assert marker.exists()


def test_plain_pickle(folder, published):
    (folder / "mean.pt").write_bytes(pickle.dumps([0.0] * D))
    refused(folder, "mean.pt", "not an archive")


def test_identity_frame_is_never_opened(folder, tmp_path):
    marker = tmp_path / "files" / "ran"
    torch.save(payloads(marker)["exec"], folder / "identity_df.pt")
    (folder / "pinverse_1000pc.pt").write_bytes(b"anything")
    load(folder)
    assert not marker.exists()


@pytest.mark.slow
@torch.no_grad()
def test_reconstructed_identity_in_sd15(folder, published, big_pipe, unet_inputs, tmp_path):
    """Imported, reconstructed, exported; diffusers' output equals ours and the plain sum's."""
    space = load(folder)
    c = space.coefficients[2:3]
    w = space.reconstruct(c, dtype=torch.float32)
    path = formats.export(space, c, tmp_path / "me.safetensors")
    found = formats.verify(path, big_pipe, w, space.layout)
    assert found.modules == 64 and found.relative <= 1e-5

    unet, inputs = big_pipe.unet, unet_inputs(big_pipe.unet)
    base = unet(**inputs).sample
    with attach(big_pipe, space, identities=c):
        got = unet(**inputs).sample
    pristine = {}
    for name, (a, b) in space.layout.split(w[0]).items():
        weight = unet.get_submodule(name).weight
        pristine[name] = weight.clone()
        weight += 27.0 * (b.double() @ a.double()).float()
    wanted = unet(**inputs).sample
    for name, weight in pristine.items():
        unet.get_submodule(name).weight.copy_(weight)
    assert (wanted - base).abs().max() > 1e-2 * base.abs().max()
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * base.abs().max().item())
