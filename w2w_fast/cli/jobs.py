"""Long jobs of the command line: what one process does of them, and many under Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import InputError
from ..population import Population, open_population
from ..verbs.populate import Listed, recorded
from ..verbs.populate import populate as verb
from . import support as shared


def populate(
    photos: Path,
    out: Path,
    base: str | None,
    labels: Path | None,
    cache: Path | None,
    device: str | None,
    settings: dict[str, Any],
    progress: bool = True,
) -> Population:
    """`w2w populate` in this process. No settings: those that `out` was begun with."""
    from ..denoise import check_prompts, denoiser
    from ..layout import Layout
    from ..sources import open_photos
    from ..training import Recipe

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


def on_ray(address: str, workers: int | None, out: Path, call: dict[str, Any]) -> Population:
    """`w2w populate` by actors of a Ray cluster, on a folder that all of them see.

    Each runs the same job, and the folder's locks share it out. Ray restarts an actor that dies
    and calls it again: it takes up what it had left. address: "local", or the cluster's.
    """
    try:
        import ray
    except ImportError:
        raise InputError("--ray: Ray is not installed: pip install 'w2w_fast[cluster]'") from None
    from tqdm.auto import tqdm

    ray.init(None if address == "local" else address, include_dashboard=False, log_to_driver=False)
    try:
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        workers = workers or gpus or 2
        share = min(1.0, gpus / workers)
        cpus = 1 if share else max(1, int(resources.get("CPU", 1)) // workers)
        actor = ray.remote(num_gpus=share, num_cpus=cpus, max_restarts=-1, max_task_retries=-1)(
            Worker
        )
        here = {k: v.resolve() if isinstance(v, Path) else v for k, v in call.items()}
        team = [actor.remote(cpus) for _ in range(workers)]
        waiting = [member.populate.remote(here) for member in team]
        with tqdm(desc=f"populate, {workers} workers", unit="shard") as bar:
            while waiting:
                ready, waiting = ray.wait(waiting, timeout=1.0)
                bar.update(len(list(out.glob("shard-*.safetensors"))) - bar.n)
                try:
                    ray.get(ready)
                except ray.exceptions.RayTaskError as error:
                    raise error.as_instanceof_cause() from None
    finally:
        ray.shutdown()
    return open_population(out)


class Worker:
    """What an actor is: a process that does the job as if it were alone."""

    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)

    def populate(self, call: dict[str, Any]) -> None:
        populate(**call, progress=False)
