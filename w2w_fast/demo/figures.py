"""The world's figures as people read them: one table for the demo's report, README and docs.

`python -m w2w_fast.demo.figures README.md docs/world.md` writes them from the world that ships
between each file's `<!-- NAME -->` and `<!-- /NAME -->`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import WORLD, space

Row = tuple[str, str, str]


def rows(score: dict[str, Any]) -> list[Row]:
    """(what, measured, goal) of score.json, as texts."""
    populated, edits, sampled = score["populated"], score["edits"], score["sampled"]
    w2w, rival = score["inversion"]["w2w"], score["inversion"]["one_photo_adapter"]
    people = score["people"]
    return [
        ("populated people, fresh seeds and prompts: binary attributes right",
         _share(populated["attributes_right"]), "90%"),
        (f"... found among all {people:,}, 8 pictures averaged (top 1; chance {1 / people:.1%})",
         _share(populated["retrieval_top1"]), "60%"),
        ("... the prompt's place is there", _share(populated["prompt_followed"]), ""),
        ("... a whole face", _share(populated["face"]), ""),
        ("sliders that flip their attribute in 90% of cases at some strength",
         f"{edits['reached']} of {len(edits['attributes'])}", f"{len(edits['attributes'])}"),
        ("... other attributes changed there", _share(edits["others_changed"]), "15% at most"),
        ("... still a face", _share(edits["face"]), ""),
        ("one photo of a held-out person, new places and poses: attributes right",
         _share(w2w["attributes_right"]), "85%"),
        ("... prompt followed", _share(w2w["prompt_followed"]), "90%"),
        ("... both together; a one-photo adapter without the space",
         f"{_share(w2w['both'])}; {_share(rival['both'])}", "better"),
        ("sampled people: whole faces", _share(sampled["face"]), "95%"),
        ("... similarity of one person's pictures; of different people's",
         f"{sampled['similarity_within']:.2f}; {sampled['similarity_between']:.2f}", ""),
    ]  # fmt: skip


def table(score: dict[str, Any]) -> str:
    """The rows as a Markdown table."""
    lines = ["| measured by the reader | | goal |", "| --- | --- | --- |"]
    return "\n".join([*lines, *(f"| {what} | {got} | {goal} |" for what, got, goal in rows(score))])


def details(score: dict[str, Any]) -> str:
    """What the components hold, how well adapters are read, and each attribute, in Markdown."""
    world = space()
    explained = world.explained.cumsum(0)
    held = ", ".join(f"{explained[m - 1]:.0%} by {m}" for m in (10, 100, world.m))
    readers = world.meta["readers"]
    shown, edits = score["populated"]["by_attribute"], score["edits"]["attributes"]
    lines = [
        f"Of the population's variance {held} components. Binary attributes, read from left-out "
        "adapters, seen in populated people's pictures, and edited (at the first of 2 to 6 sd that "
        "flips 90%, or at 6):",
        "",
        "| attribute | read | seen | edit flips | others changed | faces |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in sorted(shown, key=shown.get, reverse=True):
        at = edits[name]["at"]
        flips = f"{_share(at['flips'])} at {at['strength']:g} sd"
        cells = (readers[name]["accuracy"], shown[name], flips, at["others_changed"], at["face"])
        lines.append(f"| {_words(name)} | {' | '.join(map(_share, cells))} |")
    rest = {name: found["r2"] for name, found in readers.items() if name not in shown}
    best = sorted(rest.items(), key=lambda item: -item[1])
    lines += ["", "Continuous attributes are read with R2 " + _listed(best) + "."]
    return "\n".join(lines)


def _share(value: float | str | None) -> str:
    return value if isinstance(value, str) else "-" if value is None else f"{value:.0%}"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _listed(items: Iterable[tuple[str, float]]) -> str:
    return ", ".join(f"{value:.2f} ({_words(name)})" for name, value in items)


def update(text: str) -> str:
    """text with every marked part written anew from the world that ships."""
    score = json.loads((WORLD / "score.json").read_text())
    for name, part in (("figures", table(score)), ("details", details(score))):
        first, last = f"<!-- {name} -->", f"<!-- /{name} -->"
        if first in text:
            before, _, rest = text.partition(first)
            text = f"{before}{first}\n{part}\n{last}{rest.partition(last)[2]}"
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+")
    for path in parser.parse_args().files:
        path.write_text(update(path.read_text()))
