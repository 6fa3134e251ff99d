"""The commands about people: directions, read, blend, calibrate, slider."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from . import options as opt
from . import support as shared

if TYPE_CHECKING:
    from torch import Tensor

    from ..space import WeightSpace

Population = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Whose people these are, for a space that holds none."),
]


def open_with_people(space: str, population: Path | None) -> WeightSpace:
    """A space, with the people of a population if one is named."""
    from ..whereabouts import with_people

    opened = shared.open_space(space)
    return opened if population is None else with_people(opened, population)


def directions(
    space: opt.SpaceArg,
    out: Annotated[
        Path | None,
        typer.Argument(metavar="[OUT]", help="With --labels: the space's folder to write."),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(help="CSV or Parquet: a column of names, and one an attribute; some people."),
    ] = None,
    method: Annotated[
        str, typer.Option(metavar="ridge|lstsq|logistic", help="How attributes are read.")
    ] = "ridge",
    only: Annotated[
        bool, typer.Option("--only", help="The attributes that the space has are left out.")
    ] = False,
    population: Population = None,
    overwrite: opt.Overwrite = False,
) -> None:
    """Fit directions to a table of labels; without one, show those that are there.

    pc1, pc2, ... and ica1, ... need no labels and are for exploring: nobody says what they change.
    """
    if (out is None) != (labels is None):
        raise InputError("wanted OUT and --labels together, or neither to look around")
    if out is None:
        _show_directions(open_with_people(space, population))
        return
    shared.new_folder(out, overwrite, "space.json")
    from ..verbs.directions import directions as verb

    opened = open_with_people(space, population)
    made = verb(opened, labels, method=method, keep=not only)
    made.save(out, overwrite=overwrite)
    typer.echo(f"{out}: {len(made.attributes)} attributes")
    shared.show_readers(made)


def _show_directions(space: WeightSpace) -> None:
    from ..explore import MOST, independent, reader, resembles

    shared.show_readers(space)
    typer.echo("exploratory, with the labels they go along with (correlation):")
    rows = [(f"pc{i + 1}", reader(space, f"pc{i + 1}")) for i in range(min(MOST, space.m))]
    if space.n >= 20:
        rows += [(f"ica{i + 1}", row) for i, row in enumerate(independent(space))]
    for name, row in rows:
        said = ", ".join(f"{other} {r:+.2f}" for other, r in resembles(space, row))
        typer.echo(f"  {name:<6} {said or 'no labels here'}")


def read(
    space: opt.SpaceArg,
    people: Annotated[
        list[Path],
        typer.Argument(
            metavar="PEOPLE...", help="LoRAs, coefficients, populations, or folders of these."
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="A table to write, .csv or .parquet.")] = None,
    map: Annotated[
        Path | None, typer.Option(help="A .png to write: where they are among the population.")
    ] = None,
    shade: Annotated[
        str, typer.Option(metavar="ATTRIBUTE", help="With --map: the population's, in colour.")
    ] = "",
    population: Population = None,
    overwrite: opt.Overwrite = False,
) -> None:
    """Who an adapter is: its attributes and how sure that is, how far out it lies, next to whom."""
    if out is not None:
        shared.new_file(out, overwrite, ".csv" if out.suffix == ".csv" else ".parquet")
    if map is not None:
        shared.new_file(map, overwrite, ".png")
    elif shade:
        raise InputError("--shade: wanted with --map only")
    from ..files import atomic_path
    from ..verbs import read as verb

    opened = open_with_people(space, population)
    facts = verb.read(opened, people)
    if map is not None:
        with atomic_path(map) as temporary:
            verb.draw_map(opened, facts, temporary, shade)
    if out is not None:
        from pyarrow import csv, parquet

        write = csv.write_csv if out.suffix == ".csv" else parquet.write_table
        with atomic_path(out) as temporary:
            write(verb.as_table(facts), temporary)
    for fact in facts[:_SHOWN]:
        for line in verb.lines(opened, fact):
            typer.echo(line)
    if len(facts) > _SHOWN:
        typer.echo(f"and {len(facts) - _SHOWN} more: --out writes all of them")


_SHOWN = 20


def blend(
    space: opt.SpaceArg,
    a: Annotated[Path, typer.Argument(metavar="A", help="Coefficients or a LoRA.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Coefficients or a LoRA.")],
    steps: Annotated[int, typer.Option(min=2, max=10_000, help="People, A and B included.")] = 9,
    method: Annotated[
        str,
        typer.Option(
            metavar="linear|spherical", help="spherical keeps the distance from the mean."
        ),
    ] = "linear",
    rows: Annotated[
        tuple[int, int], typer.Option(help="Which person of A's file, and which of B's.")
    ] = (0, 0),
    strip: Annotated[
        Path | None, typer.Option(help="A .png to draw: all of them, one prompt and seed.")
    ] = None,
    prompt: opt.MaybePrompt = None,
    seed: opt.Seed = 0,
    base: opt.OwnBase = None,
    device: opt.Device = None,
    out: opt.PeopleOut = Path("blend.safetensors"),
    overwrite: opt.Overwrite = False,
) -> None:
    """The people between two: coefficients, and pictures of them."""
    shared.new_file(out, overwrite)
    if strip is not None:
        shared.new_file(strip, overwrite, ".png")
    from ..coefficients import write_coefficients
    from ..verbs.blend import blend as verb

    opened = shared.open_space(space)
    ends = [_person(opened, path, row) for path, row in zip((a, b), rows, strict=True)]
    made = verb(opened, *ends, steps, method=method)
    if strip is not None:
        _draw(opened, made, strip, prompt, seed, base, device)
    write_coefficients(out, made)
    typer.echo(f"{out}: {steps} people from {a.name} to {b.name}, {method}")


def _person(space: WeightSpace, path: Path, row: int) -> Tensor:
    """The person [m] of a row of a coefficients file, or of a LoRA."""
    from ..verbs.read import load

    found = load(space, path)
    if not 0 <= row < len(found.c):
        raise InputError(f"{path}: has rows 0 to {len(found.c) - 1}, got {row}")
    return found.c[row]


def _draw(
    space: WeightSpace, people: Tensor, path: Path, prompt: str | None, seed: int,
    base: str | None, device: str | None,
) -> None:  # fmt: skip
    import io

    from ..files import atomic_path
    from ..pictures import contact_sheet
    from ..verbs.generate import generate

    pipe = shared.open_pipeline(base, space, device)
    own = shared.defaults(space, "generate", _KINDS)
    asked = own.pop("prompt", "sks person") if prompt is None else prompt
    own.pop("prompt", None)
    seeds = [seed] * len(people)
    images = generate(space.to(pipe.device), pipe, people, asked, seeds=seeds, **own)
    labels = [f"{i / (len(people) - 1):.0%}" for i in range(len(people))]
    data = io.BytesIO()
    contact_sheet(images, min(len(images), 12), labels).save(data, "PNG")
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.getvalue())


_KINDS = {"prompt": str, "steps": int, "guidance": float, "identity_guidance": bool}


def calibrate(
    space: opt.SpaceArg,
    attribute: Annotated[str, typer.Argument(help="Of the space, or pc1, ica1, ...")],
    out: Annotated[Path, typer.Option(help="The .json to write, for `w2w edit --scale`.")] = Path(
        "scale.json"
    ),
    hold: Annotated[list[str] | None, typer.Option(help="Attributes to keep still.")] = None,
    people: Annotated[int, typer.Option(min=1, max=10_000, help="Sampled, to measure on.")] = 16,
    most: Annotated[float, typer.Option(help="Amounts are tried from -MOST to MOST.")] = 4.0,
    steps: Annotated[int, typer.Option(min=1, max=100, help="On either side of 0.")] = 4,
    reader: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Yours: PIL images to numbers.",
            show_default="for the demo world, its judge",
        ),
    ] = None,
    prompt: opt.MaybePrompt = None,
    seed: opt.Seed = 0,
    base: opt.OwnBase = None,
    device: opt.Device = None,
    overwrite: opt.Overwrite = False,
) -> None:
    """Measure what an edit does to pictures, so that equal steps of its slider look equal."""
    shared.new_file(out, overwrite, ".json")
    if not 0 < most < 1000:
        raise InputError(f"--most: wanted a number above 0, below 1000, got {most}")
    from ..verbs.calibrate import calibrate as verb

    opened = shared.open_space(space)
    measure = _reader(reader, attribute, base or opened.meta.get("base"))
    pipe = shared.open_pipeline(base, opened, device)
    own = shared.defaults(opened, "generate", _KINDS)
    known = own.pop("prompt", "sks person")
    scale = verb(
        opened.to(pipe.device), pipe, attribute, measure, hold=hold or (), people=people,
        amounts=[most * i / steps for i in range(-steps, steps + 1)],
        prompt=known if prompt is None else prompt, seed=seed, **own,
    )  # fmt: skip
    scale.save(out)
    for amount, reading in zip(scale.tried, scale.readings, strict=True):
        typer.echo(f"  {attribute}={amount:+.2f}: read {reading:.3g} on average")
    low, high = scale.range
    typer.echo(f"{out}: changes from {low:+.3g} to {high:+.3g}; no edit is 0")


def _reader(name: str | None, attribute: str, base: Any) -> Callable[[list], Sequence[float]]:
    """The function named, or the demo world's judge of an attribute."""
    if name is None:
        if base not in shared.DEMO:
            raise InputError("--reader: wanted a MODULE:FUNCTION that reads pictures of this base")
        from .. import demo
        from ..demo.reading import measure

        return measure(demo.reader(), attribute)
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"--reader: {name!r}: {error}") from error
    return found


