"""Populations from other tools' files: the change kept, the gauge gone, the unusable set aside."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pyarrow import parquet
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

import w2w_fast as w2w
from w2w_fast import formats
from w2w_fast.canonical import align, canonical
from w2w_fast.cli import app
from w2w_fast.errors import InputError
from w2w_fast.layout import Layout, Module
from w2w_fast.population import Population, begin, open_population
from w2w_fast.verbs import collect as module

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
WIDTHS = {"attn1.to_q": (16, 16), "attn1.to_v": (16, 16), "attn2.to_q": (16, 16),
          "attn2.to_v": (24, 16)}  # fmt: skip
MODULES = tuple(Module(f"{BLOCK}.{name}", *widths) for name, widths in WIDTHS.items())
Factors = dict[str, tuple[Tensor, Tensor]]


def factors(rank: int, seed: int, start: Factors | None = None, far: float = 0.3) -> Factors:
    """Random A [rank, in], B [out, rank] of each module; of someone near `start`, if given."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for m in MODULES:
        shapes = ((rank, m.in_features), (m.out_features, rank))
        pair = [torch.randn(shape, generator=generator) for shape in shapes]
        if start is not None:
            pair = [near + far * noise for near, noise in zip(start[m.name], pair, strict=True)]
        made[m.name] = tuple(pair)
    return made


def gauged(person: Factors, seed: int) -> Factors:
    """The same changes by other factors: (G A, B G^-1), G invertible, of either sign.

    G is tame enough that float32 still holds the change, to some 1e-6 of it.
    """
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, (a, b) in person.items():
        rank = a.shape[0]
        g = torch.randn(rank, rank, generator=generator, dtype=torch.float64)
        g = torch.linalg.qr(g).Q * (0.7 * torch.randn(rank, generator=generator)).exp()
        made[name] = ((g @ a.double()).float(), (b.double() @ g.inverse()).float())
    return made


def change(person: Factors) -> dict[str, Tensor]:
    return {name: b.double() @ a.double() for name, (a, b) in person.items()}


def kohya(path: Path, person: Factors, alpha: dict[str, float] | None = None) -> None:
    """As sd-scripts write it: where alpha is not the rank, B makes up for it."""
    tensors = {}
    for name, (a, b) in person.items():
        key = f"lora_unet_{name.replace('.', '_')}"
        factor = 1.0
        if alpha is not None and name in alpha:
            tensors[f"{key}.alpha"] = torch.tensor(alpha[name])
            factor = a.shape[0] / alpha[name]
        tensors |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b * factor}
    save_file(tensors, path)


