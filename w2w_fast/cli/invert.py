"""The command `w2w invert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from . import options as opt
from . import support as shared


def invert(
    space: opt.SpaceArg,
    photos: Annotated[
        list[Path],
        typer.Argument(
            help="A file or a folder for each person (x.mask.png beside x.png is its mask)."
        ),
    ],
    mask: Annotated[
        list[Path] | None,
        typer.Option(help="White on the face; one for all photos, or one each, in order."),
    ] = None,
    auto_mask: Annotated[
        bool,
        typer.Option(
            "--auto-mask", help="Or: a soft ellipse where a portrait's head is; finds no face."
        ),
    ] = False,
    base: opt.OwnBase = None,
    prompt: opt.MaybePrompt = None,
    steps: opt.Steps = None,
    lr: opt.Adam = None,
    prior: Annotated[
        float | None,
        typer.Option(help="Weight of the Gaussian prior; more: less copied from the photo."),
    ] = None,
    paper: Annotated[
        bool, typer.Option("--paper", help="As published: 400 steps, lr 0.1, no prior, unwhitened.")
    ] = False,
    check: Annotated[
        int, typer.Option(help="Steps between looks at each person's held-out loss; 0: none.")
    ] = 0,
    patience: Annotated[int, typer.Option(help="Looks without a new best that end it.")] = 4,
    start: Annotated[
        Path | None,
        typer.Option(help="Coefficients to start from.", show_default="the population's mean"),
    ] = None,
    seed: opt.Seed = 0,
    batch: opt.Batch = 64,
    vram: opt.Vram = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="The base model in bfloat16.")] = False,
    checkpointing: opt.Checkpointing = False,
    report: Annotated[
        Path | None,
        typer.Option(help="A folder for pictures, loss curves and nearest people of each."),
    ] = None,
    out: opt.PeopleOut = Path("inverted.safetensors"),
    device: opt.Device = None,
    overwrite: opt.Overwrite = False,
) -> None:
    """Find people in the space from photographs, one or several of each, many in one batch.

    The same command again goes on where a killed one was, to the same bits.
    """
    shared.new_file(out, overwrite)
    if mask and auto_mask:
        raise InputError("wanted either --mask FILE or --auto-mask")
    from ..coefficients import read_coefficients, write_coefficients
    from ..denoise import centre_mask
    from ..files import new_or_empty
    from ..verbs.invert import PAPER
    from ..verbs.invert import invert as verb

    kinds = {
        "prompt": str, "steps": int, "lr": float, "prior": float, "weight_decay": float,
        "whiten": bool, "timesteps": str, "average": float,
    }  # fmt: skip
    if report is not None:
        new_or_empty(shared.writable(report))
    memory = None if vram is None else shared.memory_size(vram)
    opened = shared.open_space(space, device)
    settings = shared.defaults(opened, "invert", kinds) | (PAPER if paper else {})
    settings |= shared.given(prompt=prompt, steps=steps, lr=lr, prior=prior)
    if report is not None:  # its pictures come after the work: what is wrong is said before
        kinds = {"steps": int, "guidance": float, "identity_guidance": bool}
        shared.defaults(opened, "generate", kinds)
    first = None if start is None else read_coefficients(start, opened.m)
    pipe = shared.open_pipeline(base, opened, device, "bfloat16" if bf16 else "float32")
    size = shared.image_size(pipe)
    people = shared.read_people(photos, size, mask)
    masks = centre_mask(size).expand(len(people.photos), -1, -1, -1) if auto_mask else people.masks
    found = verb(
        opened, pipe, people.photos, masks=masks, people=people.owner, names=people.names,
        check=check, patience=patience, start=first, seed=seed, batch=batch, memory=memory,
        checkpointing=checkpointing, report=report,
        state=out.with_name(f".{out.stem}.state.safetensors"), **settings,
    )  # fmt: skip
    write_coefficients(out, found)
    z = (found - opened.mu) / opened.sigma.clamp_min(1e-12)
    for name, far in zip(people.names, z.square().mean(1).sqrt().tolist(), strict=True):
        typer.echo(f"{name}: {far:.2f} sd from the population's mean")
    told = "" if report is None else f"; see {report / 'report.html'}"
    typer.echo(f"{out}: {len(found)} people from {len(people.photos)} photos{told}")
