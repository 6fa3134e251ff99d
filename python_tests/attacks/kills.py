"""kill -9 at random moments of populate and fit: nothing lost, nothing twice, the same bytes.

    python python_tests/attacks/kills.py --kills 200 --out python_tests/attacks/results/kills.json

A tiny job is done once undisturbed. Then it is started again and again in processes that are
killed after a random time; after every kill what is on disk must be as the undisturbed job wrote
it, and once a process comes to its end, every file must be. A process is a fork of this one, which
has the model in memory already: most of its life is then work, and most kills hit it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny_world import make_pipe, photographs  # noqa: E402

from w2w_fast import Layout, fit, populate  # noqa: E402
from w2w_fast.sources import Subject  # noqa: E402
from w2w_fast.training import Recipe  # noqa: E402

PEOPLE = 7


@dataclass
class Log:
    """What a campaign found."""

    job: str
    seed: int
    kills: int = 0
    jobs: int = 0  # that came to their end
    lost: int = 0  # files that an earlier process had written whole, gone or changed
    repeated: int = 0  # shards that were written twice
    different: int = 0  # files that are not as the undisturbed job wrote them
    stale: int = 0  # files beside those
    names: list[str] = field(default_factory=list)  # of all these
    seconds: float = 0.0
    alive: list[float] = field(default_factory=list)  # seconds that each killed process had

    @property
    def clean(self) -> bool:
        return not (self.lost or self.repeated or self.different or self.stale)


def hashes(folder: Path) -> dict[str, str]:
    """Name -> sha256 of every file below."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def campaign(job: str, work: Callable[[Path], object], root: Path, kills: int, seed: int) -> Log:
    """Kill `work`, which makes a folder, so many times; what it leaves is the log."""
    chance, log, began = random.Random(seed), Log(job, seed), time.monotonic()

    def note(found: Iterable[str]) -> int:
        names = sorted(found)
        log.names += names
        return len(names)

    start = time.monotonic()
    _fork(work, root / "whole", None)
    usual = time.monotonic() - start
    want = hashes(root / "whole")
    while log.kills < kills:
        folder, seen, inodes = root / "job", {}, {}
        while True:
            after = chance.uniform(0.0, 1.1 * usual) if log.kills < kills else None
            ended = _fork(work, folder, after)
            now = hashes(folder) if folder.exists() else {}
            # Names with a dot in front are of work that is going on.
            whole = {n: h for n, h in now.items() if not n.startswith(".")}
            shards = {n: (folder / n).stat().st_ino for n in whole if n.startswith("shard")}
            log.lost += note(n for n, h in seen.items() if whole.get(n) != h)
            log.repeated += note(n for n, inode in shards.items() if inodes.get(n, inode) != inode)
            inodes |= shards
            # The record and the manifest change as the job ends; all else is written once.
            seen = {n: h for n, h in whole.items() if not n.endswith(".json")}
            log.different += note(n for n, h in seen.items() if want.get(n) != h)
            if ended:
                break
            log.kills += 1
            log.alive.append(round(after, 4))
        log.jobs += 1
        log.different += note(n for n, h in want.items() if now.get(n) != h)
        log.stale += note(now.keys() - want.keys())
        shutil.rmtree(folder)
    log.seconds = round(time.monotonic() - began, 1)
    return log


def _fork(work: Callable[[Path], object], folder: Path, after: float | None) -> bool:
    """Run work in a process of its own, killed after so many seconds; True if it ended well."""
    child = os.fork()
    if not child:
        code = 1
        try:
            work(folder)
            code = 0
        finally:
            os._exit(code)
    deadline = None if after is None else time.monotonic() + after
    while True:
        done, status = os.waitpid(child, os.WNOHANG if deadline else 0)
        if done:
            if status:
                raise RuntimeError(f"the job failed by itself: status {status}")
            return True
        if time.monotonic() >= deadline:
            os.kill(child, signal.SIGKILL)
            return os.waitpid(child, 0)[1] == 0
        time.sleep(0.001)


def jobs(root: Path, prior: float = 0.0) -> dict[str, Callable[[Path], object]]:
    """The two jobs, on the tiny world; everything they share is made in `root`.

    With a prior the pictures of the class are made first, which takes longer than all the rest.
    """
    recipe = Recipe(
        steps=6, lr=0.01, eps=1e-4, average=0.5, prior=prior, class_images=2, check=2, patience=1
    )
    pipe = make_pipe(root / "tokenizer")
    layout = Layout.discover(pipe.unet, alpha=8.0)
    subjects = [
        Subject(f"person-{i}", photographs(3, seed=i), ("sks person",) * 3) for i in range(PEOPLE)
    ]

    def populating(folder: Path) -> None:
        populate(
            pipe, subjects, layout, folder, recipe=recipe, batch=2, shard=3, save_every=0.0,
            progress=False,
        )  # fmt: skip

    def fitting(folder: Path) -> None:
        fit(root / "population", 3).save(folder, overwrite=True)

    populating(root / "population")
    return {"populate": populating, "fit": fitting}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="of each job")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="the log, JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logs = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for job, work in jobs(root, prior=1.0).items():
            (root / job).mkdir()
            logs.append(campaign(job, work, root / job, args.kills, args.seed))
            log = asdict(logs[-1])
            print({name: value for name, value in log.items() if name != "alive"})
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps([asdict(log) for log in logs], indent=1) + "\n")
    return 0 if all(log.clean for log in logs) else 1


if __name__ == "__main__":
    sys.exit(main())
