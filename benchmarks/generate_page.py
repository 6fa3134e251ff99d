"""docs/generate.md and its pictures, of the JSON of generate.py, invert.py and swaps.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import sqrt
from pathlib import Path
from statistics import median
from typing import Any

from w2w_fast.benchmarks import generate, invert, swaps
from w2w_fast.files import atomic_path, read_json

FORMATS = {generate.FORMAT: "generate", invert.FORMAT: "invert", swaps.FORMAT: "swaps"}
KEYS = {
    "generate": ("base", "what", "b", "images"),
    "invert": ("base", "who", "k", "dtype", "side"),
    "swaps": ("base", "merged", "backend"),
}
COLOURS = {
    "ours": "#0b6e4f", "ours, guided": "#7cb518", "PEFT adapter_names": "#d1495b",
    "PEFT hotswap": "#c9a227", "published": "#3a6ea5",
}  # fmt: skip
Row = dict[str, Any]
Runs = dict[str, list[Row]]

INTRO = f"""\
# Many people a batch, photos inverted, people swapped

Made by `python benchmarks/report.py`; the figures come from `benchmarks/generate.py`, `invert.py`
and `swaps.py`, on two models: the world that ships, and a UNet of SD1.5's size with random weights
and a random space (m = 1,000). That one has no VAE: there steps of the denoiser count, not images.

**Generation.** B people, so many images each, six ways around one set of weights:

| way | what it is |
| --- | --- |
| base | the model without adapters, on the same rows |
| ours | `attach`, one identity a sample; "guided" runs the unconditional rows without adapters |
| PEFT adapter_names | PEFT's mixed batches, the B adapters loaded, one named for each row |
| PEFT hotswap | `load_lora_adapter(hotswap=True)`, one person after the other |
| published | the basis times c again in every module at every call, one person after the other |

A way is timed after its result was found to be that of `attach`. All take turns, in the other order
each round, so that what else the machine does hits all alike. **over base** is the median of the
ratios to the base within a round, with the 95% interval of that median by order statistics (all
there is where rounds are fewer than six). An interval that holds 0% means: not told apart from the
base. **hooks alone** is what `attach` adds to a step, timed without the model around it, as a share
of the base's median: steadier than the difference of two large numbers. **new people** is what
putting in B others takes, once an image. **images** are whole calls of the pipeline with
{generate.STEPS} steps, guidance, text encoder and VAE, new people in each.
The world's steps have the doubled batch of guidance, the SD1.5-size ones one row an image, of 8 x 8
latents on a CPU (a sixty-fourth of the real size) and 64 x 64 on a GPU.

**Inversion.** `invert` against the published method: one person at a time, gradients through the
product with the basis by autograd, Adam on c. It is written here from the paper's formulas, in the
model's dtype, and spared the encoding of photo and text at every step. Sample-steps a second; an
identity takes 400 of them. Every line is a process of its own; peak memory is its resident set on a
CPU, what was allocated on a GPU, the model included.

