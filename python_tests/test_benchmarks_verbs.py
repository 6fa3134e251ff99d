"""The benchmarks of generation, inversion and swaps at tiny sizes, and the page made of them."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch

import w2w_fast as w2w
from w2w_fast.benchmarks import generate, generate_page, gpu, invert, models, published, swaps
from w2w_fast.files import read_json, write_json
from w2w_fast.inversion import Inversion
from w2w_fast.recipe import Recipe, draw
from w2w_fast.testing import assert_close

FLOAT = torch.float32
ABOUT = {"machine": {"device": "a machine", "threads": 2, "cores": 2}, "versions": {"torch": "2"},
         "commit": "c", "dirty": False, "quick": False}  # fmt: skip


@pytest.fixture
def tiny():
    return models.model("tiny", "cpu", FLOAT)


def ran(module, arguments, out, monkeypatch):
    monkeypatch.setattr("sys.argv", [module.__name__, *arguments, "--out", str(out)])
    assert module.main() == 0
    found = read_json(out)
    assert found["format"] == module.FORMAT and found["quick"] and found["commit"]
    return found["rows"]


# --- generation -----------------------------------------------------------------------------------


def test_generation_of_steps(tmp_path, monkeypatch):
    rows = ran(generate, ["--base", "tiny", "--quick"], tmp_path / "g.json", monkeypatch)
    assert [(row["b"], row["images"], row["rows"]) for row in rows] == [(1, 1, 1), (2, 2, 4)]
    for row in rows:
        assert set(row["seconds"]) == set(row["put"]) == {
            "base", "ours", "PEFT adapter_names", "PEFT hotswap", "published"
        }  # fmt: skip
        assert list(row["added"]) == ["ours"] and min(row["added"]["ours"]) > 0
        assert all(t > 0 for t in row["seconds"]["ours"]) and len(row["seconds"]["ours"]) == 3
        assert [t is None for t in row["seconds"]["published"]] == [False, True, True]


def test_generation_of_images(tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "STEPS", 1)
    monkeypatch.setattr(generate, "rounds", lambda calls, budget: models.rounds(calls, 0.0, 1))
    arguments = ["--what", "images", "--quick", "--only", "2x2"]
    (row,) = ran(generate, arguments, tmp_path / "g.json", monkeypatch)
    assert "ours, guided" in row["seconds"] and row["rows"] == 8 and "put" not in row
    assert all(times[0] > 0 for times in row["seconds"].values())


@pytest.mark.parametrize("wrong", ["published", "PEFT adapter_names", "PEFT hotswap", "ours"])
def test_a_way_with_a_wrong_result_is_not_timed(wrong, tiny, monkeypatch):
    right = generate.ways

    def ways(*args):
        found = right(*args)
        put = found[wrong].put
        found[wrong].put = lambda c: put(c.flip(0) if len(c) > 1 else -c)
        return found

    monkeypatch.setattr(generate, "ways", ways)
    with pytest.raises(AssertionError, match="of the adapters' effect"):
        generate.case(tiny, "steps", 2, 1, 1, 0.0)


@torch.no_grad()
def test_hooks_alone_give_what_the_modules_gave(tiny):
    """All of them run, on the base's own tensors, and nothing stays on the base."""
    rows, c = generate.Rows.draw(tiny, 2, 1, 1), w2w.sample(tiny.space, 2, seed=0)
    way = generate.ours(tiny, 1, False)
    way.put(c)
    calls = []
    way.hooks = {
        name: (lambda *args, name=name, hook=hook: calls.append((name, hook(*args), args[2])))
        for name, hook in way.hooks.items()
    }
    generate.added(tiny, way, rows)()
    assert {name for name, _, _ in calls} == set(tiny.space.layout.names)
    assert all(y.shape == out.shape and not y.equal(out) for _, y, out in calls)
    assert not any(module._forward_hooks for module in tiny.unet.modules())


def test_rounds_go_to_and_fro():
    said = []
    calls = {name: (lambda name=name: said.append(name)) for name in "abc"}
    times = models.rounds(calls, 0.0, least=4, rarely={"c"})
    assert "".join(said) == "abc" + "ba" + "ab" + "cba"
    assert [t is None for t in times["c"]] == [False, True, True, False]
    assert all(t is not None for t in times["a"] + times["b"])


# --- inversion ------------------------------------------------------------------------------------


