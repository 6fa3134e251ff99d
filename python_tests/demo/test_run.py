"""`w2w demo`, whole."""

import pytest
from PIL import Image

from w2w_fast import demo
from w2w_fast.coefficients import read_coefficients
from w2w_fast.demo import run
from w2w_fast.errors import InputError


@pytest.mark.slow
def test_demo_writes_a_self_contained_report(tmp_path):
    photo = tmp_path / "me.png"
    run.drawing().save(photo)
    report = run.run(tmp_path / "out", photo)
    text = report.read_text("utf-8")
    assert text.count("data:image/png;base64,") == 4
    assert "http" not in text
    for name in ("sampled", "edited", "inverted", "batch"):
        Image.open(report.parent / f"{name}.png").verify()
    inverted = read_coefficients(report.parent / "inverted.safetensors", demo.space().m)
    assert len(inverted) == 6  # four held out, the drawing, the photo


def test_demo_refuses_before_it_writes(tmp_path):
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        run.run(tmp_path)
    with pytest.raises(InputError, match="nowhere.png"):
        run.run(tmp_path / "new", tmp_path / "nowhere.png")
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]
