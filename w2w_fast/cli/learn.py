"""`w2w fit`: the command with the most to say."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from . import options as opt
from . import support as shared


def fit(
    population: Annotated[Path, typer.Argument(help="A finished population's folder.")],
    space: opt.SpaceOut,
    components: Annotated[
        str | None,
        typer.Option(
            metavar="M|auto",
            help="Kept components. auto: the fewest that read, or without labels complete, people "
            "left out as well as any number. Default: 100, or those of --add.",
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            help="CSV or Parquet: a column name, and one an attribute. Default: the population's."
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(metavar="ridge|lstsq|logistic", help="How attributes are read.")
    ] = "ridge",
    add: Annotated[
        str | None,
        typer.Option(metavar="SPACE", help="Put the population beside a space's people."),
    ] = None,
    check: Annotated[
        list[Path] | None,
        typer.Option(help="With --add, the old population(s): the angle to a full fit is said."),
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base model, recorded in the space.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Recorded in the space.")] = None,
    route: Annotated[
        str,
        typer.Option(
            metavar="auto|gram|covariance|subspace",
            help="The way to the components; auto: by size.",
        ),
    ] = "auto",
    passes: Annotated[
        int, typer.Option(min=1, max=100, help="subspace: over the population; more is nearer.")
    ] = 8,
    oversample: Annotated[
        int | None,
        typer.Option(min=0, help="subspace: columns more than M. Default: M / 4, 32 at least."),
    ] = None,
    device: opt.Device = None,
    overwrite: opt.Overwrite = False,
) -> None:
    """Find the principal components of a population, and the directions of attributes."""
    shared.new_folder(space, overwrite, "space.json")
    from .. import ranks
    from ..denoise import check_prompts
    from ..files import atomic_dir, write_manifest
    from ..pictures import scree
    from ..verbs import fit as verb

    if check and add is None:
        raise InputError("--check: wanted with --add only")
    if prompt is None and add is None:
        prompt = "sks person"
    if prompt is not None:
        check_prompts([prompt])
    wanted = shared.components(components)
    with ranks.joined():
        options = {
            "labels": labels, "method": method, "device": shared.open_device(device),
            "route": route, "passes": passes, "oversample": oversample,
        }  # fmt: skip
        meta = shared.given(prompt=prompt, base=base)
        if add is None:
            made = verb.fit(population, wanted or 100, meta=meta, **options)
        elif wanted == "auto":
            raise InputError("--components: auto chooses among whole people: not with --add")
        else:
            made = verb.add(population, shared.open_space(add), wanted, **options)
            made.meta |= meta
        angle = None if not check else verb.angle_to_refit(made, [*check, population])
        if ranks.rank():
            return
    with atomic_dir(space, overwrite=overwrite) as folder:
        made.save(folder)
        scree(folder / "scree.png", made.explained.tolist())
        write_manifest(folder)
    share = float(made.explained.sum())
    typer.echo(f"{space}: {made.n} people, {made.m} components, {share:.1%} of the variance")
    if angle is not None:
        typer.echo(f"largest principal angle to a fit of everybody: {angle:.2g} rad")
    shared.show_readers(made)
