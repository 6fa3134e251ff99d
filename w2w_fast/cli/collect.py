"""The command `w2w collect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError
from . import options as opt
from . import support as shared

if TYPE_CHECKING:
    from ..population import Population

_SHOWN = 10


def collect(
    loras: Annotated[Path, typer.Argument(help="A folder of LoRA files and PEFT folders.")],
    out: Annotated[Path, typer.Argument(help="The population's folder; a second call resumes.")],
    base: opt.Base = None,
    layout_of: Annotated[
        str | None,
        typer.Option(metavar="SPACE", help="Or: the modules, rank and alpha of a space."),
    ] = None,
    targets: Annotated[
        str | None, typer.Option(help="With --base: the Linears kept.", show_default="to_q,to_v")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, max=256, help="With --base: ranks kept.", show_default="1")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="CSV or Parquet: a column name, and one an attribute.")
    ] = None,
    shard: Annotated[int, typer.Option(min=1, max=100_000, help="People in memory.")] = 256,
    strict: Annotated[
        bool, typer.Option("--strict", help="Set aside files that adapt other modules too.")
    ] = False,
) -> None:
    """Make a population of LoRA files that other tools trained, of any rank."""
    if (base is None) == (layout_of is None):
        raise InputError("wanted either --base FOLDER or --layout-of SPACE")
    if layout_of is not None and (targets or rank):
        raise InputError("--targets and --rank: a space's layout has its own; give --base")
    if not loras.is_dir():
        raise InputError(f"{loras}: no such folder; wanted one with LoRA files")
    from ..denoise import denoiser
    from ..layout import Layout
    from ..verbs.collect import collect as verb

    if layout_of is not None:
        layout = shared.open_space(layout_of).layout
    else:
        model = denoiser(shared.open_pipeline(base, None, "cpu"))
        rank = rank or 1
        # alpha = rank: the factors' scale is the files' own.
        layout = Layout.discover(model, (targets or "to_q,to_v").split(","), rank, float(rank))
    made = verb(loras, out, layout, labels=labels, shard=shard, strict=strict)
    _summary(out, made)


def _summary(out: Path, made: Population) -> None:
    rows = made.table.to_pylist()
    kept, aside = ([row for row in rows if bool(row["reason"]) == is_aside] for is_aside in (0, 1))
    typer.echo(f"{out}: {len(kept)} people of {len(rows)} files, {made.layout.size} numbers each")

    def share(column: str) -> str:
        worst = max(kept, key=lambda row: row[column])
        average = sum(row[column] for row in kept) / len(kept)
        return f"{average:.1%} on average, at most {worst[column]:.1%} ({worst['name']})"

    typer.echo(f"energy beyond rank {made.layout.rank}: {share('lost')}")
    typer.echo(f"the same in a file's worst module: {share('lost_most')}")
    if any(row["outside"] for row in kept):
        typer.echo(f"energy in modules outside the layout: {share('outside')}")
    if text := sum(bool(row["text_encoder"]) for row in kept):
        typer.echo(f"files that train a text encoder too, which is not read: {text}")
    cosine = sum(row["cosine"] for row in kept) / len(kept)
    typer.echo(f"cosine with the mean: {cosine:.2f} on average")
    for row in aside[:_SHOWN]:
        typer.echo(f"set aside: {row['name']}: {row['reason']}")
    if len(aside) > _SHOWN:
        typer.echo(f"set aside: {len(aside) - _SHOWN} more; people.parquet has every reason")
