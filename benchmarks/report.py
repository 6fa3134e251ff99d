"""Make docs/benchmarks.md and its pictures from the JSON of runs: ``python benchmarks/report.py``.

And docs/fit.md, docs/populate.md, docs/generate.md and docs/invert.md from those of fit.py, of
populate.py, of generate.py, invert.py and swaps.py, and of inversion_quality.py, by fit_page.py,
populate_page.py, generate_page.py and inversion_page.py.

Of each device the newest full run counts (files of one commit together are one run). Where no run
exists the page says so.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from w2w_fast.benchmarks import (
    fit,
    fit_page,
    generate_page,
    goals,
    inversion_page,
    inversion_quality,
    pictures,
    populate,
    populate_page,
)
from w2w_fast.benchmarks.bench import KINDS
from w2w_fast.benchmarks.run import FORMAT, OPS, VERSION, cells, duration, speed
from w2w_fast.errors import InputError
from w2w_fast.files import atomic_path, read_json

ROOT = Path(__file__).resolve().parents[1]
Run = dict[str, Any]
OTHERS = {fit.FORMAT, populate.FORMAT, *generate_page.FORMATS, inversion_quality.FORMAT}
"""Formats of results that have pages of their own."""

_HEAD = ("case", "contender", "time", "rate", "of floor", *(f"x {kind}" for kind in KINDS[1:]))

INTRO = """\
# Benchmarks

Made by `python benchmarks/report.py` from the files in `benchmarks/results`; nothing here is typed
by hand. `python benchmarks/run.py --out benchmarks/results/NAME.json` makes such a file,
`w2w bench` prints the same tables for your machine, and `python benchmarks/gpu.py` does all that a
machine with a GPU is needed for.

How to read it:

- **time** is the median of a call; all contenders of a case take turns, so that what else the
  machine does hits all alike. A contender is timed only after its result has been checked against
  float64; where the check fails there is no figure.
- **rate** counts the least that must be moved (or computed), whatever a contender really moves.
- **of floor** is that rate over what this machine was measured to do in the same run: reading a
  large buffer (the fastest of three readers; on a GPU the copy) for `reconstruct` and `project`,
  copying one (bytes read and written) for `merge` and `edit`, a square matrix product in the same
  dtype for `adapted_linear` and the UNet. The larger of two medians counts: the whole run's, and
  that of the floor's turns among the contenders.
- **x eager**, **x compile**, **x rival**, **x base**: the time of the fastest contender of that
  kind over this one's: 2 means twice as fast. Eager is plain torch; the rival is what others do:
  the published method's re-projection in every module, PEFT, diffusers; the base has no adapters.
