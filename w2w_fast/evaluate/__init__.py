"""`evaluate`: every claim of the paper re-run on a space, with nulls, rivals and intervals.

Each section is a module with a `TITLE` and `run(study)`; it answers in plain JSON (see `told`),
which is kept as soon as it is there, so that a killed evaluation goes on with the next section.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from .. import __version__
from ..encoding import fingerprint
from ..errors import InputError
from ..files import read_json, write_json
from .page import write_pages, write_pictures
from .study import FULL, SHORT, HeldOut, Judge, Sight, Size, Study

SECTIONS = (
    "decodability", "edits", "persistence", "ways", "inversion", "components", "unseen", "outside",
    "sampling",
)  # fmt: skip
NEED_PHOTOS = {"inversion", "outside"}
RESULT = "report.json"

__all__ = ["FULL", "SECTIONS", "SHORT", "HeldOut", "Judge", "Sight", "Size", "Study", "evaluate"]


def evaluate(
    study: Study, out: str | Path, sections: Sequence[str] = (), *, progress: bool = True
) -> dict[str, Any]:
    """Run the sections, all that can be by default, and write report.json, .md, .html and figures.

    Called again with the same study it goes on with the sections that are not there yet. Raises
    InputError for an unknown section, one that wants photos the study has none of, and a folder
    with another study's report.
    """
    out = Path(out)
    order = (*SECTIONS, *study.more)
    able = [name for name in order if study.held_out or name not in NEED_PHOTOS]
    wanted = list(sections) or able
    for name in wanted:
        if name not in order:
            raise InputError(f"section: wanted one of {', '.join(order)}, got {name!r}")
        if name not in able:
            raise InputError(f"section: {name} wants photos of people the space never saw")
    about = _about(study)
    result: dict[str, Any] = {"about": about, "sections": {}}
    if (out / RESULT).exists():
        result = read_json(out / RESULT)
        if result.get("about") != about:
            raise InputError(f"{out}: holds the report of another space, size or seed")
    elif out.exists() and any(out.iterdir()):
        raise InputError(f"{out}: not empty, and no report: give another folder")
    for name in wanted:
        if name in result["sections"]:
            continue
        if progress:
            print(f"{name} ...", flush=True)
        began = time.perf_counter()
        module = study.more[name] if name in study.more else import_module(f".{name}", __name__)
        found = module.run(study)
        found |= {"title": module.TITLE, "seconds": round(time.perf_counter() - began, 1)}
        found["pictures"] = write_pictures(out, name, found["pictures"])
        result["sections"][name] = found
        write_json(out / RESULT, result)
    write_pages(out, result, order)
    return result


def _about(study: Study) -> dict[str, Any]:
    space = study.space
    parts = {"mean": space.mean, "std": space.std, "coefficients": space.coefficients}
    return {
        "version": __version__,
        "space": fingerprint(parts),
        "models": space.n,
        "components": space.m,
        "numbers": space.d,
        "seed": study.seed,
        "size": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(study.size).items()},
        "settings": study.settings,
        "inversion": study.inversion,
    }
