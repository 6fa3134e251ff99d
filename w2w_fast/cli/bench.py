"""`w2w bench`: the project's benchmarks on the user's machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options as opt
from . import support as shared


def bench(
    ops: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[OP]...",
            help="reconstruct, project, merge, edit, adapted_linear, unet. [default: all]",
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