def test_the_published_method_is_ours_with_its_settings(tiny):
    """By autograd through the product, or by our backward: the same steps of Adam."""
    (person,) = invert.photographs(tiny, 1)
    recipe = Recipe(steps=4, lr=0.1, prior=0.0)
    draws = [draw(recipe, i, 1000, tiny.latents, "photo") for i in range(4)]
    theirs = published.invert(tiny.pipe, tiny.space, person.photo(0), draws)
    subject = SimpleNamespace(name="0", prompts=("",))
    ours, _ = Inversion(
        tiny.pipe, tiny.space, [subject], recipe, torch.zeros(tiny.space.m), whiten=False,
        weight_decay=1e-10, encoder=lambda _: person,
    ).find()  # fmt: skip
    assert float(ours.abs().min()) > 0.01
    assert_close("c", theirs, ours[0], 1e-3)


@pytest.mark.parametrize(
    ("who", "k", "dtype"),
    [("published", 1, "float32"), ("ours", 2, "bfloat16"), ("ours, checkpointing", 2, "float32")],
)
def test_inversion_has_a_rate_and_a_peak(who, k, dtype):
    got = invert.one("tiny", who, k, 2, dtype, 8, "cpu")
    assert got["rate"] == pytest.approx(2 * k / got["seconds"]) and got["peak"] > 100 << 20


def test_a_line_that_fails_says_so(tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nprint('{\"rate\": 2}') if sys.argv[2] == 'x' else sys.exit('no')"
    )
    assert models.alone(str(script), ["x"], 60) == {"rate": 2}
    assert models.alone(str(script), ["y"], 60) == {"note": "status 1: no"}
    script.write_text("import time\ntime.sleep(60)")
    assert models.alone(str(script), ["x"], 0.2) == {"note": "stopped after 0 s"}
    answers = iter([{"rate": 2.0, "peak": 1}, {"note": "killed"}, {"rate": 4.0, "peak": 3}])
    monkeypatch.setattr(invert, "alone", lambda *_: next(answers))
    saved = []
    invert.measure("tiny", "cpu", 1, 60, saved.append)
    told = [[(row["rate"], row["note"]) for row in rows] for rows in saved]
    assert told[0] == [(2.0, ""), (None, "not run"), (None, "not run")], "saved after each line"
    assert told[2] == [(2.0, ""), (None, "killed"), (4.0, "")]


def test_the_peak_can_start_anew():
    held = bytearray(200 << 20)
    before = models.peak("cpu")
    assert before >= 200 << 20
    del held
    models.forget_peak("cpu")
    assert models.peak("cpu") < before - (100 << 20)


# --- swaps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("merged", [False, True], ids=["hooks", "merged"])
def test_swaps_of_the_world_leave_no_trace(merged):
    of = models.model("world", "cpu", FLOAT)
    found = swaps.swaps(of, 300, merged)
    assert (found["swaps"], found["changed"], found["memory"][-1]["swaps"]) == (300, 0, 300)
    assert generate_page.growth(found) < 32 << 20


def test_a_changed_weight_is_seen(monkeypatch):
    of = models.model("world", "cpu", FLOAT)

    def broken(of, module, batches, k):
        module.conv_in.bias.add_(1e-3)
        return torch.zeros(1)

    monkeypatch.setattr(swaps, "_forward", broken)
    assert swaps.swaps(of, 20, False)["changed"] > 1


def test_swaps_compile_nothing_anew(tiny):
    found = swaps.recompiles(tiny, 20, "eager")
    assert (found["graphs"], found["more"]) == (1, 0) and found["off"] < 1e-5


# --- the page and the GPU's script ----------------------------------------------------------------


def step_row(ratios, **more):
    base = [2.0, 1.0, 1.0, 4.0, 1.0, 1.0, 1.0, 1.0]
    ours = [b * r for b, r in zip(base, ratios, strict=True)]
    times = {"base": base, "ours": ours, "published": [4.0] + [None] * 7}
    return {"base": "world", "what": "steps", "b": 16, "images": 1, "rows": 32, "dtype": "float32",
            "m": 3, "added": {"ours": [0.03]}, "seconds": times,
            "put": {name: [0.1] for name in times}, **more}  # fmt: skip


def test_ratios_are_of_a_round():
    row = step_row([1.01, 1.02, 1.0, 1.01, 1.03, 0.99, 1.01, 1.01])
    mid, low, high, n = generate_page.paired(row, "ours")
    assert (round(mid, 4), n) == (0.01, 8) and low < 0.01 < high
    assert generate_page.paired(row, "published") == (1.0, 1.0, 1.0, 1)