def write(folder: Path, people: dict[str, Factors]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, person in people.items():
        kohya(folder / f"{name}.safetensors", person)
    return folder


def collect(folder: Path, out: Path, rank: int = 1, alpha: float = 27.0, **options) -> Population:
    return w2w.collect(folder, out, Layout(MODULES, rank, alpha), progress=False, **options)


def changes_of(made: Population) -> list[dict[str, Tensor]]:
    rows = made.load().double()
    return [
        {n: made.layout.scale * b @ a for n, (a, b) in made.layout.split(row).items()}
        for row in rows
    ]


def tree(folder: Path) -> dict[str, str]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def column(made: Population, name: str) -> list:
    return made.table[name].to_pylist()


# --- what is kept ---------------------------------------------------------------------------------


def test_every_format_and_rank_keeps_its_change(tmp_path):
    folder = tmp_path / "loras"
    folder.mkdir()
    people = {f"p{i}": factors(rank, seed=i) for i, rank in enumerate((1, 2, 3, 4))}
    kohya(folder / "p0.safetensors", people["p0"])
    mixed = {m.name: alpha for m, alpha in zip(MODULES[1:], (0.5, 1.0, 16.0), strict=True)}
    kohya(folder / "p1.safetensors", people["p1"], mixed)
    for name, format in (("p2", "diffusers"), ("p3", "peft")):
        rank = int(name[1]) + 1
        layout = Layout(MODULES, rank, float(rank))
        path = folder / (name if format == "peft" else f"{name}.safetensors")
        w2w.export(layout, layout.flatten(people[name]), path, format=format)
    (folder / "readme.md").write_text("none of them")
    (folder / "samples").mkdir()
    made = collect(folder, tmp_path / "out", rank=4)
    assert made.names == list(people) and made.layout == Layout(MODULES, 4, 27.0)
    assert column(made, "format") == ["kohya", "kohya", "diffusers", "peft"]
    assert column(made, "rank") == [1, 2, 3, 4]
    assert max(column(made, "lost_most")) < 1e-12 and column(made, "outside") == [0.0] * 4
    for got, person in zip(changes_of(made), people.values(), strict=True):
        for name, want in change(person).items():
            assert (got[name] - want).norm() < 1e-6 * want.norm()
    for row, rank in zip(made.load().double(), (1, 2, 3, 4), strict=True):
        for a, b in made.layout.split(row).values():
            assert torch.allclose(a @ a.T, b.T @ b, atol=1e-6)  # balanced
            assert torch.linalg.matrix_rank(a, rtol=1e-5) == rank


def test_folders_of_diffusers_training_scripts(tmp_path):
    (tmp_path / "loras" / "anna").mkdir(parents=True)
    layout = Layout(MODULES, 2, 2.0)
    path = tmp_path / "loras" / "anna" / "pytorch_lora_weights.safetensors"
    w2w.export(layout, layout.flatten(factors(2, seed=0)), path, format="diffusers")
    assert collect(tmp_path / "loras", tmp_path / "out").names == ["anna"]


def test_the_best_change_of_that_rank_and_the_energy_lost(tmp_path):
    person = factors(4, seed=0)
    made = collect(write(tmp_path / "loras", {"a": person}), tmp_path / "out", rank=2)
    (got,) = changes_of(made)
    lost, energy, worst = 0.0, 0.0, []
    for name, want in change(person).items():
        squares = torch.linalg.svdvals(want).square()
        beyond = float(squares[2:].sum())
        assert abs(float((want - got[name]).square().sum()) - beyond) < 1e-5 * beyond
        lost, energy = lost + beyond, energy + float(squares.sum())
        worst.append(beyond / float(squares.sum()))
    assert column(made, "lost") == pytest.approx([lost / energy])
    assert column(made, "lost_most") == pytest.approx([max(worst)])


@pytest.mark.parametrize("rank", [1, 3])
def test_the_gauge_does_not_matter(rank, tmp_path):
    start = factors(rank, seed=99)
    people = {f"p{i:02d}": factors(rank, i, start) for i in range(12)}
    other = {name: gauged(person, seed=i) for i, (name, person) in enumerate(people.items())}
    options = {"rank": rank, "shard": 5}
    want = collect(write(tmp_path / "a", people), tmp_path / "a-out", **options).load()
    got = collect(write(tmp_path / "b", other), tmp_path / "b-out", **options).load()
    assert torch.allclose(got, want, atol=1e-5 * float(want.abs().max()))


def test_components_are_those_of_people(tmp_path):
    """Two traits move everybody: two components tell almost all, in whatever gauge it comes."""
    start, *traits = (factors(1, seed=99 + i) for i in range(3))
    people = {}
    for i in range(40):
        amounts = 0.3 * torch.randn(2, generator=torch.Generator().manual_seed(i))
        person = {
            name: tuple(
                part + sum(x * trait[name][j] for x, trait in zip(amounts, traits, strict=True))
                for j, part in enumerate(pair)
            )
            for name, pair in start.items()
        }
        people[f"p{i}"] = gauged(person, seed=i)
    out = tmp_path / "out"
    made = collect(write(tmp_path / "loras", people), out, shard=16)
    assert min(column(made, "cosine")) > 0.7
    assert float(w2w.fit(out, 2).explained.sum()) > 0.9
    raw = torch.stack([made.layout.flatten(person) for person in people.values()])
    share = torch.linalg.svdvals(raw - raw.mean(0)).square()
    assert float(share[:2].sum() / share.sum()) < 0.8  # as the files have it


# --- signs and order ------------------------------------------------------------------------------


def path_through_a_tie(steps: int) -> list[Factors]:
    """People in small steps: two singular values cross, and so do A's two largest entries."""
    made = []
    for t in torch.linspace(-0.1, 0.1, steps):
        person = {}
        for m in MODULES:
            a, b = torch.zeros(2, m.in_features), torch.zeros(m.out_features, 2)
            a[0, 0], a[0, 1], a[1, 2] = 1 + t, -1 + t, 1.0
            b[0, 0], b[1, 1] = 1 + t, 2**0.5 * (1 - t)
            person[m.name] = (a, b)
        made.append(person)
    return made


@pytest.mark.parametrize("rank", [1, 2])
def test_alike_people_stay_alike_through_ties(rank):
    people = path_through_a_tie(21)
    layout = Layout(MODULES, rank, 1.0)
    if rank == 1:  # the sign alone
        people = [{n: (a[:1], b[:, :1]) for n, (a, b) in person.items()} for person in people]
    w = torch.stack([canonical(person, layout).w for person in people])
    jump = w.diff(dim=0).norm(dim=1).max() / w[0].norm()
    assert jump > 0.5  # what fixed signs and sorted values do, alone
    align(w, layout)
    assert w.diff(dim=0).norm(dim=1).max() / w[0].norm() < 0.05


def test_turning_changes_no_change():
    layout = Layout(MODULES, 3, 27.0)
    w = torch.stack([canonical(factors(3, seed=i), layout).w for i in range(4)])
    before = [{n: b @ a for n, (a, b) in layout.split(row.double()).items()} for row in w.clone()]
    reference = torch.randn(layout.size, generator=torch.Generator().manual_seed(0))
    cosines = align(w, layout, reference)
    for row, old in zip(w, before, strict=True):
        for name, (a, b) in layout.split(row.double()).items():
            assert torch.allclose(b @ a, old[name], atol=1e-5)
    want = torch.nn.functional.cosine_similarity(w, reference[None])
    assert torch.allclose(cosines.float(), want, atol=1e-5)
    again = w.clone()
    align(again, layout, reference)  # it is the nearest already
    assert torch.allclose(again, w, atol=1e-5)


def test_rounding_is_not_a_second_component():
    """A rank-4 file with a change of rank 1: the rows beyond are zeros, not 1e-9."""
    person = {n: (a.repeat(4, 1), b.repeat(1, 4)) for n, (a, b) in factors(1, seed=0).items()}
    w = canonical(person, Layout(MODULES, 4, 4.0)).w
    for a, b in Layout(MODULES, 4, 4.0).split(w).values():
        assert a[0].any() and not a[1:].any() and not b[:, 1:].any()


# --- what is set aside ----------------------------------------------------------------------------


def spoilt(person: Factors, **parts: Callable) -> Factors:
    name = MODULES[2].name
    a, b = person[name]
    return person | {name: (parts.get("a", lambda x: x)(a), parts.get("b", lambda x: x)(b))}


BAD = {
    "nan": (lambda p: spoilt(p, b=lambda b: b * float("nan")), "NaN"),
    "zero": (lambda p: {n: (a, b * 0) for n, (a, b) in p.items()}, "all zero"),
    "missing": (lambda p: {n: p[n] for n in list(p)[1:]}, f"3 of 4 .* missing: {MODULES[0].name}"),
    "wide": (lambda p: spoilt(p, a=lambda a: a.repeat(1, 2)), f"other widths: {MODULES[2].name}"),
}


@pytest.fixture
def mixed(tmp_path) -> Path:
    """Six usable files and seven that are not, some at each end."""
    start = factors(2, seed=9)
    people = {f"p{i}": factors(2, i, start) for i in range(6)}
    folder = write(tmp_path / "loras", people)
    for name, (spoil, _) in BAD.items():
        kohya(folder / f"{name}.safetensors", spoil(people["p0"]))
    (folder / "aaa.pt").write_bytes(b"\x80\x04N.")
    (folder / "junk.safetensors").write_bytes(b"not safetensors at all")
    (folder / "z-peft").mkdir()
    (folder / "z-peft" / "adapter_config.json").write_text("{}")
    return folder


def test_the_unusable_are_set_aside_and_the_rest_goes_on(mixed, tmp_path):
    made = collect(mixed, tmp_path / "out", shard=4)
    assert made.names == [f"p{i}" for i in range(6)] and [len(w) for w in made.shards] == [4, 2]
    clean = write(tmp_path / "clean", {})
    for i in range(6):
        (clean / f"p{i}.safetensors").write_bytes((mixed / f"p{i}.safetensors").read_bytes())
    assert torch.equal(collect(clean, tmp_path / "clean-out", shard=4).load(), made.load())
    reasons = dict(zip(column(made, "name"), column(made, "reason"), strict=True))
    assert list(reasons) == sorted(reasons) and len(reasons) == 13
    for name, (_, said) in BAD.items():
        assert re.search(said, reasons[name])
    assert "pickle" in reasons["aaa"] and "adapter_model" in reasons["z-peft"]
    assert reasons["junk"].startswith("junk.safetensors: not a valid safetensors file")
    assert str(tmp_path) not in "".join(reasons.values())
    assert [s is None for s in column(made, "shard")] == [bool(r) for r in reasons.values()]


def test_modules_beyond_the_layout(tmp_path):
    people = {"a": factors(2, seed=0), "b": factors(2, seed=1)}
    more = torch.randn(2, 16), torch.randn(32, 2)
    people["b"][f"{BLOCK}.ff.net.0.proj"] = more
    folder = write(tmp_path / "loras", people)
    made = collect(folder, tmp_path / "out", rank=2)
    energy = {name: float(x.square().sum()) for name, x in change(people["b"]).items()}
    outside = energy.pop(f"{BLOCK}.ff.net.0.proj")
    want = outside / (outside + sum(energy.values()))
    assert column(made, "outside") == pytest.approx([0.0, want])
    strict = collect(folder, tmp_path / "strict", rank=2, strict=True)
    assert strict.names == ["a"]
    assert column(strict, "reason")[1].endswith("ff.net.0.proj")


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ("nothing usable", "none of 2 files is usable; 'a': .*NaN"),
        ("no files", "no LoRA"),
        ("no folder", "no such folder"),
        ("two of one name", "one name but for case"),
        ("no labels", "existing .csv"),
        ("few labels", "nothing on 1 of 2 people, 'b'"),
        ("shard", "1 to 100,000"),
        ("not empty", "not empty"),
    ],
)
def test_refusals_leave_nothing_behind(trouble, said, tmp_path):
    folder, out, options = tmp_path / "loras", tmp_path / "new" / "out", {}
    people = {"a": factors(1, seed=0), "b": factors(1, seed=1)}
    if trouble == "nothing usable":
        people = {name: BAD["nan"][0](person) for name, person in people.items()}
    if trouble == "two of one name":
        people["A"] = people["a"]
    if trouble != "no folder":
        write(folder, {} if trouble == "no files" else people)
    if "labels" in trouble:
        options["labels"] = tmp_path / "labels.csv"
    if trouble == "few labels":
        (tmp_path / "labels.csv").write_text("name,hat\na,1\n")
    if trouble == "shard":
        options["shard"] = 0
    if trouble == "not empty":
        out = folder
    before = tree(tmp_path)
    with pytest.raises(InputError, match=said):
        collect(folder, out, **options)
    assert tree(tmp_path) == before and not (tmp_path / "new").exists()