**Swaps.** Identities put into one live model, one to four a batch, a forward after every tenth. The
weights are hashed at each thousand.
"""


# --- reading --------------------------------------------------------------------------------------


def newest(folder: Path) -> dict[str, tuple[Runs, list[Row]]]:
    """device -> (rows by kind, the newest of each; the runs that they are of)."""
    found: dict[str, tuple[dict[str, dict[tuple, Row]], dict[str, Row]]] = {}
    runs = [(path.name, read_json(path)) for path in sorted(folder.glob("*.json"))]
    mine = [(n, r) for n, r in runs if isinstance(r, dict) and r.get("format") in FORMATS]
    for name, run in sorted(mine, key=lambda pair: pair[1]["date"]):
        if run["quick"]:
            continue
        kind = FORMATS[run["format"]]
        rows, of = found.setdefault(run["device"], ({k: {} for k in KEYS}, {}))
        for row in run["rows"]:
            rows[kind][tuple(row.get(key) for key in KEYS[kind])] = row
        of[name] = run
    return {
        device: ({k: list(v.values()) for k, v in rows.items()}, list(of.values()))
        for device, (rows, of) in found.items()
    }


def paired(row: Row, name: str) -> tuple[float, float, float, int]:
    """(median, low, high) of the ratios to the base within a round, less 1; the rounds."""
    pairs = zip(row["seconds"][name], row["seconds"]["base"], strict=True)
    ratios = sorted(mine / base - 1 for mine, base in pairs if mine is not None)
    n = len(ratios)
    # The ranks of a sign test's interval, by the normal law: n / 2 -+ 1.96 sqrt(n) / 2.
    reach = 0.98 * sqrt(n)
    low, high = int((n - 1) / 2 - reach), int((n - 1) / 2 + reach + 1)
    return median(ratios), ratios[max(0, low)], ratios[min(n - 1, high)], n


def took(row: Row, name: str) -> float:
    return median(t for t in row["seconds"][name] if t is not None)


def added(row: Row, name: str) -> float:
    """Seconds of the hooks alone."""
    return median(row["added"][name])


def rate(rows: list[Row], base: str, who: str, k: int) -> float | None:
    found = [r for r in rows if (r["base"], r["who"], r["k"], r["what"]) == (base, who, k, base)]
    return found[0]["rate"] if found else None


# --- the page -------------------------------------------------------------------------------------


def page(found: dict[str, tuple[Runs, list[Row]]]) -> str:
    parts = [INTRO]
    for device, title in (("cpu", "CPU"), ("cuda", "GPU")):
        if device not in found:
            parts.append(f"## {title}: not run\n")
            continue
        rows, runs = found[device]
        parts += [f"## {title}: {runs[-1]['machine']['device']}\n", _about(runs)]
        parts += [_table(("goal", "measured", "verdict"), goals(device, rows))]
        if rows["generate"]:
            parts += ["### Generation\n", f"![over the base](generate-over-{device}.png)\n"]
            parts += list(_generation(rows["generate"]))
        if rows["invert"]:
            parts += ["### Inversion\n", f"![inversion](generate-invert-{device}.png)\n"]
            parts += list(_inversion(rows["invert"]))
        if rows["swaps"]:
            parts += ["### Swaps\n", f"![memory over swaps](generate-swaps-{device}.png)\n"]
            parts.append(_swaps(rows["swaps"]))
    return "\n".join(parts)


def _about(runs: list[Row]) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in sorted(runs[-1]["versions"].items()))
    lines = [f"{versions}.\n"]
    for run in runs:
        changed = " (with uncommitted changes)" if run["dirty"] else ""
        lines.append(
            f"- {FORMATS[run['format']]}, {run['date']}, commit {run['commit']}{changed}, "
            f"threads {run['machine']['threads']}, cores {run['machine']['cores']}"
            + (f"; {run['note']}" if run.get("note") else "")
        )
    return "\n".join(lines) + "\n"


def goals(device: str, rows: Runs) -> Iterator[tuple[str, str, str]]:
    """(what was aimed at, measured, verdict) of every goal that the rows have an answer to."""
    for row in rows["generate"]:
        if row["b"] >= 8 and row["what"] == "steps":
            mid, low, high, n = paired(row, "ours")
            verdict = "met" if mid <= 0.01 else f"short by {mid - 0.01:.1%}"
            if mid <= 0.01 < high:
                verdict += ", but the interval reaches beyond"
            elif low <= 0.01 < mid:
                verdict += ", the interval holds the goal"
            what = f"{row['base']}, {row['b']} people x {row['images']}: at most 1% over the base"
            yield what, f"{mid:+.1%} ({low:+.1%} to {high:+.1%}, {n} rounds)", verdict
            share, verdict = None, "not run"
            if row.get("added"):
                share = added(row, "ours") / took(row, "base")
                verdict = "met" if share <= 0.01 else f"short by {share - 0.01:.1%}"
            yield f"... the hooks alone: {what}", "" if share is None else f"{share:+.1%}", verdict
    for base in ("world", "sd15"):
        for k, goal in ((1, 3.0), (16, 10.0)):
            mine, other = (
                rate(rows["invert"], base, who, j) for who, j in (("ours", k), ("published", 1))
            )
            if mine and other:
                met = "met" if mine / other >= goal else f"short by {goal - mine / other:.2f}x"
                told = "no goal on a CPU, where the work itself is the bound"
                yield (
                    f"{base}, inversion, {k} at once: {goal:g}x identities an hour (on a GPU)",
                    f"{mine / other:.2f}x", told if device == "cpu" else met,
                )  # fmt: skip
    for row in rows["invert"]:
        if row["what"] == "memory" and row["who"] == "ours, checkpointing" and row["peak"]:
            size = row["peak"] / 2**30
            verdict = "met" if size <= 4 else f"short by {size - 4:.2f} GiB"
            if row["side"] < 64:
                verdict = f"not shown: latents of {row['side']} x {row['side']}"
            yield (
                f"SD1.5, inversion of one photo in {row['dtype']}: at most 4 GiB",
                f"{size:.2f} GiB", verdict,
            )  # fmt: skip
    for row in rows["swaps"]:
        how = "merged" if row.get("merged") else "hooks"
        if "memory" in row:
            yield (
                f"{row['swaps']:,} swaps, {how}: base weights bitwise unchanged",
                f"{row['changed']} of the hashes differ", "met" if not row["changed"] else "broken",
            )  # fmt: skip
            grown = growth(row)
            yield (
                f"{row['swaps']:,} swaps, {how}: memory flat (8 MiB at most after the first tenth)",
                f"{grown / 2**20:+.1f} MiB", "met" if grown <= 8 << 20 else "short",
            )  # fmt: skip
        else:
            yield (
                f"{row['swaps']} swaps of a compiled model: no recompile",
                f"{row['more']} beyond the first {row['graphs']} graph(s)",
                "met" if not row["more"] else f"short by {row['more']}",
            )


def growth(row: Row) -> int:
    """Bytes of resident memory that came after the first tenth of the swaps."""
    points = row["memory"]
    return points[-1]["resident"] - points[len(points) // 10]["resident"]


def _generation(rows: list[Row]) -> Iterator[str]:
    for base, what in dict.fromkeys((row["base"], row["what"]) for row in rows):
        cells, mine = [], [r for r in rows if (r["base"], r["what"]) == (base, what)]
        for row in sorted(mine, key=lambda row: (row["images"], row["b"])):
            n = row["b"] * row["images"]
            for name in (name for name in ("base", *COLOURS) if name in row["seconds"]):
                seconds, over = took(row, name), ""
                if name != "base":
                    mid, low, high, rounds = paired(row, name)
                    over = f"{mid:+.1%} ({low:+.1%} to {high:+.1%}; {rounds})"
                first = f"{row['b']} x {row['images']}" if name == "base" else ""
                line = [first, name, f"{seconds * 1e3:,.0f} ms", f"{n / seconds:.2f}", over]
                if what == "steps":
                    line.append(f"{median(row['put'][name]) * 1e3:.1f} ms")
                    hooked = name in row.get("added", {})
                    line.append(f"{added(row, name) / took(row, 'base'):+.1%}" if hooked else "")
                cells.append(tuple(line))
        unit = "step" if what == "steps" else "call"
        per = "image steps/s" if what == "steps" else "images/s"
        head = ["people x images", "way", f"a {unit}", per, "over base (95%; rounds)"]
        yield f"#### {base}, {what} ({mine[0]['dtype']})\n"
        more = ("new people", "hooks alone") if what == "steps" else ()
        yield _table((*head, *more), cells)
        yield _noise(mine)
        wanted = [(b, images) for b, images, _ in generate.cases(base, what, "all")]
        there = {(row["b"], row["images"]) for row in mine}
        missing = [f"{b} x {images}" for b, images in wanted if (b, images) not in there]
        if missing:
            yield f"Not run: {', '.join(missing)}.\n"


def _noise(rows: list[Row]) -> str:
    """How much calls of the base differ among themselves."""
    share = sorted(t / took(row, "base") - 1 for row in rows for t in row["seconds"]["base"])
    low, high = share[len(share) // 4], share[3 * len(share) // 4]
    return (
        f"Noise: half of all calls of the base took {low:+.0%} to {high:+.0%} of their case's "
        f"median, the slowest {share[-1]:+.0%}.\n"
    )


def _inversion(rows: list[Row]) -> Iterator[str]:
    for what in dict.fromkeys(row["what"] for row in rows):
        mine = [row for row in rows if row["what"] == what]
        rival = rate(rows, what, "published", 1)
        cells = []
        for row in mine:
            start = (row["who"], row["k"], row["dtype"], f"{row['side']} x {row['side']}")
            if row["rate"] is None:
                cells.append((*start[: 4 if what == "memory" else 3], row["note"], "", "", ""))
                continue
            ratio = f"{row['rate'] / rival:.2f}" if rival else ""
            size = f"{row['peak'] / 2**30:.2f} GiB"
            if what == "memory":
                cells.append((*start, size))
                continue
            spread = f"{min(row['rates']):.2f} to {max(row['rates']):.2f}"
            hour = f"{9 * row['rate']:.1f}"
            cells.append((*start[:3], f"{row['rate']:.2f} ({spread})", hour, ratio, size))
        if what == "memory":
            yield "#### memory of one photo, SD1.5's size\n"
            yield _table(("who", "photos", "dtype", "latents", "peak"), cells)
            continue
        head = ("who", "people", "dtype", "sample-steps/s (all rounds)", "an hour", "x published")
        yield f"#### {what}\n"
        yield _table((*head, "peak"), cells)
        if what == "sd15":
            yield f"For comparison, the paper: {invert.PUBLISHED:.0f} s an identity on an A100.\n"


def _swaps(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        if "memory" in row:
            how = "merged into the weights" if row["merged"] else "hooks"
            lines.append(
                f"- {row['base']}, {how}: {row['swaps']:,} swaps with a forward at each tenth in "
                f"{row['seconds']:.0f} s, {row['changed']} changes of the weights' hash "
                f"({row['hash'][:16]}), {growth(row) / 2**20:+.1f} MiB after the first tenth."
            )
        else:
            lines.append(
                f"- {row['base']}, torch.compile ({row['backend']}): {row['graphs']} graph in "
                f"{row['first']:.0f} s, {row['more']} more in {row['swaps']} swaps; the last "
                f"result differs from the eager one by {row['off']:.1e} of its size."
            )
    return "\n".join(lines) + "\n"


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


# --- pictures -------------------------------------------------------------------------------------


def _over(axes: Any, rows: list[Row]) -> None:
    rows = sorted(rows, key=lambda row: (row["images"], row["b"]))
    for i, (name, colour) in enumerate(COLOURS.items()):
        at = [x for x, row in enumerate(rows) if name in row["seconds"]]
        if not at:
            continue
        found = [paired(rows[x], name)[:3] for x in at]
        mid = [1 + m for m, _, _ in found]
        spread = [[m - low for m, low, _ in found], [high - m for m, _, high in found]]
        places = [x + 0.12 * (i - 2) for x in at]
        axes.errorbar(places, mid, spread, fmt="o", color=colour, label=name, ms=4, capsize=2)
    axes.axhline(1.0, color="#444", lw=1)
    axes.set_xticks(range(len(rows)), [f"{row['b']} x {row['images']}" for row in rows])
    axes.set(yscale="log", xlabel="people x images", title=f"{rows[0]['base']}: time over base")
    axes.yaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.yaxis.set_minor_formatter(lambda x, _: f"{x:g}")


def _rates(axes: Any, rows: list[Row]) -> None:
    own = sorted((r for r in rows if r["who"] == "ours" and r["rate"]), key=lambda row: row["k"])
    x = [row["k"] for row in own]
    axes.plot(x, [row["rate"] for row in own], "o-", color=COLOURS["ours"], label="invert")
    for row in rows:
        if row["who"] == "published" and row["rate"]:
            axes.axhline(row["rate"], color=COLOURS["published"], ls="--", label="published")
    axes.set(
        xscale="log", xlabel="people at once", title=f"{rows[0]['base']}: sample-steps a second"
    )
    axes.set_ylim(0, None)
    axes.set_xticks(x, [str(k) for k in x])
    axes.minorticks_off()


def _memory(axes: Any, rows: list[Row]) -> None:
    for row in rows:
        label = f"{row['base']}, {'merged' if row['merged'] else 'hooks'}"
        sizes = [point["resident"] / 2**20 for point in row["memory"]]
        axes.plot([point["swaps"] for point in row["memory"]], sizes, label=label)
    axes.set(xlabel="swaps", title="resident memory, MiB")
    axes.set_ylim(0, 1.2 * axes.get_ylim()[1])


def _draw(path: Path, groups: list[list[Row]], fill: Callable[[Any, list[Row]], None]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = [group for group in groups if group]
    if not groups:
        return
    figure = Figure(figsize=(4.5 * len(groups), 3.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, group in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
        fill(axes, group)
        axes.grid(axis="y", color="#e3e6ea", linewidth=0.8)
        axes.legend(fontsize=7, frameon=False)
    figure.savefig(path, metadata={"Software": None})


def write(results: Path, docs: Path) -> Path:
    """The page and its pictures, into docs; pictures of runs that are gone are removed."""
    found = newest(results)
    docs.mkdir(parents=True, exist_ok=True)
    for old in docs.glob("generate-*.png"):
        old.unlink()
    for device, (rows, _) in found.items():
        steps = [row for row in rows["generate"] if row["what"] == "steps"]
        rated = [row for row in rows["invert"] if row["what"] != "memory"]
        for name, mine, fill in (("over", steps, _over), ("invert", rated, _rates)):
            bases = dict.fromkeys(row["base"] for row in mine)
            groups = [[row for row in mine if row["base"] == base] for base in bases]
            _draw(docs / f"generate-{name}-{device}.png", groups, fill)
        flat = [row for row in rows["swaps"] if "memory" in row]
        _draw(docs / f"generate-swaps-{device}.png", [flat], _memory)
    out = docs / "generate.md"
    with atomic_path(out) as temporary:
        temporary.write_text(page(found), encoding="utf-8")
    return out
