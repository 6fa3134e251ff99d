"""The Python on a page of docs/ runs from top to bottom, as a notebook's cells would."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from embed_cases import style_lora
from PIL import Image
from tiny_pipes import make_controlnet, make_sd3, make_xl
from tiny_world import SIZE, make_pipe, make_space, photographs
from unet_inputs import adapters

import w2w_fast as w2w

DOCS = Path(__file__).parents[1] / "docs"


def run_page(name: str, names: dict[str, Any]) -> dict[str, Any]:
    """Runs the page's fenced Python on ``names``; errors show the page's own lines."""
    page = (DOCS / name).read_text()
    for block in re.finditer(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        above = page.count("\n", 0, block.start(1))
        exec(compile("\n" * above + block[1], DOCS / name, "exec"), names)
    return names


def test_embed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # it writes a file
    pipe = make_pipe(tmp_path / "sd")
    picture = Image.fromarray(photographs(1)[0].permute(1, 2, 0).numpy())
    pipes = {"pipe": pipe, "sdxl": make_xl(tmp_path / "xl"), "dit": make_sd3(tmp_path / "sd3")}
    for each in pipes.values():
        each.set_progress_bar_config(disable=True)
    ran = run_page(
        "embed.md",
        {
            **pipes,
            "space": make_space(w2w.Layout.discover(pipe.unet, alpha=8.0)),
            "controlnet": make_controlnet(pipe.unet),
            "style": style_lora(pipe.unet),
            "adapters_of_people": lambda layout: adapters(layout, 20),
            **dict.fromkeys(("photo", "face", "pose"), picture),
            "size": SIZE,
        },
    )
    drawn = {
        "images": 2, "swapped": 2, "several": 6, "slider": 3, "late": 3, "by_hand": 3,
        "redrawn": 2, "filled": 2, "same_pose": 2, "drawn_in_style": 2, "morph": 5, "large": 2,
    }  # fmt: skip
    assert {name: len(ran[name]) for name in drawn} == drawn
    written = w2w.read_adapter(tmp_path / "me.safetensors")
    assert set(written.modules) == set(ran["layout"].names)
    for each in pipes.values():
        model = getattr(each, "unet", None) or each.transformer
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_evaluate(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_page("evaluate.md", {})
    assert (tmp_path / "report" / "report.html").exists()
    assert "balanced accuracy" in capsys.readouterr().out