# --- going on -------------------------------------------------------------------------------------


def test_a_killed_job_goes_on_to_the_same_bytes(mixed, tmp_path, monkeypatch):
    collect(mixed, tmp_path / "whole", rank=2, shard=2)
    read, seen = module.read_adapter, []

    def counted(path):
        seen.append(path.name)
        if path.name == killed:
            raise KeyboardInterrupt
        return read(path)

    monkeypatch.setattr(module, "read_adapter", counted)
    for killed in ("nan.safetensors", "p1.safetensors", "p3.safetensors", "z-peft"):
        with pytest.raises(KeyboardInterrupt):
            collect(mixed, tmp_path / "job", rank=2, shard=2)
        if killed != "nan.safetensors":
            with pytest.raises(InputError, match="not finished"):
                open_population(tmp_path / "job")
    killed = None
    seen.clear()
    collect(mixed, tmp_path / "job", rank=2, shard=2)
    assert tree(tmp_path / "job") == tree(tmp_path / "whole")
    assert not {"p1.safetensors", "p3.safetensors"} & set(seen)  # they are in shards
    collect(mixed, tmp_path / "job", rank=2, shard=2)  # finished: nothing changes
    assert tree(tmp_path / "job") == tree(tmp_path / "whole")


def test_a_job_killed_before_its_first_shard(mixed, tmp_path):
    layout = Layout(MODULES, 2, 27.0)
    whole = collect(mixed, tmp_path / "whole", rank=2)
    begin(tmp_path / "job", layout, whole.job)
    collect(mixed, tmp_path / "job", rank=2)
    assert tree(tmp_path / "job") == tree(tmp_path / "whole")