def test_the_page_has_goals_met_and_missed(tmp_path):
    invert_row = {"what": "world", "base": "world", "dtype": "float32", "side": 8, "note": "",
                  "peak": 1 << 30}  # fmt: skip
    memory = [{"swaps": i, "resident": (100 + (i == 20)) << 20} for i in range(1, 21)]
    found = {
        generate.FORMAT: [
            step_row([1.03] * 8), step_row([1.0] * 8, images=4, added={}),
            {**step_row([1.1] * 8), "what": "images"},
        ],
        invert.FORMAT: [
            {**invert_row, "who": "published", "k": 1, "rate": 2.0, "rates": [2.0]},
            {**invert_row, "who": "ours", "k": 1, "rate": 7.0, "rates": [6.0, 8.0]},
            {**invert_row, "who": "ours", "k": 16, "rate": None, "peak": None, "rates": [],
             "note": "status 1: no"},
            {**invert_row, "what": "memory", "base": "sd15", "who": "ours, checkpointing", "k": 1,
             "side": 64, "rate": 1.0, "peak": 5 << 30, "rates": [1.0]},
        ],
        swaps.FORMAT: [
            {"base": "world", "merged": False, "swaps": 20, "seconds": 3.0, "hash": "f" * 64,
             "changed": 0, "memory": memory},
            {"base": "world", "backend": "eager", "swaps": 5, "graphs": 1, "more": 2, "first": 1.0,
             "off": 0.0},
        ],
    }  # fmt: skip
    for i, (name, rows) in enumerate(found.items()):
        run = {"format": name, "device": "cuda", "date": f"2026-{i}", "rows": rows, **ABOUT}
        write_json(tmp_path / f"{i}.json", run)
        write_json(tmp_path / f"{i}-quick.json", {**run, "quick": True, "date": "2027", "rows": []})
    docs = tmp_path / "docs"
    text = generate_page.write(tmp_path, docs).read_text()
    assert "## CPU: not run" in text and "## GPU: a machine" in text
    for cells in (
        ("world, 16 people x 1: at most 1% over the base", "+3.0% (+3.0% to +3.0%, 8 rounds)",
         "short by 2.0%"),
        ("... the hooks alone: world, 16 people x 1: at most 1% over the base", "+3.0%",
         "short by 2.0%"),
        ("world, 16 people x 4: at most 1% over the base", "+0.0% (+0.0% to +0.0%, 8 rounds)",
         "met"),
        ("world, inversion, 1 at once: 3x identities an hour (on a GPU)", "3.50x", "met"),
        ("SD1.5, inversion of one photo in float32: at most 4 GiB", "5.00 GiB",
         "short by 1.00 GiB"),
        ("... the hooks alone: world, 16 people x 4: at most 1% over the base", "", "not run"),
        ("20 swaps, hooks: base weights bitwise unchanged", "0 of the hashes differ", "met"),
        ("5 swaps of a compiled model: no recompile", "2 beyond the first 1 graph(s)",
         "short by 2"),
        ("ours", "16", "float32", "status 1: no", "", "", ""),
        ("ours", "1", "float32", "7.00 (6.00 to 8.00)", "63.0", "3.50", "1.00 GiB"),
    ):  # fmt: skip
        assert f"| {' | '.join(cells)} |" in text, cells
    assert "Noise: half of all calls of the base took +0% to +100% of" in text
    assert "the slowest +300%" in text and "\nNot run: 1 x 1, 4 x 1, 1 x 4, 4 x 4.\n" in text
    pictures = sorted(path.name for path in docs.glob("*.png"))
    assert pictures == [f"generate-{n}-cuda.png" for n in ("invert", "over", "swaps")]
    assert all(name in text for name in pictures)


@pytest.mark.parametrize("name", gpu.VERBS)
def test_the_gpu_script_calls_them_rightly(name, monkeypatch, tmp_path):
    """Every script takes the options that gpu.py gives it."""
    script, *options = gpu.VERBS[name]
    module = importlib.import_module(f"w2w_fast.benchmarks.{script.removesuffix('.py')}")
    called = []
    monkeypatch.setattr(module, "measure", lambda *args: called.append(args) or [])
    monkeypatch.setattr(module, "write_json", lambda *args: None)
    monkeypatch.setattr("sys.argv", [script, *options, "--device", "cpu", "--out", "x.json"])
    assert module.main() == 0 and len(called) == 1


def test_the_gpu_stage_of_verbs(monkeypatch, tmp_path):
    session = gpu.Session(tmp_path, None)

    def run(command, log, limit):
        if "swaps.py" in command[1]:
            return 3, "no memory"
        (tmp_path / command[-1]).write_text("{}")
        return 0, ""

    monkeypatch.setattr(session, "run", run)
    stage = gpu.verbs(session)
    assert not stage["ok"] and "swaps: exit 3 (no memory)" in stage["say"]
    assert stage["files"] == [f"{name}.json" for name in gpu.VERBS if name != "swaps"]


def test_the_ways_leave_the_model_as_it_was(tiny):
    before = swaps.fingerprint(tiny.unet)
    with torch.no_grad():
        for way in generate.ways(tiny, 2, 1, 1).values():
            generate.put(way, w2w.sample(tiny.space, 2, seed=0))
    assert swaps.fingerprint(tiny.unet) == before and not tiny.unet._forward_hooks
