"""docs/invert.md and its picture of distances, of the newest JSON of inversion_quality.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from w2w_fast.benchmarks import inversion_quality as quality
from w2w_fast.files import atomic_path, read_json

PICTURE = "invert-distance.png"
Run = dict[str, Any]

INTRO = """\
# Photographs to people

Made by `python benchmarks/report.py`; the figures come from
`python benchmarks/inversion_quality.py WORK --out benchmarks/results/NAME.json --docs docs`.

    w2w invert space/ anna.jpg photos-of-bert/ --base sd15/ --auto-mask --report found
    w2w invert demo me.jpg --auto-mask --out me.safetensors

`invert` looks for the coefficients c of the person on a photograph: it minimises the denoising loss
inside the mask plus a Gaussian prior on z = (c - mu) / sigma, by Adam on z, over random timesteps
and noise that all people share. Photos and prompts are encoded once, the base is frozen, many
people share a batch and nobody's result depends on who else is in it. The published settings
(`--paper`, `invert.PAPER`) have neither prior nor whitening nor averaging.

It starts from the population's mean. `--start FILE` takes other coefficients; there is no start
that is guessed from the photo, since the one that was tried does not pay for itself. On 16 held-out
people of the world that ships, measured once, a Gauss-Newton step with a ridge (Jacobians from 8
draws of noise, 1 to 8 iterations of conjugate gradients, three strengths: the work of 16 to 72
steps) brought the loss under other noise from 0.1118 to 0.1042 at best; 16 steps of Adam at lr 0.3
brought it to 0.1039, 35 at 0.2 to 0.1008, 70 at 0.2 to 0.0979. The answer lies about one standard
deviation a component from the mean, too far, it seems, for a denoiser taken as linear in c. Fewer
steps at a larger rate save time and cost likeness: the arm "70 steps" below.
"""

HOW = """\
One photograph each of people that the space has never seen, without anything before the face, is
inverted under the mask of the head. Then {images} pictures of each in new places and poses, with
the same prompts and seeds in every arm, are judged by the world's reader, which was trained on
drawings only. **attributes**: binary ones that the reader sees as they are; **error**: of the
continuous ones, whose range is 1; **similarity**: cosine between the mean embedding of the pictures
and that of 8 real renderings; **first**: the share for whom no other of {gallery:,} people
(population and held-out together) is more similar, **rank**: the median place; **place**: what the
prompt asked for is there. Brackets are 95% intervals from {resamples:,} resamplings of the people.
"""

SEEN = {
    "c3897f2c16afc180": (
        "The first eight, looked at: hats, beards, earrings and skin come through in every arm; "
        "glasses are lost or smeared in two of five; the fourth face is bleached and loses its "
        "wrinkles and mouth; the last is given long hair that the photo does not have. The arms "
        "make much the same mistakes; after 70 steps more of them show.\n"
    )
}
"""What the pictures of a space, by its key, look like to a person."""

SEEN_ODD = {
    "c3897f2c16afc180": (
        "Looked at: who is half covered comes back as a person, and what the block hid is guessed, "
        "often wrongly (grey skin, a lost beard). Drawn, recoloured and real pictures mostly do "
        "not: 400 steps under so weak a prior follow ink and colours out of the population, to "
        "coefficients that draw no whole face. So the paper's finding, that such pictures land "
        "among the population, is **not** shown at these settings; fewer steps or a larger "
        "`--prior` keep an answer nearer to people, and were not measured here.\n"
    )
}
"""The same of the other kinds."""

_MEASURES = {
    "attributes": ("attributes", ".1%"),
    "continuous": ("error", ".3f"),
    "similarity": ("similarity", ".3f"),
    "top1": ("first", ".0%"),
    "rank": ("rank", ".0f"),
    "prompt": ("place", ".1%"),
    "face": ("a face", ".1%"),
}


def newest(folder: Path) -> Run | None:
    """The newest full run in a folder of results."""
    runs = [read_json(path) for path in sorted(folder.glob("*.json"))]
    mine = [
        run for run in runs
        if isinstance(run, dict) and run.get("format") == quality.FORMAT
        and run["version"] == quality.VERSION and not run["quick"]
    ]  # fmt: skip
    found = max(mine, key=lambda run: run["date"], default=None)
    if found is not None:  # in the order in which they are declared: files sort them by name
        found["arms"] = {arm: found["arms"][arm] for arm in quality.ARMS if arm in found["arms"]}
        found["odd"] = {k: found["odd"][k] for k in ("twins", *quality.ODD) if k in found["odd"]}
    return found


def page(found: Run | None, sheets: bool = True) -> str:
    """The whole page; sheets: whether the pictures of people are there."""
    if found is None:
        return f"{INTRO}\n## Measured\n\nNot run: no result is in benchmarks/results.\n"
    changed = " (with uncommitted changes)" if found["dirty"] else ""
    told = ", ".join(f"{name} {v}" for name, v in sorted(found["versions"].items()))
    own = ", ".join(f"{name} {value}" for name, value in found["own"].items())
    how = HOW.format(images=found["images"], gallery=found["gallery"], resamples=quality.RESAMPLES)
    commits = sorted({arm["commit"][:12] for arm in found["arms"].values()})
    parts = [
        INTRO,
        f"## Measured\n\n{how}\n"
        f"The space's own settings: {own}. A space of {found['components']} components of "
        f"{found['n']:,} people.\n\n"
        f"{found['machine']['device']}; {told}; commit {found['commit']}{changed} (people inverted "
        f"at {', '.join(commits)}); {found['date']}.\n",
        _arms(found),
        _differences(found),
    ]
    if sheets:
        parts.append(
            "![photographs, and each person generated elsewhere as each arm found it]"
            "(invert-people.png)\n"
        )
        parts.append(SEEN.get(found["space"], ""))
    parts += [_distances(found), _odd(found)]
    if sheets and found["odd"]:
        parts.append("![pictures of other kinds, and who was found](invert-odd.png)\n")
        parts.append(SEEN_ODD.get(found["space"], ""))
    return "\n".join(parts)


def _cell(values: list[float] | None, form: str, sign: str = "") -> str:
    if values is None:
        return "-"
    figure, low, high = (format(x, sign + form) for x in values)
    return f"{figure} ({low} to {high})"


def _table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _arms(found: Run) -> str:
    head = ["", "people", *(name for name, _ in _MEASURES.values())]
    lines = [
        [arm, str(about["people"]), *(_cell(about[k], form) for k, (_, form) in _MEASURES.items())]
        for arm, about in found["arms"].items()
    ]
    real = [_cell(found["ceiling"][k], form) for k, (_, form) in _MEASURES.items()]
    lines.append(["real renderings", str(found["arms"]["together"]["people"]), *real])
    return _table(head, lines)


def _differences(found: Run) -> str:
    shown = {k: v for k, v in _MEASURES.items() if k not in ("rank", "face")}
    head = ["less together", *(name for name, _ in shown.values()), "z apart, rms"]
    lines = []
    for arm, about in found["arms"].items():
        if arm != "together":
            cells = [_cell(about[f"{k} less"], form, "+") for k, (_, form) in shown.items()]
            lines.append([arm, *cells, f"{about['apart']:.2g}"])
    note = (
        "Each arm less `together`, of the same people, prompts and seeds; an interval that holds "
        "0 is no difference that these people show.\n"
    )
    return f"{note}\n{_table(head, lines)}"


def _distances(found: Run) -> str:
    low, middle, _, most, end = found["arms"]["together"]["distance"]["population"]
    text = (
        "## Where they lie\n\nMahalanobis distance from the population's mean. The population's "
        f"own people lie between {low:.1f} and {end:.1f}, half of them within {middle:.1f}, 99% "
        f"within {most:.1f}. How far an inversion ends is set by its prior and its steps.\n\n"
        f"![distances]({PICTURE})\n"
    )
    kinds = {**found["arms"], **{k: v for k, v in found["odd"].items() if k != "twins"}}
    lines = []
    for name, about in kinds.items():
        d = sorted(about["distance"]["each"])
        spread = f"{d[0]:.1f}, {d[len(d) // 2]:.1f}, {d[-1]:.1f}"
        inside = (about["distance"][k] for k in ("within 99%", "inside"))
        lines.append([name, str(len(d)), spread, *(f"{x:.0%}" for x in inside)])
    head = ["", "people", "least, median, most", "within 99%", "within the farthest"]
    told = f"{text}\n{_table(head, lines)}"
    if not found["odd"]:
        return told
    portrait = found["odd"]["real"]["distance"]["each"][0]
    return f"{told}\nThe portrait is the real one at {portrait:.1f}.\n"


def _odd(found: Run) -> str:
    if not found["odd"]:
        return "## Pictures of other kinds: not run\n"
    each = found["odd"]["twins"]["people"]
    text = (
        "## Pictures of other kinds\n\n"
        f"The first {each} of the same photographs **drawn** (three greys and pen lines), "
        "**recoloured** (the colour channels change places, every second one a negative) and "
        "**occluded** (a grey block over the eyes, the mouth or a side, inside the mask), and "
        f"{each} **real** photographs that scikit-image ships: a portrait, and faces of 25 x 25 "
        f"grey pixels, under `centre_mask`; all inverted as the arm `{quality.LIKE}`. **twins** "
        "are the same people's own photographs in that arm. "
        "Recoloured skin and hair are other skin and hair: there the binary attributes count.\n"
    )
    shown = {k: v for k, v in _MEASURES.items() if k != "rank"}
    head = ["", *(name for name, _ in shown.values())]
    lines = [
        [kind, *(_cell(found["odd"][kind].get(k), form) for k, (_, form) in shown.items())]
        for kind in ("twins", *quality.ODD)
    ]
    return f"{text}\n{_table(head, lines)}"


def draw(found: Run, path: Path) -> None:
    """Everybody's distance, a row an arm or a kind, over the population's range."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = {**found["arms"], **{k: v for k, v in found["odd"].items() if k != "twins"}}
    figure = Figure(figsize=(8, 0.6 + 0.36 * len(kinds)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    low, middle, _, most, end = found["arms"]["together"]["distance"]["population"]
    axes.axvspan(low, end, color="#e3e6ea", label="the population")
    axes.axvspan(low, most, color="#c9d3dd", label="99% of it")
    axes.axvline(middle, color="#8d99ae", lw=1)
    for y, about in enumerate(kinds.values()):
        far = about["distance"]["each"]
        axes.plot(far, [y] * len(far), "|", ms=11, color="#0b6e4f", alpha=0.6)
    axes.set_yticks(range(len(kinds)), list(kinds))
    axes.set(
        xlabel="Mahalanobis distance from the population's mean", ylim=(len(kinds) - 0.4, -0.6)
    )
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, metadata={"Software": None})


def write(results: Path, docs: Path) -> Path:
    """docs/invert.md, and its picture where there is something to draw."""
    found = newest(results)
    docs.mkdir(parents=True, exist_ok=True)
    (docs / PICTURE).unlink(missing_ok=True)
    if found is not None:
        draw(found, docs / PICTURE)
    out = docs / "invert.md"
    with atomic_path(out) as temporary:
        text = page(found, (docs / "invert-people.png").exists())
        temporary.write_text(text, encoding="utf-8")
    return out