def test_another_job_does_not_go_on(mixed, tmp_path):
    collect(mixed, tmp_path / "out")
    before = tree(tmp_path / "out")
    for options, said in (
        ({"rank": 2}, "layout"),
        ({"shard": 3}, "shard"),
        ({"strict": True}, "strict"),
    ):
        with pytest.raises(InputError, match=f"another .*{said}"):
            collect(mixed, tmp_path / "out", **options)
    with open(mixed / "junk.safetensors", "ab") as file:
        file.write(b"!")
    with pytest.raises(InputError, match="another files"):
        collect(mixed, tmp_path / "out")
    assert tree(tmp_path / "out") == before


def test_labels_come_along(mixed, tmp_path):
    names = sorted(p.stem for p in mixed.iterdir())
    rows = "".join(f"{name},{i % 2},{i}\n" for i, name in reversed(list(enumerate(names))))
    (tmp_path / "labels.csv").write_text("name,hat,age\n" + rows)
    made = collect(mixed, tmp_path / "out", labels=tmp_path / "labels.csv")
    table = parquet.read_table(made.labels).to_pylist()
    assert [row["name"] for row in table] == made.names
    assert [row["age"] for row in table] == [names.index(name) for name in made.names]
    assert w2w.fit(tmp_path / "out", 2).attributes == ["hat", "age"]


