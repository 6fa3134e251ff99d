"""The command `w2w populate`, in one process or by many under Ray."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from . import cluster
from . import options as opt
from . import support as shared

if TYPE_CHECKING:
    from ..population import Population


def populate(
    photos: Annotated[
        Path,
        typer.Argument(
            help="One sub-folder of photos for each person (x.txt beside x.png is its prompt, "
            "x.mask.png where the person is); or a CSV or Parquet table with columns subject, "
            "path, prompt, mask; or webdataset shards, .tar."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The population's folder; a second call resumes.")],
    base: opt.Base = None,
    prompt: Annotated[str, typer.Option(help="Where a photo has none of its own.")] = "sks person",
    labels: Annotated[
        Path | None, typer.Option(help="CSV or Parquet, kept for fit: a column name, attributes.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, max=100_000)] = 800,
    lr: Annotated[float, typer.Option(help="AdamW's learning rate.")] = 1e-4,
    eps: Annotated[float, typer.Option(help="AdamW's epsilon; larger is smoother.")] = 1e-8,
    weight_decay: Annotated[float, typer.Option(help="AdamW's.")] = 0.0,
    prior: Annotated[float, typer.Option(help="Weight of prior preservation; 0: none.")] = 1.0,
    class_prompt: Annotated[str, typer.Option(help="The prior's pictures are of this.")] = "person",
    class_images: Annotated[int, typer.Option(min=1, max=10_000, help="How many.")] = 200,
    snr_gamma: Annotated[float, typer.Option(help="Min-SNR weighting, often 5; 0: none.")] = 0.0,
    check: Annotated[
        int, typer.Option(help="Steps between looks at a held-out photo's loss; 0: none.")
    ] = 0,
    patience: Annotated[int, typer.Option(help="Looks without a new best that end it.")] = 2,
    batch: Annotated[int, typer.Option(min=1, max=4096, help="People trained at once.")] = 8,
    vram: opt.Vram = None,
    shard: Annotated[int, typer.Option(min=1, max=65_536, help="People a file.")] = 256,
    train: Annotated[str, typer.Option(metavar="AB|B", help="Both factors, or B alone.")] = "AB",
    start: Annotated[
        Path | None,
        typer.Option(
            help="Everybody's start: a population or a space (its mean), a LoRA, or a file of a w."
        ),
    ] = None,
    timesteps: Annotated[str, typer.Option(metavar="uniform|early")] = "uniform",
    average: Annotated[float, typer.Option(help="Share of last steps averaged.")] = 0.0,
    rank: Annotated[int, typer.Option(min=1, max=256)] = 1,
    alpha: Annotated[float, typer.Option(help="The adapters' alpha.")] = 27.0,
    bf16: Annotated[bool, typer.Option("--bf16", help="Autocast to bfloat16.")] = False,
    checkpointing: opt.Checkpointing = False,
    cache: Annotated[
        Path | None, typer.Option(help="Keep encoded photos there, for other runs too.")
    ] = None,
    resume: opt.Resume = False,
    ray: opt.Ray = None,
    workers: opt.Workers = None,
    seed: opt.Seed = 0,
    device: opt.Device = None,
) -> None:
    """Train an adapter for each person, many at once, on one frozen base model.

    Several of these on one folder share the work; killed ones lose a minute at most.
    """
    settings: dict[str, Any] = {}
    if not resume:
        recipe = {
            "steps": steps, "lr": lr, "eps": eps, "weight_decay": weight_decay, "train": train,
            "timesteps": timesteps, "average": average, "prior": prior, "seed": seed,
            "class_prompt": class_prompt, "class_images": class_images, "snr_gamma": snr_gamma,
            "check": check, "patience": patience,
        }  # fmt: skip
        settings = {
            "recipe": recipe, "start": start, "batch": batch, "vram": vram, "shard": shard,
            "bf16": bf16, "checkpointing": checkpointing, "rank": rank, "alpha": alpha,
            "prompt": prompt,
        }  # fmt: skip
    call = {
        "photos": photos, "out": out, "base": shared.anywhere(base), "labels": labels,
        "cache": cache, "device": device, "settings": settings,
    }  # fmt: skip
    if ray is None:
        if workers is not None:
            raise InputError("--workers: wanted with --ray only")
        made = job(**call)
    else:
        made = on_ray(ray, workers, call)
    lost = made.table.num_rows - len(made)
    note = f"; {lost} set aside, see `w2w info {out}`" if lost else ""
    typer.echo(f"{out}: {len(made)} people, {made.layout.size} numbers each{note}")


def job(
    photos: Path,
    out: Path,
    base: str | None,
    labels: Path | None,
    cache: Path | None,
    device: str | None,
    settings: dict[str, Any],
    progress: bool = True,
) -> Population:
    """The command in this process. No settings: those that `out` was begun with."""
    from ..denoise import check_prompts, denoiser
    from ..layout import Layout
    from ..sources import open_photos
    from ..training import Recipe
    from ..verbs.populate import Listed, recorded
    from ..verbs.populate import populate as verb

    settings = dict(settings)
    if settings:
        settings["recipe"] = Recipe(**settings["recipe"])
        vram = settings.pop("vram")
        settings["memory"] = None if vram is None else shared.memory_size(vram)
        check_prompts([settings["prompt"]])
    else:
        settings = recorded(out)
    listing = open_photos(photos)
    pipe = shared.open_pipeline(base, None, device)
    subjects = Listed(listing, shared.image_size(pipe), settings.pop("prompt"))
    layout = settings.pop("layout", None)
    if layout is None:
        rank, alpha, start = (settings.pop(name) for name in ("rank", "alpha", "start"))
        layout = Layout.discover(denoiser(pipe), rank=rank, alpha=alpha)
        settings["start"] = None if start is None else shared.read_start(start, layout)
    return verb(
        pipe, subjects, layout, out, labels=labels, cache=cache, progress=progress, **settings
    )


def on_ray(address: str, workers: int | None, call: dict[str, Any]) -> Population:
    """The command by workers of a Ray cluster."""
    from ..population import open_population

    out = call["out"]
    cluster.spread(
        address, workers, job, call, "populate", "shard",
        lambda: (len(list(out.glob("shard-*.safetensors"))), None),
    )  # fmt: skip
    return open_population(out)
