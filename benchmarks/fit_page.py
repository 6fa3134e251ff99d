"""docs/fit.md and its picture, of the newest JSON of fit.py: how `fit` works and what it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from w2w_fast.benchmarks import fit
from w2w_fast.files import atomic_path, read_json

PICTURE = "fit-growth.png"
Run = dict[str, Any]

INTRO = """\
# fit

Made by `python benchmarks/report.py`; the figures come from `python benchmarks/fit.py`.

    w2w fit population/ space/ --components 1000 --labels labels.csv
    w2w fit population/ space/ --components auto
    w2w fit more-people/ bigger/ --add space/ --check population/
    torchrun --nproc-per-node 2 -m w2w_fast fit population/ space/ --components 1000

## The components

A population [n, d] is read from its shards, a block at a time, and never held. One pass gives mean
and standard deviation in float64 (blocks merged by Chan's formula), looks for numbers that are not
finite (and says whose), and compares the starts of the A matrices. Blocks do not depend on how the
population is cut into shards, so neither does a bit of the space.

Three routes lead to the components; `--route` forces one, else the one that computes least is taken
(`w2w_fast.components.route`, a function of the sizes alone):

| route | what is decomposed | when |
| --- | --- | --- |
| gram | Z Z^T [n, n], float64, blocks of columns | up to a few thousand models, 16,384 at most |
| covariance | Z^T Z [d, d], float64, blocks of rows | more models than numbers |
| subspace | Z^T Z on M + `--oversample` columns, float32, `--passes` times | the rest |

`subspace` is block subspace iteration with a Chebyshev filter as its steps, CholeskyQR between them
(Householder QR where Cholesky fails), CholeskyQR2 and Rayleigh-Ritz at the end. The error in a
component falls by a factor a pass that depends on how its eigenvalue compares with that of the last
column of the block: more oversampling helps the last components, more passes all of them. The
defaults are a quarter of M more columns (32 at least) and 8 passes. On a GPU the passes run in TF32
with float32 sums, the rest in float32 and float64.

`--components auto` keeps the fewest components that do as well, within one standard error, as the
best number up to n / 3 and 1,000: at reading the labels of people left out (ridge, left one out, in
closed form), or, without labels, at completing people left out from half of their numbers
(bi-cross-validation: Owen and Perry, 2009). `scree.png` in the space's folder shows the spectrum.

## The readers

Each attribute's direction is S c / |S c|, one standard deviation long, S the coefficients'
covariance and c a linear reader: `--method ridge` (its strength chosen left one out), `lstsq` (the
paper's) or `logistic` (scikit-learn's, in five folds). `w2w fit` and `w2w info` say how well it
reads people left out: balanced accuracy and AUC of attributes of two values, R2 and Spearman's
correlation of the others; beside each the mean and the 95% quantile of the same figure over 20
permutations of the people, read in the same way: what is below that quantile says nothing.

## Adding people

`--add SPACE` takes the old people from their space. Mean and standard deviation are merged exactly;
m + 1 rows that have the old people's covariance stand for all of them in the new decomposition.
What the old people had outside their m components is lost, so keep more components than you use:
`--check OLD/` fits everybody again and says the largest principal angle between the two. With all
n - 1 components kept there is none but rounding.

## Several processes

Under torchrun each rank takes its share of the blocks; moments and small squares are summed in
float64 (gloo on CPUs, nccl on GPUs), and the first rank writes. One rank or two give the same space
up to rounding.
"""

HOW = """\
Each contender runs in a process of its own, from shards on disk (in the page cache, for everybody)
to a basis. Ours streams them; the others are given the standardised matrix in memory, and the
making of it is counted, IncrementalPCA excepted, which streams too. **memory** is the peak of
anonymous memory; **with files** counts the pages of mapped files as well, which the system takes
back when it needs them. **angle** is the largest principal angle to the exact components (float64,
by numpy), **leading half** the largest angle between the exact first m / 2 and the span found. The
last components have close neighbours, so a large angle of all costs little: **explained** is the
share of the variance, **of best** its distance from the most that m components can explain.
"""


def newest(folder: Path) -> Run | None:
    """The newest full run in a folder of results."""
    runs = [read_json(path) for path in sorted(folder.glob("*.json"))]
    mine = [
        run for run in runs
        if isinstance(run, dict) and run.get("format") == fit.FORMAT
        and run["version"] == fit.VERSION and not run["quick"]
    ]  # fmt: skip
    return max(mine, key=lambda run: run["date"], default=None)


def page(found: Run | None) -> str:
    """The whole page."""
    if found is None:
        return f"{INTRO}\n## Measured\n\nNot run: no result is in benchmarks/results.\n"
    box, versions = found["machine"], found["versions"]
    changed = " (with uncommitted changes)" if found["dirty"] else ""
    told = ", ".join(f"{name} {versions[name]}" for name in sorted(versions))
    parts = [
        INTRO,
        f"## Measured\n\n{HOW}",
        f"{box['cpu']}, {box['threads']} threads of {box['cores']} cores, "
        f"{box['memory_gib']:g} GiB; {told}; commit {found['commit']}"
        f"{changed}; {found['date']}, {found['seconds']:.0f} s.\n",
    ]
    parts += [_table(case) for case in found["cases"]]
    parts.append(_growth(found["growth"]))
    return "\n".join(parts)


def _table(case: Run) -> str:
    head = "| contender | time | memory | with files | angle | leading half | explained | of best |"
    lines = [f"### {case['n']:,} x {case['d']:,}, m = {case['m']:,}\n", head, "|" + " --- |" * 8]
    for line in case["lines"]:
        memory = [_size(line["peaks"].get(key)) for key in ("anonymous", "rss")]
        if "seconds" in line:
            cells = [
                f"{line['seconds']:.1f} s", *memory, f"{line['angle']:.1e}",
                f"{line['angle_of_half']:.1e}", f"{line['explained']:.2%}",
                f"{line['explained'] - case['best']:+.4%}",
            ]  # fmt: skip
        else:
            cells = [line["note"], *memory, "", "", "", ""]
        lines.append(f"| {line['name']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _size(size: int | None) -> str:
    return "-" if not size else f"{size / 2**30:.2f} GiB"


def _growth(growth: Run) -> str:
    lines = ["### How it grows\n", f"![time and memory by size]({PICTURE})\n"]
    for way in ("gram", "subspace"):
        law = growth[way]
        rates = ", ".join(f"{p['work'] / p['seconds'] / 1e9:.0f}" for p in law["points"])
        text = f"- {way}: {rates} GFLOP/s counted, in the order of the cases above"
        if "power" in law:
            text += f"; seconds grow as the count to the power {law['power']:.2f}"
        lines.append(text)
    target = growth.get("target")
    if target:
        lines.append(
            f"- **extrapolated, not run**: {target['n']:,} x {target['d']:,}, m = {target['m']:,} "
            f"is {target['work']:.2g} operations: {target['seconds'] / 3600:.1f} hours on this "
            f"machine at the rate of the largest case, and about {target['held'] / 2**30:.0f} GiB "
            f"beside the mapped files. 60 s would take {target['work'] / 60 / 1e12:.0f} TFLOP/s."
        )
    return "\n".join(lines) + "\n"


def draw(found: Run, path: Path) -> None:
    """Seconds and memory of our routes against what is counted; the target, hollow, beyond."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    time_axes, memory_axes = figure.subplots(1, 2)
    growth, target = found["growth"], found["growth"].get("target")
    for way, colour in (("gram", "#0b6e4f"), ("subspace", "#3a6ea5")):
        law = growth[way]
        x = [p["work"] for p in law["points"]]
        time_axes.loglog(x, [p["seconds"] for p in law["points"]], "o", color=colour, label=way)
        if "power" in law:
            time_axes.loglog(x, [law["factor"] * v ** law["power"] for v in x], color=colour, lw=1)
        held = [p["held"] / 2**30 for p in law["points"]]
        used = [p["anonymous"] / 2**30 for p in law["points"]]
        memory_axes.loglog(held, used, "o", color=colour, label=way)
    if target:
        last = growth["subspace"]["points"][-1]
        pairs = [(last["work"], target["work"]), (last["seconds"], target["seconds"])]
        time_axes.loglog(*pairs, "--", color="#8d99ae", lw=1)
        star = {"marker": "*", "ms": 14, "mfc": "none", "color": "#d1495b", "ls": ""}
        n, d, m = (f"{target[key]:,}" for key in ("n", "d", "m"))
        told = f"extrapolated, not run:\n{n} x {d}, m = {m}"
        time_axes.loglog([target["work"]], [target["seconds"]], label=told, **star)
        memory_axes.loglog([target["held"] / 2**30] * 1, [target["held"] / 2**30], **star)
        ends = [0.01, target["held"] / 2**30]
        memory_axes.loglog(ends, ends, "--", color="#8d99ae", lw=1, label="as counted")
    time_axes.set(xlabel="operations counted", ylabel="seconds", title="time")
    memory_axes.set(xlabel="GiB counted: blocks and squares", ylabel="GiB, anonymous peak",
                    title="memory")  # fmt: skip
    for axes in (time_axes, memory_axes):
        axes.legend(fontsize=8, frameon=False)
        axes.grid(color="#e3e6ea", linewidth=0.8)
    figure.savefig(path, metadata={"Software": None})


def write(results: Path, docs: Path) -> Path:
    """docs/fit.md, and its picture where there is something to draw."""
    found = newest(results)
    docs.mkdir(parents=True, exist_ok=True)
    (docs / PICTURE).unlink(missing_ok=True)
    if found is not None:
        draw(found, docs / PICTURE)
    out = docs / "fit.md"
    with atomic_path(out) as temporary:
        temporary.write_text(page(found), encoding="utf-8")
    return out