# --- the command and a real file ------------------------------------------------------------------


def test_the_command(pipe, layout, space, tmp_path):
    pipe.save_pretrained(tmp_path / "base")
    space.save(tmp_path / "space")
    generator = torch.Generator().manual_seed(0)
    folder = tmp_path / "loras"
    folder.mkdir()
    for i in range(13):
        own = Layout(layout.modules, 2, 2.0)
        w2w.export(own, torch.randn(own.size, generator=generator), folder / f"p{i}.safetensors")
    for i in range(11):
        (folder / f"junk{i}.safetensors").write_bytes(b"not safetensors at all")

    def run(line: str) -> str:
        arguments = [part.replace("{}", str(tmp_path)) for part in line.split()]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        return result.stdout

    said = run("collect {}/loras {}/out --layout-of {}/space")
    assert f"13 people of 24 files, {layout.size} numbers each" in said
    assert "energy beyond rank 1: " in said and "set aside: 1 more" in said
    assert "set aside: junk2: junk2.safetensors: not a valid safetensors file" in said
    assert open_population(tmp_path / "out").names == [f"p{i}" for i in range(13)]
    assert "13: p0, p1, p2" in run("info {}/out")
    said = run("collect {}/loras {}/two --base {}/base --rank 2 --targets to_q,to_v")
    assert "energy beyond rank 2: 0.0% on average" in said
    run("collect {}/loras {}/q --base {}/base --targets to_q")
    assert len(open_population(tmp_path / "q").layout.modules) * 2 == len(layout.modules)


def test_a_real_file(tmp_path):
    real = Path(__file__).parents[3] / "shared" / "data" / "analog_svd_rank4.safetensors"
    if not real.is_file():
        pytest.skip(f"no real LoRA at {real}")
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras" / "analog.safetensors").symlink_to(real)
    made = w2w.collect(tmp_path / "loras", tmp_path / "out", Layout.sd15(), progress=False)
    (row,) = made.table.to_pylist()
    assert row["format"] == "cloneofsimo" and row["rank"] == 4 and row["text_encoder"] > 0
    assert 0 < row["lost"] < row["lost_most"] < 1 and 0 < row["outside"] < 1


def test_an_import_takes_the_form_of_the_space(tmp_path):
    """Whatever its rank and gauge, a file is where its own row of the population is."""
    (tmp_path / "loras").mkdir()
    start = factors(3, 0)
    people = [factors(3, i, start) for i in range(1, 9)]
    for i, person in enumerate(people):
        kohya(tmp_path / "loras" / f"p{i}.safetensors", gauged(person, i))
    made = collect(tmp_path / "loras", tmp_path / "population", rank=2)
    space = w2w.fit(made.folder, 5, dtype=torch.float32)
    kohya(tmp_path / "again.safetensors", gauged(people[3], 99))
    c = space.project(formats.for_space(w2w.read_adapter(tmp_path / "again.safetensors"), space))
    assert (c[0] - space.coefficients[3]).abs().max() < 1e-2 * space.sigma[0]
    raw = w2w.fit(made.folder, 5, dtype=torch.float32)
    raw.meta["fit"].pop("made_by")
    with pytest.raises(InputError, match="of another shape"):
        formats.for_space(w2w.read_adapter(tmp_path / "again.safetensors"), raw)
