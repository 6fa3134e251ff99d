"""The benchmarks: every op has cases, a wrong result has no figure, the page says what was run."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from w2w_fast.benchmarks import (
    fit,
    fit_page,
    goals,
    gpu,
    inversion_page,
    inversion_quality,
    populate,
    populate_page,
    report,
)
from w2w_fast.benchmarks import run as runner
from w2w_fast.benchmarks.bench import Setting
from w2w_fast.benchmarks.cases import edit as edit_cases
from w2w_fast.demo import score
from w2w_fast.errors import InputError
from w2w_fast.files import read_json, write_json
from w2w_fast.ops import _dispatch


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> Path:
    """The JSON of a quick run."""
    out = tmp_path_factory.mktemp("results") / "cpu.json"
    assert runner.go(["edit", "merge"], "cpu", True, False, out, False) == 0
    return out


def full(path: Path, folder: Path) -> dict:
    """A quick run passed off as a full one in folder, for pages."""
    run = {**read_json(path), "quick": False}
    write_json(folder / path.name, run)
    return run


@pytest.mark.parametrize("setting", [Setting(quick=True), Setting(), Setting("cuda")], ids=str)
def test_every_op_declares_cases(setting):
    assert set(_dispatch.OPS) <= set(runner.OPS)
    for op in runner.OPS:
        declared = runner.cases(op, setting)
        names = [case.name for case in declared]
        assert names and len(set(names)) == len(names)
        assert all(case.op == op for case in declared)
        for case in declared:
            amount = case.flops if case.floor.startswith("gemm") else case.bytes
            assert amount > 0 if case.floor else "seen" in case.shape


def test_a_run_is_a_table_and_json(quick, capsys):
    run = read_json(quick)
    assert (run["format"], run["quick"], run["device"]) == (runner.FORMAT, True, "cpu")
    assert {"commit", "dirty", "date"} <= set(run) and run["versions"]["torch"]
    assert set(run["floors"]) == {"read", "copy", "gemm float32", "gemm bfloat16"}
    for record in run["cases"]:
        timed = [line for line in record["lines"] if "median" in line]
        assert {line["kind"] for line in timed} >= {"eager", "rival"}
        for line in timed:
            assert 0 < line["best"] <= line["median"] and line["calls"] >= 2 and line["rate"] > 0
    text = runner.table(run)
    assert "quick sizes" in text and "edit: float32 k=4" in text and "torch add" in text
    assert "absent: --no-compile" in text
    heads = [line for line in text.splitlines() if line.startswith("  contender")]
    assert len(heads) == len(run["cases"]) and all("of floor" in head for head in heads)


def test_what_is_not_here_is_said(quick):
    """A backend that cannot serve has its reason, and no figure."""
    found = {name: (good, why) for name, good, why in _dispatch.choices("edit")}
    for record in read_json(quick)["cases"]:
        for line in record["lines"]:
            backend = line["name"].removeprefix("ours, ")
            if backend in found and not found[backend][0]:
                assert (line["state"], line["note"]) == ("absent", found[backend][1])
                assert "median" not in line


def test_a_wrong_result_has_no_figure_and_exit_code_1(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(edit_cases, "_fused", lambda w, delta, amount: w + 1.01 * amount * delta)
    out = tmp_path / "red.json"
    assert runner.go(["edit"], "cpu", True, False, out, False) == 1
    printed = capsys.readouterr().out
    assert "RED: edit: float32 k=1" in printed
    row = next(line for line in printed.splitlines() if line.strip().startswith("torch add"))
    assert "red: torch add[" in row and "of the allowed" in row and " us" not in row
    lines = read_json(out)["cases"][0]["lines"]
    red = [line for line in lines if line["state"] == "red"]
    assert [line["name"] for line in red] == ["torch add"] and "median" not in red[0]
    assert any("median" in line for line in lines), "the others have theirs"


def test_ratios_and_shares_are_of_the_right_lines():
    record = {
        "op": "edit", "name": "x", "floor": "copy", "bytes": 100, "flops": 1, "floor_rate": 40.0,
        "lines": [
            {"name": "a", "kind": "ours", "median": 2.0},
            {"name": "b", "kind": "eager", "median": 6.0},
            {"name": "c", "kind": "eager", "median": 3.0},
            {"name": "d", "kind": "rival", "state": "red"},
        ],
    }  # fmt: skip
    runner.rates(record, {"copy": {"median": 100.0}})
    ours, slow, quick, red = record["lines"]
    assert ours["rate"] == 50 and ours["share"] == 0.5 and ours["ratios"] == {"eager": 1.5}
    assert slow["ratios"] == {} and quick["share"] == pytest.approx(1 / 3)
    assert "rate" not in red


@pytest.mark.parametrize(
    "arguments", [(["nonsense"], "cpu"), (["edit"], "quantum"), (["edit"], "cuda:99")]
)
def test_bad_input(arguments):
    if arguments[1] == "cuda:99" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(InputError):
        runner.go(*arguments, True, False, None, False)


# --- goals and the page ---------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_goal_finds_its_case(device):
    """A goal that names a case no run has would stay "not run" for ever."""
    lines = [
        {"name": name, "kind": kind, "median": 1.0, "share": 1.0, "rate": 1.0}
        for name, kind in (
            ("ours", "ours"), ("torch bfloat16 matmul", "eager"), ("reconstruct alone", "base"),
            ("ours, hooks", "ours"), ("base", "base"), ("PEFT adapter_names", "rival"),
            ("ours, one identity a sample", "ours"),
        )
    ]  # fmt: skip
    facts = {"drift after 10,000 swaps, ours": 0.0, "recompiles in 100 swaps": 0}
    setting = Setting(device)
    declared = [case for op in runner.OPS for case in runner.cases(op, setting)]
    run = {
        "cases": [
            {"op": c.op, "name": c.name, "shape": c.shape, "facts": facts, "lines": lines}
            for c in declared
        ]
    }
    verdicts = {goal.text: goal.judge(run)[1] for goal in goals.GOALS[device]}
    missing = {text: verdict for text, verdict in verdicts.items() if "not run" in verdict}
    assert all("no case" in verdict.split(":", 1)[1] for verdict in missing.values())
    assert len(missing) == (4 if device == "cuda" else 0), missing


def test_a_goal_is_met_or_short_by_so_much():
    goal = goals.Goal("x", lambda run: run["x"], 0.85, goals.percent, bound="the bus")
    assert goal.judge({"x": 0.9}) == ("90.0%", "met")
    assert goal.judge({"x": 0.8}) == ("80.0%", "short by 5.0%; the bus")
    most = goals.Goal("x", lambda run: run["x"], 2.0, goals.times, at_most=True)
    assert most.judge({"x": 1.5})[1] == "met" and most.judge({"x": 2.5})[1] == "short by 0.50x"


def test_the_page_says_what_ran_and_what_did_not(quick, tmp_path):
    results, docs = tmp_path / "results", tmp_path / "docs"
    results.mkdir()
    assert report.runs(results) == []
    empty = report.write(results, docs).read_text()
    assert "## CPU: not run" in empty and "## GPU: not run" in empty
    run = full(quick, results)
    text = report.write(results, docs).read_text()
    assert f"## CPU: {run['machine']['device']}" in text and "## GPU: not run" in text
    assert run["commit"] in text and "### edit" in text and "| torch add |" in text
    gpu_part = text.split("## GPU")[1]
    assert gpu_part.count("| not run |") == len(goals.GOALS["cuda"])
    pictures = {path.name: path.read_bytes() for path in docs.glob("*.png")}
    assert set(pictures) == {"benchmarks-floor-cpu.png", "benchmarks-ratio-cpu.png"} or (
        set(pictures) == {"benchmarks-floor-cpu.png"}  # where no backend of ours is built
    )
    assert all(name in text for name in pictures)
    assert report.write(results, docs).read_text() == text, "the same page from the same results"
    assert {path.name: path.read_bytes() for path in docs.glob("*.png")} == pictures


def test_files_of_one_commit_are_one_run(quick, tmp_path):
    run = full(quick, tmp_path)
    edits = [case for case in run["cases"] if case["op"] == "edit"]
    later = {**run, "date": "2999-01-01T00:00:00+00:00", "cases": edits[:1]}
    write_json(tmp_path / "later.json", later)
    (joined,) = report.runs(tmp_path)
    assert joined["date"] == later["date"] and len(joined["cases"]) == len(run["cases"])
    write_json(tmp_path / "other.json", {**later, "commit": "f" * 40, "date": "3000-01-01"})
    assert len(report.runs(tmp_path)[0]["cases"]) == 1
    (tmp_path / "other.json").write_text(json.dumps({"format": "else"}))
    with pytest.raises(InputError, match="not a benchmark's result"):
        report.runs(tmp_path)


def test_gpu_script_without_a_gpu(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu.py", "--out", str(tmp_path / "out")])
    assert gpu.main() == 0
    assert capsys.readouterr().out == "not run: no CUDA device\n"
    assert not (tmp_path / "out").exists()


def test_gpu_script_reads_summaries_and_goes_on(monkeypatch, tmp_path, capsys):
    assert gpu._errors("========= ERROR SUMMARY: 3 errors\n") == 3
    assert gpu._errors("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors)\n") == 0
    assert gpu._errors("killed") is None
    session = gpu.Session(tmp_path, None)
    assert session.run(["python3", "-c", "print(7); exit(3)"], "a.log", 60) == (3, "7\n")
    assert session.run(["no-such-program-here"], "a.log", 60)[0] == 127
    assert "[exit 3]" in (tmp_path / "a.log").read_text()

    def broken(session):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(gpu, "device", lambda: {"name": "none"})
    monkeypatch.setattr(gpu, "build", broken)
    monkeypatch.setattr(gpu, "tests", lambda session: {"ok": True, "say": "9 passed"})
    arguments = ["gpu.py", "--out", str(tmp_path), "--stages", "build,tests"]
    monkeypatch.setattr("sys.argv", arguments)
    assert gpu.main() == 1
    printed = capsys.readouterr().out
    assert "build: FAILED" in printed and "ZeroDivisionError" in printed
    assert "tests: ok" in printed
    stages = read_json(tmp_path / "summary-build-tests.json")["stages"]
    assert not stages["build"]["ok"] and stages["tests"]["ok"]


@pytest.mark.slow
def test_fit_against_the_others(tmp_path, monkeypatch, capsys):
    """A quick run passed off as a full one: all find the subspace, and the page says so."""
    out = tmp_path / "fit.json"
    monkeypatch.setattr("sys.argv", ["fit.py", "--quick", "--out", str(out)])
    assert fit.main() == 0
    found = read_json(out)
    (case,) = found["cases"]
    lines = {line["name"]: line for line in case["lines"]}
    assert set(lines) == set(fit.CONTENDERS)
    for name in ("w2w_fast", "torch.linalg.svd"):
        assert lines[name]["angle"] < 1e-3 and lines[name]["seconds"] > 0
    for line in lines.values():
        assert abs(line["explained"] - case["best"]) < 0.05 and line["peaks"]["rss"] > 0
    write_json(out, {**found, "quick": False})
    report.write(tmp_path, tmp_path / "docs")
    page = (tmp_path / "docs" / "fit.md").read_text()
    assert "| w2w_fast |" in page and "extrapolated, not run" in page
    assert (tmp_path / "docs" / fit_page.PICTURE).stat().st_size > 10_000
    assert "GPU: not run" in (tmp_path / "docs" / "benchmarks.md").read_text()


def test_a_contender_that_takes_too_long_is_stopped(tmp_path):
    fit.write(tmp_path / "p", 30, 100)
    line = fit.alone("torch.linalg.svd", tmp_path / "p", 5, tmp_path / "out.npy", 0.1)
    assert line["note"] == "stopped after 0 s" and "seconds" not in line
    assert "Not run" in fit_page.page(None)


def test_populate_and_its_page(tmp_path):
    rows = []
    for who, k in (("peft", 1), ("ours", 1), ("ours", 2), ("ours, checkpointing", 2)):
        got = populate.one("tiny", who, k, 1, "cpu")
        assert got["rate"] > 0 and got["peak"] > 0
        rows.append({"base": "tiny", "who": who, "k": k, "steps": 1, "note": "", "rates": [1.0],
                     "rate": 2.0 * k, "peak": got["peak"]})  # fmt: skip
    rows.append({**rows[0], "rate": None, "rates": [], "note": "status 1: no"})
    run = {"format": populate.FORMAT, "quick": False, "device": "cpu", "date": "2026", "rows": rows,
           "machine": {"device": "a machine"}, "versions": {}, "commit": "c",
           "dirty": True}  # fmt: skip
    write_json(tmp_path / "cpu-populate.json", run)
    write_json(tmp_path / "quick.json", {**run, "quick": True, "date": "2027"})
    text = populate_page.write(tmp_path, tmp_path).read_text()
    assert "| ours | 2 | 4.00 | 18.0 | 2.00 |" in text and "| peft | 1 | status 1: no |" in text
    assert "GPU: not run" in text and (tmp_path / "populate-cpu-tiny.png").stat().st_size > 1000


def test_intervals_hold_the_figure_and_grow_with_the_spread():
    values = torch.randn(64, generator=torch.Generator().manual_seed(0))
    figure, low, high = inversion_quality.interval(values)
    assert low < figure < high and figure == pytest.approx(float(values.mean()), abs=1e-6)
    assert high - low == pytest.approx(2 * 1.96 * float(values.std()) / 8, rel=0.15)
    first = {"rank": values, "similarity": values}
    told = inversion_quality.summary({k: v[:32] + 0.5 for k, v in first.items()}, first)
    assert told["similarity less"] == pytest.approx([0.5, 0.5, 0.5], abs=1e-6)


def test_odd_pictures_are_what_they_are_called():
    photos = torch.randint(0, 256, (4, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    photos = photos.to(torch.uint8)
    drawn = inversion_quality.drawn(photos)
    assert drawn.shape == photos.shape and drawn.dtype == torch.uint8
    assert torch.equal(drawn[:, 0], drawn[:, 2])
    turned = inversion_quality.recoloured(photos)
    assert torch.equal(turned[0, 1], photos[0, 0]) and torch.equal(255 - turned[1, 0], photos[1, 2])
    covered = inversion_quality.occluded(photos)
    for i in range(4):
        grey = (covered[i] == 128).all(0)
        assert 0.1 < grey.float().mean() < 0.2
        assert torch.equal(covered[i][:, ~grey], photos[i][:, ~grey])


@pytest.mark.slow
def test_who_is_found_and_the_page_of_it(tmp_path, monkeypatch):
    """Two steps an arm: nobody is found, and everything is told."""
    pytest.importorskip("skimage")
    monkeypatch.setattr(score, "gallery", partial(score.gallery, photos=1))
    for name, value in (("EACH", 2), ("IMAGES", 1), ("RESAMPLES", 50)):
        monkeypatch.setattr(inversion_quality, name, value)
    work, docs, out = tmp_path / "work", tmp_path / "docs", tmp_path / "a.json"
    docs.mkdir()
    call = ["", str(work), "--quick", "--people", "3", "--out", str(out), "--docs", str(docs)]
    monkeypatch.setattr("sys.argv", [*call, "--arm", "one by one"])
    assert inversion_quality.main() == 0 and not out.exists()
    kept = (work / "one-by-one.safetensors").stat().st_mtime_ns
    monkeypatch.setattr("sys.argv", [*call, "--arm", "together"])
    inversion_quality.main()
    monkeypatch.setattr("sys.argv", [*call, "--kept"])
    inversion_quality.main()
    assert set(read_json(out)["arms"]) == {"together", "one by one"}
    assert "other kinds: not run" in inversion_page.page(read_json(out))
    monkeypatch.setattr("sys.argv", call)
    assert inversion_quality.main() == 0
    assert (work / "one-by-one.safetensors").stat().st_mtime_ns == kept
    run = read_json(out)
    alone, together = run["arms"]["one by one"], run["arms"]["together"]
    assert alone["apart"] < 1e-2 and run["quick"] and together["settings"]["steps"] == 2
    write_json(out, {**run, "quick": False})
    assert run["ceiling"]["attributes"][0] > 0.9 > together["similarity"][0]
    assert run["arms"]["together"]["distance"]["inside"] == 1
    text = inversion_page.write(tmp_path, docs).read_text()
    names = {"invert-people.png", "invert-odd.png", inversion_page.PICTURE}
    assert {path.name for path in docs.glob("*.png")} == names and all(n in text for n in names)
    assert "| occluded | 2 |" in text and "Not run" in inversion_page.page(None)
