"""The options and arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import __version__


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"w2w_fast {__version__}")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)]
Seed = Annotated[int, typer.Option(min=0, help="Same seed, same result.")]
SpaceArg = Annotated[str, typer.Argument(metavar="SPACE", help="A space's folder, or demo.")]
PeopleArg = Annotated[Path, typer.Argument(metavar="COEFFICIENTS", help="A coefficients file.")]
PeopleOut = Annotated[Path, typer.Option(help="The coefficients file to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Base = Annotated[
    str | None,
    typer.Option(metavar="FOLDER", help="A diffusers pipeline on disk, or demo."),
]
OwnBase = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER", help="A diffusers pipeline on disk.", show_default="the space's own"
    ),
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1.", show_default="a GPU if there")
]
SpaceOut = Annotated[Path, typer.Argument(metavar="OUT", help="The space's folder to write.")]
Batch = Annotated[int, typer.Option(min=1, max=4096, help="Rows computed at once: memory only.")]
Steps = Annotated[int | None, typer.Option(min=1, max=100_000, help="Of the optimiser.")]
Adam = Annotated[float | None, typer.Option(help="Adam's learning rate.")]
Dtype = Annotated[str, typer.Option(metavar="float32|bfloat16|float16")]
MaybePrompt = Annotated[str | None, typer.Option(show_default="the space's, or sks person")]
Ray = Annotated[
    str | None, typer.Option(metavar="local|ADDRESS", help="Spread over a Ray cluster.")
]
Workers = Annotated[
    int | None, typer.Option(min=1, max=4096, help="With --ray.", show_default="one a GPU")
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the settings that OUT was begun with.")
]
Vram = Annotated[
    str | None, typer.Option(metavar="8GiB", help="Or: as many as fit into so much memory.")
]
Checkpointing = Annotated[
    bool, typer.Option("--checkpointing", help="Of gradients: less memory, more work.")
]
