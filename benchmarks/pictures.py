"""The pictures of docs/benchmarks.md: how near the floor, and how far ahead of the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_COLOURS = {
    "ours": "#0b6e4f",
    "eager": "#8d99ae",
    "compile": "#3a6ea5",
    "rival": "#d1495b",
    "base": "#c9a227",
}
_LABELS = {
    "eager": "over plain torch",
    "compile": "over torch.compile",
    "rival": "over the rival",
    "base": "over the base",
}
_MARKS = "osD^vP"


def draw(run: dict[str, Any], folder: Path, tag: str) -> list[str]:
    """Write benchmarks-floor-TAG.png and benchmarks-ratio-TAG.png; the names of those written."""
    names = []
    for name, picture in (("floor", _floor), ("ratio", _ratio)):
        file = f"benchmarks-{name}-{tag}.png"
        if picture(run, folder / file):
            names.append(file)
    return names


def _figure(rows: list[str], title: str) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 1.3 + 0.24 * len(rows)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="x", color="#e3e6ea", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_title(title, loc="left", fontsize=10)
    return figure, axes


def _finish(figure: Any, axes: Any, path: Path) -> bool:
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    axes.legend(
        once.values(), once.keys(), fontsize=8, frameon=False, ncols=3,
        loc="upper left", bbox_to_anchor=(0, -0.03 - 1.2 / figure.get_figheight() / 2),
    )  # fmt: skip
    figure.savefig(path, metadata={"Software": None})  # the same bytes for the same numbers
    return True


def _floor(run: dict[str, Any], path: Path) -> bool:
    """Share of the floor of every line of the ops that memory bounds."""
    records = [
        record
        for record in run["cases"]
        if record["floor"] in ("read", "copy") and any("share" in x for x in record["lines"])
    ]
    if not records:
        return False
    title = f"Share of the machine's measured memory rate: {run['machine']['device']}"
    figure, axes = _figure([f"{r['op']}  {r['name']}" for r in records], title)
    ours = list(dict.fromkeys(
        x["name"] for r in records for x in r["lines"] if x["kind"] == "ours"
    ))  # fmt: skip
    for y, record in enumerate(records):
        for line in record["lines"]:
            if "share" not in line:
                continue
            kind = line["kind"]
            mark = _MARKS[ours.index(line["name"]) % len(_MARKS)] if kind == "ours" else "|"
            axes.plot(
                line["share"], y, mark, color=_COLOURS[kind], markersize=8 if kind == "ours" else 9,
                markeredgewidth=None if kind == "ours" else 2,
                label=line["name"] if kind == "ours" else {
                    "eager": "plain torch", "compile": "torch.compile", "rival": "the rival",
                    "base": "base",
                }[kind],
            )  # fmt: skip
    axes.axvline(1.0, color="#444", linewidth=1)
    axes.set_xlim(0, max(1.1, *axes.get_xlim()))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    return _finish(figure, axes, path)


def _ratio(run: dict[str, Any], path: Path) -> bool:
    """How many times as fast the best of ours is as the fastest of each other kind."""
    rows = []
    for record in run["cases"]:
        ours = [x for x in record["lines"] if x["kind"] == "ours" and "median" in x]
        if ours:
            line = min(ours, key=lambda x: x["median"])
            rows.append((f"{record['op']}  {record['name']}", line["ratios"]))
    rows = [(name, ratios) for name, ratios in rows if ratios]
    if not rows:
        return False
    title = f"Our fastest, times as fast as: {run['machine']['device']}"
    figure, axes = _figure([name for name, _ in rows], title)
    for y, (_, ratios) in enumerate(rows):
        for kind, label in _LABELS.items():
            if kind in ratios:
                axes.plot(ratios[kind], y, "o", color=_COLOURS[kind], markersize=6, label=label)
    axes.axvline(1.0, color="#444", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}x")
    return _finish(figure, axes, path)
