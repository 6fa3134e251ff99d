"""A command's job by many workers of a Ray cluster, on a folder that all of them see."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import InputError


def spread(
    address: str,
    workers: int | None,
    job: Callable[..., object],
    call: dict[str, Any],
    name: str,
    unit: str,
    progress: Callable[[], tuple[int, int | None]],
) -> None:
    """job(**call, progress=False) by actors of a Ray cluster; returns when all came to its end.

    Each runs the same job, and the folder's locks share it out. Ray restarts an actor that dies
    and calls it again: it takes up what it had left. address: "local", or the cluster's.
    workers: one a GPU by default. progress(): how many units are done, and of how many, if known.
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
        team = [actor.remote(cpus) for _ in range(workers)]
        waiting = [member.work.remote(job, _absolute(call)) for member in team]
        with tqdm(desc=f"{name}, {workers} workers", unit=unit) as bar:
            while waiting:
                ready, waiting = ray.wait(waiting, timeout=1.0)
                done, bar.total = progress()
                bar.update(max(0, done - bar.n))
                try:
                    ray.get(ready)
                except ray.exceptions.RayTaskError as error:
                    raise error.as_instanceof_cause() from None
    finally:
        ray.shutdown()


def _absolute(value: Any) -> Any:
    """Paths mean the same to other processes then, in the dicts of a call too."""
    if isinstance(value, dict):
        return {key: _absolute(item) for key, item in value.items()}
    return value.resolve() if isinstance(value, Path) else value


class Worker:
    """What an actor is: a process that does the job as if it were alone."""

    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)

    def work(self, job: Callable[..., object], call: dict[str, Any]) -> None:
        job(**call, progress=False)
