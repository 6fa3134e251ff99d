"""The command `w2w evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options as opt
from . import support as shared


def evaluate(
    space: opt.SpaceArg,
    out: Annotated[Path, typer.Option(help="The report's folder; begun ones go on.")],
    section: Annotated[
        list[str] | None,
        typer.Option(
            help="Only these: decodability, edits, persistence, inversion, components, outside, "
            "sampling. Again for several."
        ),
    ] = None,
    short: Annotated[
        bool, typer.Option("--short", help="Few people and steps: directions, not sizes.")
    ] = False,
    seed: opt.Seed = 0,
) -> None:
    """Measure a space: the paper's claims re-run with nulls, rivals and intervals; a report."""
    from ..errors import InputError

    if space != "demo":
        raise InputError("evaluate: only the embedded world has a judge yet: w2w evaluate demo")
    from ..demo.study import study
    from ..evaluate import FULL, SHORT
    from ..evaluate import evaluate as verb

    result = verb(study(size=SHORT if short else FULL, seed=seed), out, section or ())
    for part in result["sections"].values():
        for claim in part["claims"]:
            mark = "holds" if claim["holds"] else "FAILS"
            typer.echo(f"{mark}  {claim['value']:8.2f}  {claim['wanted']:<14} {claim['claim']}")
    shared.say(f"report: {out / 'report.html'}")
