"""kill -9 at random moments of populate, fit and generate: nothing lost, nothing twice, same bytes.

    python python_tests/attacks/kills.py --kills 200 --out python_tests/attacks/results/kills.json
    python python_tests/attacks/kills.py --people 1000 --kills 20 \\
        --out python_tests/attacks/results/kills-generate.json

A tiny job is done once undisturbed. Then it is started again and again in processes that are
killed after a random time; after every kill what is on disk must be as the undisturbed job wrote
it, and once a process comes to its end, every file must be. A process is a fork of this one, which
has the model in memory already: most of its life is then work, and most kills hit it.

With --people it is instead one job of generate on the world that ships, killed so many times on
its way: that many sampled people, an image of each.
"""

from __future__ import annotations

import argparse
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

from tiny_world import make_pipe, make_space, photographs, tree  # noqa: E402

from w2w_fast import Layout, demo, fit, generate_to, populate, sample  # noqa: E402
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
    repeated: int = 0  # shards, or images of pieces marked as done, that were written twice
    different: int = 0  # files that are not as the undisturbed job wrote them
    stale: int = 0  # files beside those
    names: list[str] = field(default_factory=list)  # of all these
    files: int = 0  # that the undisturbed job wrote
    usual: float = 0.0  # seconds that it took
    seconds: float = 0.0
    alive: list[float] = field(default_factory=list)  # seconds that each killed process had

    @property
    def clean(self) -> bool:
        return not (self.lost or self.repeated or self.different or self.stale)


def committed(folder: Path) -> list[str]:
    """The files that no later process may write again: shards, and images of marked pieces."""
    names = [path.name for path in folder.glob("shard-*")]
    return names + [n for mark in folder.glob(".done-*") for n in json.loads(mark.read_text())]


def campaign(
    job: str, work: Callable[[Path], object], root: Path, kills: int, seed: int,
    longest: float = 1.1,
) -> Log:  # fmt: skip
    """Kill `work`, which makes a folder, so many times; what it leaves is the log.

    longest: that a process lives before it is killed, in times of the undisturbed job.
    """
    chance, log, began = random.Random(seed), Log(job, seed), time.monotonic()

    def note(found: Iterable[str]) -> int:
        names = sorted(found)
        log.names += names
        return len(names)

    start = time.monotonic()
    _fork(work, root / "whole", None)
    usual = time.monotonic() - start
    want = tree(root / "whole")
    log.files, log.usual = len(want), round(usual, 1)
    while log.kills < kills:
        folder, seen, inodes = root / "job", {}, {}
        while True:
            after = chance.uniform(0.0, longest * usual) if log.kills < kills else None
            ended = _fork(work, folder, after)
            now = tree(folder) if folder.exists() else {}
            # Names with a dot in front are of work that is going on.
            whole = {n: h for n, h in now.items() if "/." not in f"/{n}"}
            log.lost += note(n for n, h in seen.items() if whole.get(n) != h)
            log.repeated += note(
                n for n, i in inodes.items() if n in now and (folder / n).stat().st_ino != i
            )
            here = [n for n in [*inodes, *committed(folder)] if n in now]
            inodes = {n: (folder / n).stat().st_ino for n in here}
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
    """The three jobs, on the tiny world; everything they share is made in `root`.

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

    space = make_space(layout)
    people = sample(space, PEOPLE)

    def generating(folder: Path) -> None:
        generate_to(space, pipe, people, folder, per_identity=3, steps=3, batch=4, progress=False)

    populating(root / "population")
    return {"populate": populating, "fit": fitting, "generate": generating}


def long_job(people: int) -> tuple[str, Callable[[Path], object]]:
    """An image of each of so many people, by the world that ships: what it is, and the job."""
    space, pipe = demo.space(), demo.pipeline()
    sampled = sample(space, people)
    options = {"steps": 2, "identity_guidance": True, "batch": 16}
    about = f"generate: {people} people of the world that ships, an image each, {options}"
    return about, lambda folder: generate_to(
        space, pipe, sampled, folder, **options, progress=False
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="of each job")
    parser.add_argument("--people", type=int, help="one long job of generate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="the log, JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logs = []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        long = args.people is not None
        todo = dict([long_job(args.people)]) if long else jobs(root, prior=1.0)
        for job, work in todo.items():
            folder = Path(tempfile.mkdtemp(dir=root))
            longest = 1.2 / args.kills if long else 1.1  # one job holds all the kills
            logs.append(campaign(job, work, folder, args.kills, args.seed, longest))
            log = asdict(logs[-1])
            print({name: value for name, value in log.items() if name != "alive"})
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps([asdict(log) for log in logs], indent=1) + "\n")
    return 0 if all(log.clean for log in logs) else 1


if __name__ == "__main__":
    sys.exit(main())
