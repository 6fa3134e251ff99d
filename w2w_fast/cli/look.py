"""The commands that look around: what is in a file, what runs here, the demo, the benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options as opt
from . import support as shared


def info(
    path: Annotated[
        str, typer.Argument(help="A space, population, gallery, coefficients or LoRA.")
    ],
) -> None:
    """Say what is in a space, a population, a gallery, a coefficients file or a LoRA."""
    from .info import describe

    for key, value in describe(path):
        typer.echo(f"{key:<14} {value}")


def doctor() -> None:
    """Versions, devices, and which code serves each operation here, and why."""
    from .info import examine

    for key, value in examine():
        typer.echo(f"{key:<14} {value}")


def demo(
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("w2w-demo"),
    photo: Annotated[Path | None, typer.Option(help="A portrait photo to invert too.")] = None,
    rebuild: Annotated[
        bool,
        typer.Option(
            "--rebuild",
            help="Instead: make the embedded world again, from nothing, into --out. Two to four "
            "hours on two cores; goes on where it was killed.",
        ),
    ] = False,
    seed: opt.Seed = 0,
    overwrite: opt.Overwrite = False,
) -> None:
    """A weight space at work in a minute: sampled, edited, inverted, exported; one HTML page."""
    if rebuild:
        from ..demo.build import build

        build(out)
        typer.echo(f"{out}: the world; score it with `python -m w2w_fast.demo.score {out}`")
        return
    shared.new_folder(out, overwrite, "report.html")
    if photo is not None:
        from ..files import read_image

        read_image(photo)
    from ..demo.run import run

    typer.echo(f"report: {run(out, photo, seed=seed, overwrite=overwrite)}")


def bench(
    ops: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[OP]...",
            help="reconstruct, project, merge, edit, adapted_linear, unet.",
            show_default="all",
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny sizes: whether it works, not how fast.")
    ] = False,
    device: opt.Device = None,
    compile: Annotated[
        bool, typer.Option("--compile/--no-compile", help="With torch.compile's times.")
    ] = True,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Write every figure there.")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="Name the cases and stop.")] = False,
    overwrite: opt.Overwrite = False,
) -> None:
    """Time each operation against this machine's floor, plain torch and its rivals.

    All of it takes minutes and 4 GB of memory; exit code 1 if a result was wrong.
    """
    if out is not None:
        shared.new_file(out, overwrite, ".json")
    from ..benchmarks.run import go

    raise typer.Exit(go(ops or [], device, quick, compile, out, list_))