- Before each call of a case bound by memory the caches are overwritten.
"""


def runs(folder: Path) -> list[Run]:
    """The newest full run of each device, CPUs first; files of one commit together are one run."""
    groups: dict[tuple[str, str], dict[str, list[Run]]] = {}
    for path in sorted(folder.glob("*.json")):
        run = read_json(path)
        if isinstance(run, dict) and run.get("format") in OTHERS:
            continue
        if not isinstance(run, dict) or run.get("format") != FORMAT or run["version"] != VERSION:
            raise InputError(f"{path}: not a benchmark's result of version {VERSION}")
        if not run["quick"]:
            key = (run["device"], run["machine"]["device"])
            groups.setdefault(key, {}).setdefault(run["commit"], []).append(run)
    newest = []
    for _, commits in sorted(groups.items()):
        parts = [sorted(part, key=lambda run: run["date"]) for part in commits.values()]
        newest.append(_joined(max(parts, key=lambda part: part[-1]["date"])))
    return newest


def _joined(parts: list[Run]) -> Run:
    """One run of several, each with other cases; of a case that is there twice the later."""
    cases = {(case["op"], case["name"]): case for run in parts for case in run["cases"]}
    order = {op: i for i, op in enumerate(OPS)}
    return {
        **parts[-1],
        "seconds": sum(run["seconds"] for run in parts),
        "dirty": any(run["dirty"] for run in parts),
        "cases": sorted(cases.values(), key=lambda case: order[case["op"]]),
    }


def page(found: list[Run], names: dict[int, list[str]]) -> str:
    """The whole page; names: the pictures of each run, by its place in found."""
    parts = [INTRO]
    for device, title in (("cpu", "CPU"), ("cuda", "GPU")):
        mine = [(i, run) for i, run in enumerate(found) if run["device"] == device]
        if not mine:
            parts.append(
                f"## {title}: not run\n\nNo result of a {title} is in benchmarks/results.\n"
            )
            parts.append(_goals(device, None))
        for i, run in mine:
            parts.append(f"## {title}: {run['machine']['device']}\n\n{_machine(run)}")
            parts.append(_goals(device, run))
            parts += [f"![{name}]({name})\n" for name in names[i]]
            routes = _routes(run)
            if routes:
                parts.append(routes)
            parts += list(_tables(run))
    return "\n".join(parts)


def _machine(run: Run) -> str:
    box, versions = run["machine"], run["versions"]
    changed = " (with uncommitted changes)" if run["dirty"] else ""
    lines = [
        ("device", box["device"]),
        ("CPU", f"{box['cpu']}, {box['threads']} threads of {box['cores']} cores, "
                f"{box['cpu_capability']}, {box['memory_gib']:g} GiB"),
        ("versions", ", ".join(f"{name} {versions[name]}" for name in sorted(versions))),
        ("commit", f"{run['commit']}{changed}"),
        ("date", f"{run['date']}, {run['seconds']:.0f} s"),
        *(
            (f"floor: {name}", f"{speed(rate['median'], name)} (best {speed(rate['best'], name)})")
            for name, rate in sorted(run["floors"].items())
        ),
    ]  # fmt: skip
    return _markdown(("", ""), lines)


def _goals(device: str, run: Run | None) -> str:
    rows = []
    for goal in goals.GOALS[device]:
        measured, verdict = goal.judge(run) if run else ("", "not run")
        rows.append((goal.text, measured, verdict))
    title = "### Goals\n\n"
    return title + _markdown(("goal", "measured", "verdict"), rows)


def _routes(run: Run) -> str:
    """Every route of adapted_linear at every shape; the fastest that carries adapters is bold."""
    records = [record for record in run["cases"] if record["op"] == "adapted_linear"]
    if not records:
        return ""
    names = list(dict.fromkeys(line["name"] for r in records for line in r["lines"]))
    rows = []
    for record in records:
        lines = {line["name"]: line for line in record["lines"] if "median" in line}
        share = next((v for k, v in record["facts"].items() if k.startswith("merged")), 0.0)
        took = {
            name: line["median"] + (share if name.startswith("merged") else 0.0)
            for name, line in lines.items()
        }
        carry = {n: t for n, t in took.items() if lines[n]["kind"] != "base"}
        first = min(carry, key=carry.__getitem__, default=None)
        texts = [duration(took[name]) if name in took else "-" for name in names]
        rows.append(
            (record["name"], *(f"**{t}**" if n == first else t
                               for n, t in zip(names, texts, strict=True)))
        )  # fmt: skip
    told = (
        "### Routes to one adapter a sample\n\n"
        "Time a call; merged weights with their share of being written once in 50 steps. "
        "The fastest that carries adapters is bold.\n\n"
    )
    return told + _markdown(("shape", *names), rows)


def _tables(run: Run) -> Iterator[str]:
    for op in dict.fromkeys(record["op"] for record in run["cases"]):
        rows = []
        facts = []
        for record in run["cases"]:
            if record["op"] != op:
                continue
            name = record["name"]
            for line in record["lines"]:
                got = cells(line, record)
                rows.append((name, *got, *[""] * (len(_HEAD) - 1 - len(got))))
                name = ""
            facts += [f"- {record['name']}: {k}: {v:.4g}" for k, v in record["facts"].items()]
        used = [i for i in range(len(_HEAD)) if i < 3 or any(row[i] for row in rows)]
        rows = [tuple(row[i] for i in used) for row in rows]
        text = f"### {op}\n\n{_markdown(tuple(_HEAD[i] for i in used), rows)}"
        yield text + ("\n" + "\n".join(facts) + "\n" if facts else "")


def _markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    def text(row: tuple[str, ...]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |"

    return "\n".join([text(head), text(("---",) * len(head)), *map(text, rows)]) + "\n"


def write(results: Path, docs: Path) -> Path:
    """The page and its pictures, into docs; pictures of runs that are gone are removed."""
    found = runs(results)
    docs.mkdir(parents=True, exist_ok=True)
    for old in docs.glob("benchmarks-*.png"):
        old.unlink()
    names: dict[int, list[str]] = {}
    counts: dict[str, int] = {}
    for i, run in enumerate(found):
        n = counts[run["device"]] = counts.get(run["device"], 0) + 1
        tag = run["device"] + (f"-{n}" if n > 1 else "")
        names[i] = pictures.draw(run, docs, tag)
    out = docs / "benchmarks.md"
    with atomic_path(out) as temporary:
        temporary.write_text(page(found, names), encoding="utf-8")
    fit_page.write(results, docs)
    populate_page.write(results, docs)
    generate_page.write(results, docs)
    inversion_page.write(results, docs)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    print(write(args.results, args.docs))


if __name__ == "__main__":
    main()
