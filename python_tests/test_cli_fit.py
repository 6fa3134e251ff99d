"""`w2w fit`: what it writes and says, people added to a space, several ranks, bad input."""

from __future__ import annotations

import csv
import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import awkward
import pytest
import torch
from tiny_world import write_population
from typer.testing import CliRunner

from w2w_fast import Layout, WeightSpace, fit
from w2w_fast.cli import app
from w2w_fast.files import check_manifest
from w2w_fast.layout import Module
from w2w_fast.linear import largest_angle
from w2w_fast.testing import assert_close

LAYOUT = Layout(tuple(Module(f"{i}.to_q", 30, 20) for i in range(4)), 1, 8.0)


def people(n: int, seed: int = 0) -> torch.Tensor:
    """Adapters [n, 200] around one start, with a spectrum that falls."""
    moves = awkward.normal(n, 12, seed=seed) * torch.logspace(0, -1, 12)
    noise = 0.005 * awkward.normal(n, LAYOUT.size, seed=seed + 1)
    start = awkward.normal(LAYOUT.size, seed=8)
    return start + 0.1 * moves @ awkward.normal(12, LAYOUT.size, seed=9) + noise


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Two populations from one start, and tables of labels."""
    root = tmp_path_factory.mktemp("world")
    w = people(40)
    names = write_population(root / "old", w, LAYOUT)
    more = write_population(root / "new", people(20, 5), LAYOUT, who="more")
    high = (w @ awkward.normal(LAYOUT.size, seed=4)).argsort().argsort() >= 20
    for name, rows in [("labels", names), ("few", names[:-1]), ("more", [*more, *names])]:
        with (root / f"{name}.csv").open("w", newline="") as file:
            table = [[who, int(high[i % 40]), i / 4] for i, who in enumerate(rows)]
            csv.writer(file).writerows([["name", "hat", "age"], *table])
    return root


@pytest.fixture
def run(world, tmp_path, monkeypatch):
    """Run `w2w fit` in an empty folder, `{}` in the arguments being the world."""
    monkeypatch.chdir(tmp_path)

    def run(line: str, code: int = 0):
        arguments = [part.replace("{}", str(world)) for part in line.split()]
        result = CliRunner().invoke(app, arguments)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        return result

    return run


def digests(folder: str) -> list[str]:
    return [hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(folder).iterdir())]


def test_a_space_has_its_scree_plot_and_its_readings(run):
    line = "fit {}/old one --components 6 --labels {}/labels.csv"
    said = run(line).stdout
    assert re.search(r"\n  hat  balanced accuracy 0\.\d+ \(by chance [^\n]*AUC", said)
    assert re.search(r"\n  age  R2 -?[^\n]*by chance [^\n]*Spearman", said)
    assert set(check_manifest("one")) == {"scree.png", "space.json", "space.safetensors"}
    assert "balanced accuracy" in run("info one").stdout
    run(line.replace(" one ", " two "))
    assert digests("one") == digests("two")


@pytest.mark.parametrize("labels", ["", " --labels {}/labels.csv --method logistic"])
def test_components_are_chosen(run, labels):
    said = run("fit {}/old out --components auto" + labels).stdout
    assert re.search(r"40 people, \d+ components", said)
    assert WeightSpace.load("out").meta["fit"]["of"] == 13


def test_people_are_added_to_a_space(run):
    run("fit {}/old old --components 12 --labels {}/labels.csv --prompt someone")
    said = run("fit {}/new bigger --add old --labels {}/more.csv --check {}/old").stdout
    assert "bigger: 60 people, 12 components" in said and "\n  hat " in said
    found = re.search(r"largest principal angle to a fit of everybody: ([\d.e-]+) rad", said)
    assert float(found[1]) < 0.2  # as it was: test_fit.py holds how near it comes
    space = WeightSpace.load("bigger")
    assert space.names[:40] == WeightSpace.load("old").names and space.names[40] == "more-00"
    assert space.meta["prompt"] == "someone" and space.meta["fit"]["added"] == 20
    assert "directions are left out" in run("fit {}/new third --add old").stderr


BAD = [
    ("fit {}/old out --components many", "whole number from 1, or auto, got 'many'"),
    ("fit {}/old out --components 0", "whole number from 1, or auto, got '0'"),
    ("fit {}/old out --components 40", "wanted 1 to n - 1 = 39 for 40 models, got 40"),
    ("fit {}/old out --components 3 --method svm --labels {}/labels.csv", "got 'svm'"),
    ("fit {}/old out --components 3 --labels {}/few.csv", "1 of 40 people, 'person-39' first"),
    ("fit {}/old out --components 3 --route best", "route: wanted auto, gram"),
    ("fit {}/old out --components 3 --device tpu", "--device 'tpu'"),
    ("fit {}/old out --check {}/old", "--check: wanted with --add only"),
    ("fit {}/old out --add {}/nowhere", "no folder"),
]


@pytest.mark.parametrize(("line", "said"), BAD)
def test_bad_input_is_one_line_and_nothing_written(run, line, said):
    error = run(line, code=2).stderr
    assert said in error and error.count("\n") == 1
    assert os.listdir() == []


def test_not_everything_can_be_added(run):
    run("fit {}/old old --components 6")
    assert "'person-00' is in the space already" in run("fit {}/old out --add old", 2).stderr
    assert "not with --add" in run("fit {}/new out --add old --components auto", 2).stderr
    assert os.listdir() == ["old"]


# --- several processes

TOGETHER = """
import sys
import torch
from w2w_fast import fit, ranks

with ranks.joined():
    for route in ("gram", "covariance", "subspace"):
        space = fit(sys.argv[1], 10, dtype=torch.float32, route=route, labels=sys.argv[2])
        space.save(f"{route}-{ranks.rank()}")
    space = fit(sys.argv[1], "auto", dtype=torch.float32)
    space.save(f"auto-{ranks.rank()}")
"""


def torchrun(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         *arguments],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_two_ranks_fit_the_same_space(run, world):
    Path("together.py").write_text(TOGETHER)
    done = torchrun("together.py", str(world / "old"), str(world / "labels.csv"))
    assert done.returncode == 0, done.stderr
    for route in ("gram", "covariance", "subspace", "auto"):
        one, two = (WeightSpace.load(f"{route}-{rank}") for rank in (0, 1))
        assert torch.equal(one.basis, two.basis) and torch.equal(one.coefficients, two.coefficients)
        alone = fit(
            world / "old", "auto" if route == "auto" else 10, dtype=torch.float32,
            route=route, labels=None if route == "auto" else world / "labels.csv",
        )  # fmt: skip
        assert one.meta["fit"] == alone.meta["fit"]
        for name in ("mean", "std", "explained"):
            assert torch.allclose(getattr(one, name), getattr(alone, name), rtol=1e-6, atol=0)
        assert largest_angle(one.basis, alone.basis) < 1e-5
        assert_close("c", one.coefficients, alone.coefficients, 1e-4)


@pytest.mark.slow
def test_two_ranks_from_the_command_line(run, world):
    done = torchrun("-m", "w2w_fast", "fit", str(world / "old"), "out", "--components", "6")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("40 people, 6 components") == 1 and os.listdir() == ["out"]
    done = torchrun("-m", "w2w_fast", "fit", str(world / "old"), "more", "--components", "40")
    assert done.returncode and done.stderr.count("w2w: components: wanted 1 to n - 1 = 39") == 1
    assert os.listdir() == ["out"]
