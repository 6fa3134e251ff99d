"""The command `w2w evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from . import options as opt
from . import support as shared

if TYPE_CHECKING:
    from ..evaluate import Size, Study


def evaluate(
    space: opt.SpaceArg,
    out: Annotated[Path, typer.Option(help="The report's folder; one that was begun goes on.")],
    section: Annotated[
        list[str] | None,
        typer.Option(
            help="Only this: decodability, edits, persistence, ways, inversion, components, "
            "unseen, outside, sampling; of the world ablations, houses; may be repeated."
        ),
    ] = None,
    short: Annotated[
        bool, typer.Option("--short", help="Few people and steps: directions, not sizes.")
    ] = False,
    judge: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="A CLIP model on disk; the world has a judge."),
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(help="A prompt with the space's subject in it, or a text file; repeatable."),
    ] = None,
    photos: Annotated[
        Path | None,
        typer.Option(help="People the space never saw, as for populate: those are inverted."),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Their attributes, a CSV or Parquet table.")
    ] = None,
    base: opt.OwnBase = None,
    seed: opt.Seed = 0,
    device: opt.Device = None,
) -> None:
    """Measure a space: the paper's claims re-run with nulls, rivals and intervals; a report."""
    from ..evaluate import FULL, SHORT
    from ..evaluate import evaluate as verb

    size = SHORT if short else FULL
    if space == "demo":
        if any(x is not None for x in (judge, prompts, photos, labels, base)):
            raise InputError("evaluate demo: the world has its own judge, prompts and people")
        from ..demo.study import study as world

        study = world(size=size, seed=seed)
    else:
        study = _study(space, judge, prompts, photos, labels, base, size, seed, device)
    result = verb(study, out, section or ())
    for part in result["sections"].values():
        for claim in part["claims"]:
            mark = "holds" if claim["holds"] else "FAILS"
            typer.echo(f"{mark}  {claim['value']:8.2f}  {claim['wanted']:<14} {claim['claim']}")
    typer.echo(f"{out / 'report.html'}")


def _study(
    name: str,
    judge: Path | None,
    prompts: list[str] | None,
    photos: Path | None,
    labels: Path | None,
    base: str | None,
    size: Size,
    seed: int,
    device: str | None,
) -> Study:
    """The space in folder `name`, judged by CLIP."""
    if judge is None:
        raise InputError("--judge: wanted the folder of a CLIP model: who is to say what is there?")
    if (photos is None) != (labels is None):
        raise InputError("wanted both --photos and --labels, or neither")
    from ..evaluate.clip import clip_study
    from ..labels import labels_of
    from ..sources import open_photos
    from ..verbs.populate import Listed

    opened = shared.open_space(name)
    kinds = {"steps": int, "guidance": float, "identity_guidance": bool, "prompt": str}
    settings: dict[str, Any] = {"steps": 50, "guidance": 3.0, "prompt": "sks person"}
    settings |= shared.defaults(opened, "generate", kinds)
    who = settings.pop("prompt")
    kinds = {
        "lr": float, "prior": float, "weight_decay": float, "whiten": bool, "timesteps": str,
        "average": float,
    }  # fmt: skip
    inversion = shared.defaults(opened, "invert", kinds)
    texts = shared.read_prompts(prompts) if prompts else [who]
    pipe = shared.open_pipeline(base, opened, device)
    people, known = (), None
    if photos is not None and labels is not None:
        people = Listed(open_photos(photos), shared.image_size(pipe), who)
        known, attributes = labels_of(labels, people.names)
        missing = [attribute for attribute in opened.attributes if attribute not in attributes]
        if missing:
            raise InputError(f"--labels: {labels}: nothing on {', '.join(missing)}")
        known = known[:, [attributes.index(attribute) for attribute in opened.attributes]]
    return clip_study(
        opened, pipe, judge, texts, who=who, settings=settings, inversion=inversion,
        photos=people, labels=known, size=size, seed=seed,
    )  # fmt: skip
