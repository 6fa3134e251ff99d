"""The world's score: one part measured anew, the others as they were."""

from __future__ import annotations

import json

import pytest

from w2w_fast import demo
from w2w_fast.demo import score
from w2w_fast.errors import InputError


def test_one_part_is_measured_anew(tmp_path, monkeypatch):
    for name in ("space", "pipeline", "reader.safetensors"):
        (tmp_path / name).symlink_to(demo.WORLD / name)
    with pytest.raises(InputError, match="no such file"):
        score.main([str(tmp_path), "--only", "reader"])
    before = json.loads((demo.WORLD / "score.json").read_text())
    (tmp_path / "score.json").write_text(json.dumps(before))
    monkeypatch.setattr(score, "score_reader", lambda reader: {"attributes_right": 0.25})
    score.main([str(tmp_path), "--only", "reader"])
    after = json.loads((tmp_path / "score.json").read_text())
    assert after["reader"] == {"attributes_right": 0.25} != before["reader"]
    assert {**after, "reader": None} == {**before, "reader": None}
