"""Ten thousand identities put into one model: ``python benchmarks/swaps.py``.

Each swap is of new coefficients, of one, four or two people a batch in turn for each hundred; every
tenth is followed by a forward. The base's weights are hashed before, at each thousand and after;
memory is noted at each hundred. Once with hooks, and once with merged weights, which must be the
base's bits again after detaching. Then a compiled model, to which identities are put while dynamo's
counter of graphs is watched.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import w2w_fast as w2w
from w2w_fast.benchmarks import machine
from w2w_fast.benchmarks.generate import Rows
from w2w_fast.benchmarks.models import Model, model, record, resident, seconds, unshared
from w2w_fast.encoding import fingerprint
from w2w_fast.files import write_json

FORMAT, VERSION = "w2w_fast.benchmark.swaps", 1
PEOPLE = (1, 4, 2)  # in the batch, in turn


def _memory(of: Model) -> dict[str, int]:
    found = {"resident": resident()}
    if of.place["device"].type == "cuda":
        found["allocated"] = torch.cuda.memory_allocated()
    return found


def _forward(of: Model, module: Any, batches: dict[int, Rows], k: int) -> Tensor:
    t = torch.tensor(500, device=of.place["device"])
    return module(batches[k].latents, t, batches[k].text).sample


@torch.no_grad()
def swaps(of: Model, n: int, merged: bool) -> dict[str, Any]:
    """n swaps: hashes of the weights, memory at each hundredth of the way, seconds of all."""
    block, point = max(1, n // 10), max(1, n // 100)
    batches = {k: Rows.draw(of, k, 1, 2) for k in PEOPLE}
    before = fingerprint(of.unet)
    memory: list[dict[str, int]] = []
    changed = 0
    live = w2w.attach(of.unet, of.space, merged=merged)

    def some(first: int) -> None:
        k = 1 if merged else PEOPLE[first // point % len(PEOPLE)]
        generator = torch.Generator().manual_seed(first)
        for i in range(first, min(first + point, n)):
            c = torch.randn(k, of.space.m, generator=generator).to(of.space.sigma)
            live.identities = of.space.mu + of.space.sigma * c
            if i % 10 == 0:
                assert bool(_forward(of, of.unet, batches, k).isfinite().all()), f"swap {i}"

    took = 0.0
    for first in range(0, n, point):
        took += seconds(lambda first=first: some(first))
        memory.append({"swaps": min(first + point, n), **_memory(of)})
        if not merged and (first + point) % block == 0:
            changed += fingerprint(of.unet) != before
    live.detach()
    changed += fingerprint(of.unet) != before
    return {
        "merged": merged, "swaps": n, "seconds": took, "hash": before, "changed": changed,
        "memory": memory,
    }  # fmt: skip


@torch.no_grad()
def recompiles(of: Model, n: int, backend: str) -> dict[str, Any]:
    """Graphs that dynamo makes of the compiled model for the first people, and for n more."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    base = unshared(of.unet)
    batches = {4: Rows.draw(of, 4, 1, 2)}
    with w2w.attach(base, of.space, identities=w2w.sample(of.space, 4, seed=0)) as live:
        compiled = torch.compile(base, backend=backend, fullgraph=True)
        counters.clear()
        first = seconds(lambda: _forward(of, compiled, batches, 4))
        graphs = counters["stats"]["unique_graphs"]
        for seed in range(1, n + 1):
            live.identities = w2w.sample(of.space, 4, seed=seed)
            out = _forward(of, compiled, batches, 4)
        off = (out - _forward(of, base, batches, 4)).abs().max() / out.abs().max()
    more = counters["stats"]["unique_graphs"] - graphs
    return {"backend": backend, "swaps": n, "graphs": graphs, "more": more, "first": first,
            "off": float(off)}  # fmt: skip


def measure(base: str, n: int, graphs: int, device: str, backend: str) -> list[dict[str, Any]]:
    of = model(base, device, machine.model_dtype(device))
    rows = [swaps(of, n, merged) for merged in (False, True)]
    rows.append(recompiles(of, graphs, backend))
    return [{"base": base, **row} for row in rows]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", choices=("world", "sd15", "tiny"), default="world")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--quick", action="store_true", help="a few swaps: does it work?")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    n, graphs, backend = (100, 3, "eager") if args.quick else (10_000, 100, "inductor")
    rows = measure(args.base, n, graphs, args.device, backend)
    for row in rows:
        print({key: value for key, value in row.items() if key != "memory"})
    if args.out:
        write_json(args.out, record(FORMAT, VERSION, args.quick, args.device, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
