"""Work on a folder that several processes share: who holds a piece's lock does it.

Locks are the operating system's: those of a killed process are free at once, and the next one
takes over. On a network's file system that needs one whose locks work (NFS 4 and later).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from filelock import BaseFileLock


def locked(folder: Path, name: str) -> BaseFileLock:
    """The lock of that name, to be entered: one process, and one thread, at a time."""
    from filelock import FileLock

    return FileLock(folder / f".{name}.lock", thread_local=False, is_singleton=False)


def share(
    folder: Path,
    pieces: int,
    work: Callable[[int], None],
    *,
    done: Callable[[int], bool],
    seen: Callable[[int], None],
) -> None:
    """Do every piece that nobody else does; return when all are done.

    work(i) does piece i, after which done(i) is true; seen(i) is told of those that are done by
    others or were before. First what is free, then what others hold, as they finish or die.
    """
    from filelock import Timeout

    left = list(range(pieces))
    for wait in (0, -1):
        for i in list(left):
            try:
                held = locked(folder, f"piece-{i:05d}").acquire(timeout=wait)
            except Timeout:
                continue
            with held:
                if done(i):
                    seen(i)
                else:
                    work(i)
            left.remove(i)
