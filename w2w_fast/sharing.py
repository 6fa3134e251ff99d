"""Work on a folder that several processes share: a record of the job, and who holds a piece's lock.

Locks are the operating system's: those of a killed process are free at once, and the next one
takes over. On a network's file system that needs one whose locks work (NFS 4 and later).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError
from .files import read_json, write_json

if TYPE_CHECKING:
    from filelock import BaseFileLock


def begin(path: Path, record: Mapping[str, Any], kind: str) -> None:
    """Start a job's folder by writing its record, or take up one with the same record.

    path: <kind>.json in that folder. record: JSON, {"format", "version", "job": {...}, ...}.
    InputError, naming what differs, for another job, and for a folder that holds other things.
    """
    folder = path.parent
    if not path.exists():
        check_free(path, kind)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, record)
        return
    old = read_record(path, record["format"], record["version"], kind)
    new = json.loads(json.dumps(record))  # tuples are lists in the old one
    mine, other = ({**r, **r.get("job", {})} for r in (new, old))
    names = (record.keys() | new["job"].keys() | old.get("job", {}).keys()) - {"job", "finished"}
    different = sorted(name for name in names if mine.get(name) != other.get(name))
    if different:
        raise InputError(
            f"{folder}: holds a {kind} made with another {', '.join(different)}; "
            "give another folder, or the same settings to go on"
        )


def check_free(path: Path, kind: str) -> None:
    """InputError unless the folder of the record `path` is that job's, empty, or not there yet."""
    folder = path.parent
    here = folder.iterdir() if folder.is_dir() else [folder] if folder.exists() else []
    if not path.exists() and any(not other.name.startswith(".") for other in here):
        raise InputError(f"{folder}: not empty and not a {kind}; give another folder")


def read_record(path: Path, format: str, version: int, kind: str) -> dict[str, Any]:
    """The record of a job, finished or not; InputError for anything else."""
    record = read_json(path)
    fits = isinstance(record, dict) and isinstance(record.get("job", {}), dict)
    if not fits or record.get("format") != format:
        raise InputError(f"{path}: not the record of a {kind}")
    if record.get("version") != version:
        raise InputError(
            f"{path}: version {record.get('version')!r}, this w2w_fast reads {version}"
        )
    return record


def locked(folder: Path, name: str) -> BaseFileLock:
    """The lock of that name, to be entered: one process, and one thread, at a time."""
    from filelock import FileLock

    return FileLock(folder / f".{name}.lock", thread_local=False, is_singleton=False)


def share(
    folder: Path, pieces: int, *, done: Callable[[int], bool], seen: Callable[[int], None]
) -> Iterator[tuple[int, AbstractContextManager]]:
    """(i, its lock, held) of every piece that nobody else does; ends when all others are done.

    Who is given a piece does it and leaves the lock, in any thread: by then done(i) is true.
    seen(i) is told of those that others have done, or that were done before. First what is free
    is given out, then what others hold, as they finish or die.
    """
    from filelock import Timeout

    left = list(range(pieces))
    for wait in (0, -1):
        for i in list(left):
            try:
                held = locked(folder, f"piece-{i:05d}").acquire(timeout=wait)
            except Timeout:
                continue
            left.remove(i)
            if done(i):
                with held:
                    seen(i)
            else:
                yield i, held
