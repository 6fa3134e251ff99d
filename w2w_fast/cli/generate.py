"""The command `w2w generate`, in one process or by many under Ray."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from . import cluster
from . import options as opt
from . import support as shared

if TYPE_CHECKING:
    from ..gallery import Gallery
    from ..space import WeightSpace


def generate(
    space: opt.SpaceArg,
    identities: Annotated[Path | None, typer.Option(help="A coefficients file.")] = None,
    sampled: Annotated[
        int | None,
        typer.Option("--sample", min=1, max=1_000_000, help="Or: so many sampled people."),
    ] = None,
    edits: Annotated[
        str, typer.Option(help="As of edit, of everybody: attribute=amount,...,hold=attribute.")
    ] = "",
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            help="A prompt, or a text file with one a line; may be repeated.",
            show_default="the space's, or sks person",
        ),
    ] = None,
    per_identity: Annotated[
        int | None,
        typer.Option(min=1, max=1_000_000, help="Images of each.", show_default="one a prompt"),
    ] = None,
    seed: opt.Seed = 0,
    steps: Annotated[
        int | None, typer.Option(min=1, max=1000, show_default="the space's, or 50")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0, max=1000, show_default="the space's, or 3")
    ] = None,
    identity_guidance: Annotated[
        bool | None,
        typer.Option("--identity-guidance/--plain-guidance", show_default="the space's"),
    ] = None,
    strength: Annotated[float, typer.Option(help="Of the adapters.")] = 1.0,
    start: Annotated[
        int | None,
        typer.Option(min=0, max=1000, help="Delayed edit: it sets in at this timestep."),
    ] = None,
    before: Annotated[
        Path | None,
        typer.Option(
            help="Until then they are these.", show_default="who they are without --edits"
        ),
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="A diffusers class's name.", show_default="the base's own")
    ] = None,
    base: opt.OwnBase = None,
    batch: opt.Batch = 32,
    vram: opt.Vram = None,
    tiling: Annotated[
        bool, typer.Option("--tiling", help="The VAE's tiling and slicing: less memory.")
    ] = False,
    compile: Annotated[
        bool,
        typer.Option("--compile", help="torch.compile, on a GPU as CUDA graphs: a minute, once."),
    ] = False,
    dtype: opt.Dtype = "float32",
    format: Annotated[
        str, typer.Option(metavar="png|webp|jpeg|tar", help="tar: webdataset shards of PNGs.")
    ] = "png",
    out: Annotated[Path, typer.Option(help="The gallery's folder; a second call resumes.")] = Path(
        "images"
    ),
    resume: opt.Resume = False,
    ray: opt.Ray = None,
    workers: opt.Workers = None,
    device: opt.Device = None,
) -> None:
    """Pictures of many different people in one batch, each with a seed of its own.

    Several of these on one folder share the work; killed ones lose two batches at most.
    """
    shared.writable(out)
    memory = None if vram is None else shared.memory_size(vram)
    settings: dict[str, Any] = {}
    if not resume:
        if (identities is None) == (sampled is None):
            raise InputError("wanted either --identities FILE or --sample N")
        settings = {
            "identities": identities, "sampled": sampled, "before": before, "start": start,
            "edits": edits, "prompts": None if prompts is None else shared.read_prompts(prompts),
            "per_identity": per_identity, "seed": seed, "strength": strength, "batch": batch,
            "memory": memory, "tiling": tiling, "compile": compile, "scheduler": scheduler,
            "dtype": dtype, "format": format,
            "own": shared.given(
                steps=steps, guidance=guidance, identity_guidance=identity_guidance
            ),
        }  # fmt: skip
    call = {
        "space": shared.anywhere(space), "out": out, "base": shared.anywhere(base),
        "device": device, "settings": settings,
    }  # fmt: skip
    if ray is None:
        if workers is not None:
            raise InputError("--workers: wanted with --ray only")
        made = job(**call)
    else:
        made = on_ray(ray, workers, call)
    people = made.table["row"][-1].as_py() + 1
    typer.echo(f"{out}: {len(made)} images of {people} people; see contact-sheets/00000.jpg")


def job(
    space: str,
    out: Path,
    base: str | None,
    device: str | None,
    settings: dict[str, Any],
    progress: bool = True,
) -> Gallery:
    """The command in this process. No settings: those that `out` was begun with."""
    from ..verbs.generate import named_scheduler
    from ..verbs.generate_to import generate_to, recorded

    opened = shared.open_space(space, device)
    options = _options(opened, **settings) if settings else recorded(out)
    pipe = shared.open_pipeline(base, opened, device, options.pop("dtype"))
    name = options.pop("scheduler")
    scheduler = None if name is None else named_scheduler(name, pipe)
    return generate_to(opened, pipe, out=out, scheduler=scheduler, progress=progress, **options)


def _options(
    space: WeightSpace,
    identities: Path | None,
    sampled: int | None,
    before: Path | None,
    prompts: list[str] | None,
    own: dict[str, Any],
    seed: int,
    **rest: Any,
) -> dict[str, Any]:
    """The command's settings as `generate_to` takes them, the space's where none was given."""
    from ..coefficients import read_coefficients
    from ..verbs.sample import sample

    kinds = {"prompt": str, "steps": int, "guidance": float, "identity_guidance": bool}
    known = {"steps": 50, "guidance": 3.0, "identity_guidance": False, "prompt": "sks person"}
    known |= shared.defaults(space, "generate", kinds) | own
    prompt = known.pop("prompt")
    if identities is None:
        people = sample(space, sampled, seed=seed)
    else:
        people = read_coefficients(identities, space.m)
    unedited = None if before is None else read_coefficients(before, space.m)
    return {
        "coefficients": people, "before": unedited, "prompts": prompts or [prompt], "seed": seed,
        **known, **rest,
    }  # fmt: skip


def on_ray(address: str, workers: int | None, call: dict[str, Any]) -> Gallery:
    """The command by workers of a Ray cluster."""
    from ..gallery import images_done, open_gallery

    out = call["out"]
    cluster.spread(address, workers, job, call, "generate", "image", lambda: images_done(out))
    return open_gallery(out, verify=False)
