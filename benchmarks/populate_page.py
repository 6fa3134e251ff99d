"""docs/populate.md and its pictures, of the newest JSON of populate.py for each device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from w2w_fast.benchmarks import populate
from w2w_fast.files import atomic_path, read_json

STEPS = {"world": 300, "sd15": 800}
"""Of the recipe whose people an hour are told: the world's own, and the paper's."""
PUBLISHED = 220.0  # seconds a person, 800 steps on an A100 (w2w paper, section 4.2)
Run = dict[str, Any]

INTRO = """\
# People an hour

Made by `python benchmarks/report.py`; the figures come from `python benchmarks/populate.py`.

`populate` trains many people's adapters in one batch on one frozen base; the rival is what a user
writes today, PEFT and AdamW, one person after the other. Same settings for both: rank 1 on to_q and
to_v, one photo a step, no prior preservation, float32, photographs and text encoded beforehand.
Rates are sample-steps a second; people an hour follow from the recipe's steps (world: 300, SD1.5:
the paper's 800). Peak memory is the process's resident set on a CPU, what was allocated on a GPU.
The SD1.5-size base has random weights and latents of 8 x 8, a sixty-fourth of the real size: its
rates compare the two ways of training, and are no forecast of real photographs.
"""


def newest(folder: Path) -> dict[str, Run]:
    """The newest full run of each kind of device."""
    found: dict[str, Run] = {}
    for path in sorted(folder.glob("*.json")):
        run = read_json(path)
        if isinstance(run, dict) and run.get("format") == populate.FORMAT and not run["quick"]:
            old = found.get(run["device"])
            if old is None or run["date"] > old["date"]:
                found[run["device"]] = run
    return found


def page(runs: dict[str, Run]) -> str:
    parts = [INTRO]
    for device, title in (("cpu", "CPU"), ("cuda", "GPU")):
        if device not in runs:
            parts.append(f"## {title}: not run\n")
            continue
        run = runs[device]
        changed = " (with uncommitted changes)" if run["dirty"] else ""
        versions = ", ".join(f"{k} {v}" for k, v in sorted(run["versions"].items()))
        parts.append(
            f"## {title}: {run['machine']['device']}\n\n{versions}; commit {run['commit']}"
            f"{changed}, {run['date']}. Medians of {len(run['rows'][0]['rates'])} rounds, whose "
            f"rates differed by {_spread(run):.0%} on average.\n"
        )
        for name in dict.fromkeys(row["base"] for row in run["rows"]):
            parts.append(_table(name, [row for row in run["rows"] if row["base"] == name]))
            parts.append(f"![people an hour]({_picture(device, name)})\n")
    return "\n".join(parts)


def _spread(run: Run) -> float:
    spreads = [max(r["rates"]) / min(r["rates"]) - 1 for r in run["rows"] if r["rates"]]
    return sum(spreads) / len(spreads)


def _picture(device: str, name: str) -> str:
    return f"populate-{device}-{name}.png"


def _table(name: str, rows: list[dict[str, Any]]) -> str:
    rival = next((row["rate"] for row in rows if row["who"] == "peft"), None)
    text = [f"### {name}\n", "| who | K | sample-steps/s | people an hour | x PEFT | peak |",
            "| --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for row in rows:
        if row["rate"] is None:
            text.append(f"| {row['who']} | {row['k']} | {row['note']} | | | |")
            continue
        ratio = f"{row['rate'] / rival:.2f}" if rival else ""
        hour = 3600 * row["rate"] / STEPS.get(name, 800)
        text.append(
            f"| {row['who']} | {row['k']} | {row['rate']:.2f} | {hour:.1f} | {ratio} "
            f"| {row['peak'] / 2**30:.2f} GiB |"
        )
    if name == "sd15":
        text.append(
            f"\nFor comparison, the published population: {PUBLISHED:.0f} s a person on an A100, "
            f"{800 / PUBLISHED:.1f} steps a second of two samples each (photo and class)."
        )
    return "\n".join(text) + "\n"


def write(results: Path, docs: Path) -> Path:
    """The page and its pictures, into docs; pictures of runs that are gone are removed."""
    from matplotlib.figure import Figure

    runs = newest(results)
    for old in docs.glob("populate-*.png"):
        old.unlink()
    for device, run in runs.items():
        for name in dict.fromkeys(row["base"] for row in run["rows"]):
            rows = [row for row in run["rows"] if row["base"] == name and row["rate"]]
            own = [row for row in rows if row["who"] == "ours"]
            figure = Figure(figsize=(7, 2.8), layout="constrained")
            left, right = figure.subplots(1, 2)
            x = [row["k"] for row in own]
            left.plot(x, [row["rate"] for row in own], "o-", label="populate")
            for row in rows:
                if row["who"] == "peft":
                    left.axhline(row["rate"], color="tab:red", ls="--", label="PEFT, one by one")
            right.plot(x, [row["peak"] / 2**30 for row in own], "o-")
            for axes, what in ((left, "sample-steps a second"), (right, "peak memory, GiB")):
                axes.set(xscale="log", xlabel="people at once", title=what)
                axes.set_ylim(0, None)
                axes.set_xticks(x, [str(k) for k in x])
                axes.minorticks_off()
            left.legend(frameon=False)
            figure.savefig(docs / _picture(device, name), dpi=110)
    out = docs / "populate.md"
    with atomic_path(out) as temporary:
        temporary.write_text(page(runs), encoding="utf-8")
    return out