def slider(
    space: opt.SpaceArg,
    out: Annotated[Path, typer.Argument(help="A .safetensors file; for peft a folder.")],
    set_: Annotated[
        str, typer.Option("--set", help="attribute=amount,...,hold=attribute: at strength 1.")
    ],
    of: Annotated[
        Path | None,
        typer.Option(
            help="One person's, exactly: coefficients or a LoRA.", show_default="anybody's"
        ),
    ] = None,
    row: Annotated[int, typer.Option(min=0, help="Which person of that file.")] = 0,
    format: Annotated[str, typer.Option(metavar="kohya|diffusers|peft")] = "kohya",
    verify: Annotated[bool, typer.Option("--verify", help="Load it with diffusers first.")] = False,
    base: opt.OwnBase = None,
    overwrite: opt.Overwrite = False,
) -> None:
    """Write an edit as a LoRA for other tools: of one person exactly, or to first order of all."""
    shared.new_lora(out, overwrite, format)
    from ..verbs.edit import parse_amounts
    from ..verbs.slider import slider as verb

    amounts, hold = parse_amounts(set_)
    opened = shared.open_space(space)
    person = None if of is None else _person(opened, of, row)
    made = verb(opened, amounts, of=person, hold=hold)
    pipe = shared.open_pipeline(base, opened, "cpu") if verify else None
    shared.write_lora(made.layout, made.w, out, overwrite, pipe, format=format)
    kind = f"exact for {of.name}, row {row}, beside whose own LoRA it belongs" if of else (
        f"for anybody, to first order: of the edit it misses {float(made.error.median()):.0%} at "
        f"strength 1, {float(made.error.quantile(0.95)):.0%} for one in twenty"
    )  # fmt: skip
    typer.echo(f"{out}: {format} LoRA of rank {made.layout.rank}, {kind}")
