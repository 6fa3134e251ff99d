"""The command line: every verb end to end on a tiny world, and bad input to every verb."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import rich.markup
import torch
import typer
from tiny_world import make_pipe, photographs, tree

import w2w_fast as w2w
from w2w_fast.cli import app

COMMANDS = (
    "populate", "fit", "sample", "edit", "invert", "generate", "export", "import",
    "import-published", "info", "doctor", "demo", "bench", "quantize", "collect", "directions",
    "read", "blend", "calibrate", "slider",
)  # fmt: skip


# --- bad input ----------------------------------------------------------------------------------

BAD = [
    "nonsense",
    "--nonsense",
    # sample
    "sample",
    "sample {}/nowhere",
    "sample {}/base",
    "sample {}/space --n 0",
    "sample {}/space --n 1000000000",
    "sample {}/space --n many",
    "sample {}/space --factor nan",
    "sample {}/space --factor -1",
    "sample {}/space --seed -1",
    "sample {}/space --seed 99999999999999999999999999",
    "sample {}/space --given wings=1",
    "sample {}/space --given beard=2",
    "sample {}/space --given beard",
    "sample {}/space --covariance wide",
    "sample {}/space --method sobol",
    "sample {}/space --novelty --population {}/photos",
    "sample {}/space --out people.pt",
    "sample {}/space --out {}/people.safetensors",
    "sample {}/space --out {}/text.txt/people.safetensors",
    "sample {}/space --out {}/base --overwrite",
    # edit
    "edit {}/space {}/people.safetensors",
    "edit {}/space {}/people.safetensors --set beard",
    "edit {}/space {}/people.safetensors --set hold=age",
    "edit {}/space {}/people.safetensors --set beard=nan",
    "edit {}/space {}/people.safetensors --set wings=1",
    "edit {}/space {}/people.safetensors --set beard=1,hold=beard",
    "edit {}/space {}/narrow.safetensors --set beard=1",
    "edit {}/space {}/lora.safetensors --set beard=1",
    "edit {}/space {}/nan.safetensors --set beard=1",
    "edit {}/space {}/junk.safetensors --set beard=1",
    "edit {}/space {}/pickle.pt --set beard=1",
    "edit {}/space {}/missing.safetensors --set beard=1",
    "edit {}/space {}/people.safetensors --set beard=1 --out {}/people.safetensors",
    "edit {}/space {}/people.safetensors --set beard=1 --scale {}/missing.json",
    "edit {}/space {}/people.safetensors --set beard=1 --scale {}/space/space.json",
    "edit {}/space {}/people.safetensors --set pc7=1",
    # directions, read, blend, calibrate, slider
    "directions {}/nowhere",
    "directions {}/space out",
    "directions {}/space --labels {}/labels.csv",
    "directions {}/space out --labels {}/labels.csv",
    "directions {}/space out --labels {}/few.csv --population {}/population",
    "directions {}/space {}/space --labels {}/labels.csv",
    "read {}/space",
    "read {}/space {}/missing.safetensors",
    "read {}/space {}/narrow.safetensors",
    "read {}/space {}/nobody",
    "read {}/space {}/junk.safetensors",
    "read {}/space {}/people.safetensors --out table.txt",
    "read {}/space {}/people.safetensors --map map.jpg",
    "read {}/space {}/people.safetensors --map map.png --shade wings",
    "read {}/space {}/people.safetensors --shade age",
    "blend {}/space {}/people.safetensors",
    "blend {}/space {}/people.safetensors {}/narrow.safetensors",
    "blend {}/space {}/people.safetensors {}/people.safetensors --rows 0 3",
    "blend {}/space {}/people.safetensors {}/people.safetensors --rows 0 -1",
    "blend {}/space {}/people.safetensors {}/people.safetensors --steps 1",
    "blend {}/space {}/people.safetensors {}/people.safetensors --method cubic",
    "blend {}/space {}/people.safetensors {}/people.safetensors --strip strip.jpg",
    "blend {}/homeless {}/people.safetensors {}/people.safetensors --strip strip.png",
    "calibrate {}/space beard",
    "calibrate {}/space wings --reader numpy:mean",
    "calibrate {}/space beard --reader numpy",
    "calibrate {}/space beard --reader no_such_module:f",
    "calibrate {}/space beard --reader numpy:mean --most 0",
    "calibrate {}/space beard --out scale.txt",
    "slider {}/space out.safetensors",
    "slider {}/space out.safetensors --set beard",
    "slider {}/space out.safetensors --set wings=1",
    "slider {}/space out.safetensors --set hold=age",
    "slider {}/space out.bin --set beard=1",
    "slider {}/space out.safetensors --set beard=1 --format gguf",
    "slider {}/space out.safetensors --set beard=1 --of {}/people.safetensors --row 9",
    "slider {}/space {}/lora.safetensors --set beard=1",
    "slider {}/homeless out.safetensors --set beard=1 --verify",
    # invert
    "invert {}/space",
    "invert {}/space {}/missing.png",
    "invert {}/space {}/text.txt",
    "invert {}/space {}/nobody",
    "invert {}/space {}/mask.png --mask {}/black.png",
    "invert {}/space {}/photos/person-0 --mask {}/mask.png --mask {}/mask.png --mask {}/mask.png",
    "invert {}/space {}/mask.png --steps 1000000",
    "invert {}/space {}/mask.png --lr nan",
    "invert {}/space {}/mask.png --prior -1",
    "invert {}/space {}/mask.png --batch 0",
    "invert {}/space {}/mask.png --base {}/photos",
    "invert {}/space {}/mask.png --base {}/broken",
    "invert {}/space {}/mask.png --device quantum",
    "invert {}/homeless {}/mask.png",
    "invert {}/odd {}/mask.png",
    # generate
    "generate {}/space",
    "generate {}/space --sample 2 --identities {}/people.safetensors",
    "generate {}/space --sample 0",
    "generate {}/space --sample 1000000000",
    "generate {}/space --sample 5000 --per-identity 5000",
    "generate {}/space --sample 1 --steps 1000000",
    "generate {}/space --sample 1 --guidance nan",
    "generate {}/space --sample 1 --strength inf",
    "generate {}/space --sample 1 --prompts {}/long.txt",
    "generate {}/space --sample 1 --prompts {}/huge.txt",
    "generate {}/space --sample 1 --prompts {}/latin.txt",
    "generate {}/space --sample 1 --prompts {}/empty.txt",
    "generate {}/space --sample 1 --prompts {}/missing.txt",
    "generate {}/space --sample 1 --scheduler Fast",
    "generate {}/space --sample 1 --dtype float8",
    "generate {}/space --sample 1 --base {}/nobody",
    "generate {}/space --sample 1 --before {}/people.safetensors",
    "generate {}/space --sample 1 --start 500",
    "generate {}/space --sample 2 --before {}/people.safetensors --start 500",
    "generate {}/space --identities {}/narrow.safetensors",
    "generate {}/space --sample 1 --out {}/photos",
    "generate {}/space --sample 1 --out {}/text.txt",
    "generate {}/space --sample 1 --out {}/text.txt/images",
    "generate {}/space --sample 1 --edits wings=1",
    "generate {}/space --sample 1 --edits beard",
    "generate {}/space --sample 1 --edits hold=age",
    "generate {}/space --sample 1 --format gif",
    "generate {}/space --sample 1 --workers 2",
    "generate {}/space --sample 1 --vram plenty",
    "generate {}/space --sample 1 --vram 1KB",
    "generate {}/space --sample 1 --base demo",
    "generate {}/space --identities {}/nan.safetensors",
    "generate {}/space --sample 1 --before {}/nan.safetensors --start 500",
    "generate {}/space --resume",
    "generate {}/space --resume --out {}/photos",
    "generate {}/homeless --sample 1",
    # populate
    "populate {}/photos",
    "populate {}/photos out",
    "populate {}/missing out --base {}/base",
    "populate {}/nobody out --base {}/base",
    "populate {}/photos out --base {}/nobody",
    "populate {}/photos out --base {}/base --steps 0",
    "populate {}/photos out --base {}/base --steps 1000000",
    "populate {}/photos out --base {}/base --lr nan",
    "populate {}/photos out --base {}/base --train A",
    "populate {}/photos out --base {}/base --alpha nan",
    "populate {}/photos out --base {}/base --batch 1000000",
    "populate {}/photos out --base {}/base --start {}/junk.safetensors",
    "populate {}/photos out --base {}/base --start {}/people.safetensors",
    "populate {}/photos out --base {}/base --start {}/nobody",
    "populate {}/photos out --base {}/base --vram plenty",
    "populate {}/photos out --base {}/base --workers 2",
    "populate {}/photos out --base {}/base --resume",
    "populate {}/photos {}/space --base {}/base",
    # collect
    "collect {}/photos out",
    "collect {}/photos out --base {}/base",
    "collect {}/missing out --layout-of {}/space",
    "collect {}/nobody out --layout-of {}/space --base {}/base",
    "collect {}/population out --layout-of {}/space --rank 2",
    # fit
    "fit {}/population",
    "fit {}/nobody out",
    "fit {}/space out",
    "fit {}/population out --components 12",
    "fit {}/population out --components 0",
    "fit {}/population out --components 3 --labels {}/missing.csv",
    "fit {}/population out --components 3 --labels {}/few.csv",
    "fit {}/population {}/space --components 3",
    "fit {}/population {}/photos --components 3 --overwrite",
    # export
    "export {}/space {}/people.safetensors",
    "export {}/space {}/people.safetensors out.bin",
    "export {}/space {}/people.safetensors out.safetensors --row 3",
    "export {}/space {}/people.safetensors out.safetensors --row -1",
    "export {}/space {}/people.safetensors out.safetensors --format gguf",
    "export {}/space {}/people.safetensors out.safetensors --strength nan",
    "export {}/space {}/narrow.safetensors out.safetensors",
    "export {}/space {}/people.safetensors {}/lora.safetensors",
    "export {}/space {}/people.safetensors {}/photos --format peft --overwrite",
    "export {}/homeless {}/people.safetensors out.safetensors --verify",
    # import
    "import {}/junk.safetensors {}/space",
    "import {}/pickle.pt {}/space",
    "import {}/people.safetensors {}/space",
    "import {}/missing.safetensors {}/space",
    "import {}/lora.safetensors {}/nowhere",
    "import {}/lora.safetensors {}/space --out {}/people.safetensors",
    # import-published
    "import-published {}/missing out",
    "import-published {}/missing out --allow-pickle",
    "import-published {}/missing out --components 0",
    "import-published {}/missing {}/space --allow-pickle",
    # quantize
    "quantize {}/missing {}/x",
    "quantize {}/space {}/x --to int2",
    "quantize {}/space {}/people.safetensors",
    # info, demo
    "info",
    "info {}/missing",
    "info {}/nobody",
    "info {}/junk.safetensors",
    "info {}/pickle.pt",
    "info {}/text.txt",
    "demo --photo {}/text.txt",
    "demo --out {}/photos",
    "demo --out {}/photos --overwrite",
    "bench nonsense",
    "bench edit --device quantum",
    "bench edit --out {}/text.txt",
]


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_line_and_exit_code_2_and_writes_nothing(run, world, tmp_path, line):
    before = tree(world)
    result = run(line, code=2)
    assert re.fullmatch(r"w2w: [^\n]{10,}\n", result.stderr), result.stderr
    assert not result.stdout
    assert list(tmp_path.iterdir()) == []
    assert tree(world) == before


def test_the_table_has_every_command():
    named = {line.split()[0] for line in BAD}
    assert set(COMMANDS) - named == {"doctor"}  # which takes no input


def test_the_process_behaves_as_the_runner(world, tmp_path):
    code = "import sys; from w2w_fast.cli import main; sys.argv = ['w2w', *sys.argv[1:]]; main()"
    line = [sys.executable, "-c", code, "sample", "nowhere"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("w2w: space: no folder nowhere") and done.stderr.count("\n") == 1


def test_other_errors_are_not_swallowed(run, monkeypatch):
    def broken(*args, **kwargs):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("w2w_fast.space.WeightSpace.load", broken)
    with pytest.raises(ZeroDivisionError):
        run("sample {}/space")


def test_terminal_codes_in_names_are_not_obeyed(run):
    result = run("sample \x1b[31mred", code=2)
    assert "\x1b" not in result.stderr and "red" in result.stderr


# --- help ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(run, command):
    text = " ".join(run(f"{command} --help").stdout.split())
    assert "Examples" in text and f"w2w {command}" in text.split("Examples")[1]


def test_no_help_is_swallowed():
    """Square brackets are markup to rich: a help text must not look like any."""
    command = typer.main.get_command(app)
    texts = [c.help for c in command.commands.values()]
    texts += [p.help for c in command.commands.values() for p in c.params if p.help]
    assert len(texts) > 100
    assert [text for text in texts if rich.markup.render(text).plain != text] == []


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from w2w_fast.cli import app; app(['--help'], standalone_mode=False);"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'PIL'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_importing_the_package_imports_no_torch():
    code = (
        "import sys, w2w_fast as w2w; assert 'torch' not in sys.modules; "
        "assert {'sample', 'attach', 'WeightSpace', 'demo'} <= set(dir(w2w))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_are_the_functions():
    from w2w_fast.verbs import edit, fit, generate, generate_to, invert, populate, sample

    for module in (edit, fit, generate, generate_to, invert, populate, sample):
        name = module.__name__.rpartition(".")[2]
        assert getattr(w2w, name) is getattr(module, name)
    assert callable(w2w.attach) and w2w.attach.__name__ == "attach"
    assert w2w.demo.__name__ == "w2w_fast.demo"
    for name in w2w.__all__:
        assert getattr(w2w, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        w2w.nonsense  # noqa: B018


def test_version(run):
    assert run("--version").stdout == f"w2w_fast {w2w.__version__}\n"


# --- the verbs ----------------------------------------------------------------------------------


def test_sample_and_edit(run, world):
    run("sample {}/space --n 3 --seed 1 --out a.safetensors")
    space = w2w.WeightSpace.load(world / "space")
    a = w2w.read_coefficients("a.safetensors", space.m)
    assert torch.equal(a, w2w.sample(space, 3, seed=1))
    run("edit {}/space a.safetensors --set beard=+1.5,hold=age --out b.safetensors")
    want = w2w.edit(space, a, beard=1.5, hold="age")
    assert torch.equal(w2w.read_coefficients("b.safetensors"), want)
    run("sample {}/space --out a.safetensors", code=2)
    run("sample {}/space --out a.safetensors --overwrite")
    assert len(w2w.read_coefficients("a.safetensors")) == 1


def test_populate_and_fit(run, world):
    line = "populate {}/photos made --base {}/base --alpha 8 --steps 2 --batch 1 --class-images 2"
    assert "2 people" in run(line).stdout
    first = tree(Path("made"))
    run(line)  # finished already: nothing changes
    run("populate {}/photos made --base {}/base --resume")
    assert tree(Path("made")) == first
    run(line + " --lr 0.5", code=2)
    line = "populate {}/photos next --base {}/base --alpha 8 --steps 2 --prior 0 --train B"
    run(line + " --start made --vram 1GiB")
    assert "2: person-0, person-1" in run("info next").stdout
    result = run("fit {}/population fitted --components 3 --labels {}/labels.csv --base {}/base")
    assert "hat" in result.stdout and result.stderr == ""
    noisy = run("fit {}/population noisy --components 9 --labels {}/labels.csv")
    assert re.fullmatch(r"w2w: warning: 9 components[^\n]*\n", noisy.stderr)
    space = w2w.WeightSpace.load("fitted")
    assert set(space.meta.pop("readers")) == set(space.attributes)
    assert space.meta.pop("fit")["route"] == "gram"
    assert space.meta == {"prompt": "sks person", "base": str(world / "base")}


def test_invert(run, world):
    run("invert {}/space {}/photos/person-0 {}/photos/person-1/2.png --mask {}/mask.png --seed 4")
    space = w2w.WeightSpace.load(world / "space")
    found = w2w.read_coefficients("inverted.safetensors", space.m)
    photos = photographs(4)[:3]
    pipe = make_pipe(Path("tokenizer"))
    options = {"people": [0, 0, 1], "seed": 4, "progress": False, "prompt": "sks person"}
    want = w2w.invert(space, pipe, photos, steps=3, prior=0.1, **options)  # the space's settings
    assert torch.allclose(found, want, atol=1e-3)
    run("invert {}/space {}/photos/person-0 --paper --steps 1 --out paper.safetensors")
    moved = w2w.read_coefficients("paper.safetensors") - space.mu
    assert torch.allclose(moved.abs(), torch.full_like(moved, 0.1), atol=1e-3)


@pytest.mark.parametrize("format", ["kohya", "diffusers", "peft"])
def test_export_and_import(run, world, format):
    out = "out" if format == "peft" else "out.safetensors"
    result = run(
        f"export {{}}/space {{}}/people.safetensors {out} --row 2 --format {format} --verify"
    )
    assert "16 modules" in result.stdout and "differs by" in result.stdout
    run(f"export {{}}/space {{}}/people.safetensors {out} --format {format}", code=2)
    run(f"export {{}}/space {{}}/people.safetensors {out} --row 2 --format {format} --overwrite")
    assert "16/16 modules" in run(f"import {out} {{}}/space").stdout
    people = w2w.read_coefficients(world / "people.safetensors")
    back = w2w.read_coefficients("imported.safetensors")
    assert torch.allclose(back, people[2:3], atol=1e-3)
    assert format in run(f"info {out}").stdout
    run("export {}/space {}/people.safetensors half.safetensors --strength 0.5")
    space = w2w.WeightSpace.load(world / "space")
    half = w2w.read_adapter("half.safetensors").modules[space.layout.names[0]]
    full = space.layout.split(space.reconstruct(people[0:1])[0])[space.layout.names[0]]
    assert torch.allclose(
        half[1] @ half[0], 0.5 * space.layout.scale * full[1] @ full[0], atol=1e-5
    )


def test_import_published_hands_over_its_options(run, world, monkeypatch):
    """The conversion itself is tested with the formats; here it is a copy of the tiny space."""
    seen = {}

    def convert(folder, out, **options):
        seen.update(options, folder=folder)
        w2w.WeightSpace.load(world / "space").save(out)
        return w2w.WeightSpace.load(out)

    monkeypatch.setattr("w2w_fast.formats.import_published", convert)
    line = "import-published files imported --components 5 --allow-pickle"
    assert "6 components, 40 people" in run(line).stdout
    wanted = {"components": 5, "labels": None, "dtype": "bf16", "allow_pickle": True}
    assert seen == {"folder": Path("files"), **wanted}
    first = tree(Path("imported"))
    run(line, code=2)
    run(line + " --overwrite")
    assert tree(Path("imported")) == first and os.listdir() == ["imported"]
    assert w2w.WeightSpace.load("imported").m == 6


def test_info_and_doctor(run):
    assert "beard, age, glasses" in run("info {}/space").stdout
    assert "12: person-00" in run("info {}/population").stdout
    assert "coefficients" in run("info {}/people.safetensors").stdout
    text = run("doctor").stdout
    assert f"torch          {torch.__version__}" in text
    for op in ("reconstruct", "project", "merge", "edit"):
        assert f"op {op}" in text


def test_quantize(run):
    text = run("quantize {}/space small --to int4").stdout
    assert "small: int4, rms error" in text and w2w.WeightSpace.load("small").quantized
    assert "4-bit integers" in run("info small").stdout
    run("sample small --n 2 --out two.safetensors")
    run("generate small --identities two.safetensors --out pictures")
    run("quantize small smaller", code=2)


def test_nothing_is_looked_up_on_the_network(run, monkeypatch):
    import socket

    def refuse(*args, **kwargs):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    run("generate {}/space --sample 1")
    run("generate {}/space --sample 1 --base runwayml/stable-diffusion-v1-5 --out b", code=2)
