"""`fit` against other ways to the same components: ``python benchmarks/fit.py --out FILE.json``.

Populations with a falling spectrum are written as shards; every contender starts from these, in a
process of its own, and ends with a basis. Its memory is watched from outside, its basis judged by
the exact one (float64, numpy). ``report.py`` makes docs/fit.md of the newest file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from w2w_fast.benchmarks import machine
from w2w_fast.components import Stack, Standardised, moments, principal_components, work
from w2w_fast.errors import InputError
from w2w_fast.files import write_json
from w2w_fast.layout import Layout, Module
from w2w_fast.linear import largest_angle, orthonormalise_, spans
from w2w_fast.population import begin, finish, open_population, write_shard

FORMAT, VERSION = "w2w_fast.benchmark.fit", 1
SIZES = ((1000, 4480), (1000, 99_648), (2000, 99_648), (4000, 99_648))
QUICK = ((90, 400),)
TARGET = (64_974, 99_648, 10_000)
LIMIT = 300.0
_SHARD = 64
Answer = Tensor  # a basis [d, m]


# --- contenders: shards on disk -> basis [d, m] ---------------------------------------------------


def _ours(way: str) -> Callable[[list[Tensor], int], Answer]:
    def run(shards: list[Tensor], m: int) -> Answer:
        stack = Stack(shards)
        known = moments(stack)
        z = Standardised(stack, known.mean, known.std)
        return principal_components(z, known.n, m, way=way).basis

    return run


def _standardised(shards: list[Tensor]) -> np.ndarray:
    """The whole matrix, float32, as anybody would have it."""
    z = torch.cat(shards)
    std, mean = torch.std_mean(z, dim=0, correction=0)
    return z.sub_(mean).div_(std).numpy()


def _sklearn(shards: list[Tensor], m: int) -> Answer:
    from sklearn.decomposition import PCA

    found = PCA(m, svd_solver="randomized", random_state=0).fit(_standardised(shards))
    return torch.from_numpy(found.components_).mT.contiguous()


def _incremental(shards: list[Tensor], m: int) -> Answer:
    from sklearn.decomposition import IncrementalPCA
    from sklearn.preprocessing import StandardScaler

    stack = Stack(shards)
    ends = np.linspace(0, len(stack), len(stack) // m + 1).astype(int).tolist()  # m at least each
    batches = list(zip(ends, ends[1:], strict=False))
    scaler, found = StandardScaler(), IncrementalPCA(m)
    for start, stop in batches:
        scaler.partial_fit(stack.rows(start, stop).numpy())
    for start, stop in batches:
        found.partial_fit(scaler.transform(stack.rows(start, stop).numpy()))
    return torch.from_numpy(found.components_).float().mT.contiguous()


def _lowrank(shards: list[Tensor], m: int) -> Answer:
    torch.manual_seed(0)
    return torch.svd_lowrank(torch.from_numpy(_standardised(shards)), q=m)[2]


def _svd(shards: list[Tensor], m: int) -> Answer:
    z = torch.from_numpy(_standardised(shards))
    return torch.linalg.svd(z, full_matrices=False)[2][:m].mT.contiguous()


def _exact(shards: list[Tensor], m: int) -> np.ndarray:
    """By numpy alone, in float64: eigenvectors of the Gram matrix, its columns a few at a time."""
    w = torch.cat(shards).numpy()
    mean, std = w.mean(0, dtype=np.float64), w.std(0, dtype=np.float64)
    parts = np.array_split(np.arange(w.shape[1]), max(1, w.size >> 25))

    def z(at: np.ndarray) -> np.ndarray:
        return (w[:, at[0] : at[-1] + 1] - mean[at]) / std[at]

    gram = sum(part @ part.T for part in map(z, parts))
    values, vectors = np.linalg.eigh(gram)
    weights = vectors[:, ::-1][:, :m] / np.sqrt(values[::-1][:m])
    return np.concatenate([(z(at).T @ weights).astype(np.float32) for at in parts])


CONTENDERS: dict[str, Callable[[list[Tensor], int], Answer]] = {
    "w2w_fast": _ours("auto"),
    "w2w_fast, subspace": _ours("subspace"),
    "scikit-learn PCA, randomized": _sklearn,
    "scikit-learn IncrementalPCA": _incremental,
    "torch.svd_lowrank": _lowrank,
    "torch.linalg.svd": _svd,
}


# --- populations and processes --------------------------------------------------------------------


def write(folder: Path, n: int, d: int) -> None:
    """A population [n, d]: factors whose variance falls as 1 / i, and a fifth of noise."""
    generator = torch.Generator().manual_seed(0)
    k = min(1500, n)
    variance = 1 / torch.arange(1, k + 1)
    loadings = torch.randn(k, d, generator=generator) * (variance / variance.sum())[:, None].sqrt()
    mean, scale = torch.randn(2, d, generator=generator)
    layout = Layout((Module("a.to_q", d // 2, d - d // 2),), 1, 1.0)
    begin(folder, layout, {"verb": "benchmark"})
    people: list[dict[str, Any]] = []
    for i, (start, stop) in enumerate(spans(n, _SHARD)):
        z = torch.randn(stop - start, k, generator=generator) @ loadings
        z += 0.5 * torch.randn(stop - start, d, generator=generator)
        names = [f"{j:06d}" for j in range(start, stop)]
        write_shard(folder, i, mean + (0.1 + scale.abs()) * z, names)
        people += [{"name": who, "shard": i, "row": j, "reason": ""} for j, who in enumerate(names)]
    finish(folder, -(-n // _SHARD), people)


def work_alone(name: str, folder: Path, m: int, out: Path) -> None:
    """What a contender's process does: out.npy is its basis, stdout the seconds it took."""
    shards = open_population(folder, verify=False).shards
    for shard in shards:
        shard.sum()  # the file is in memory, for everybody
    start = time.perf_counter()
    basis = _exact(shards, m) if name == "exact" else CONTENDERS[name](shards, m).numpy()
    seconds = time.perf_counter() - start
    np.save(out, basis)
    print(json.dumps({"seconds": seconds, "threads": torch.get_num_threads()}))


def alone(name: str, folder: Path, m: int, out: Path, limit: float) -> dict[str, Any]:
    """A contender's seconds and peaks of memory, or why there are none."""
    command = [sys.executable, str(Path(__file__).resolve()), "--alone", name]
    command += ["--folder", str(folder), "--m", str(m), "--out", str(out)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=0
    )
    peaks: dict[str, int] = {}
    start = time.monotonic()
    while process.poll() is None:
        if time.monotonic() - start > limit:
            process.kill()
            process.communicate()
            return {"name": name, "note": f"stopped after {limit:.0f} s", "peaks": peaks}
        for key, value in _memory(process.pid).items():
            peaks[key] = max(value, peaks.get(key, 0))
        time.sleep(0.05)
    said, wrong = process.communicate()
    if process.returncode:
        last = (wrong.strip().splitlines() or [f"exit {process.returncode}"])[-1]
        return {"name": name, "note": last[:200], "peaks": peaks}
    return {"name": name, "peaks": peaks, **json.loads(said)}


def _memory(pid: int) -> dict[str, int]:
    """rss, and anonymous (not the pages of mapped files), in bytes, where Linux tells them."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # gone, or not Linux
        return {}
    fields = dict(line.split(":", 1) for line in lines[1:])
    keys = {"rss": "Rss", "anonymous": "Anonymous"}
    return {key: int(fields[name].split()[0]) << 10 for key, name in keys.items() if name in fields}


def judge(folder: Path, basis: Tensor, exact: Tensor) -> dict[str, float]:
    """Angles in radians, of all components and to the leading half; the share of variance."""
    m = exact.shape[1]
    orthonormalise_(basis)
    stack = Stack(open_population(folder, verify=False).shards)
    known = moments(stack)
    z = Standardised(stack, known.mean, known.std)
    kept = sum(
        float((z.rows(start, stop) @ basis).double().square().sum())
        for start, stop in stack.spans()
    )
    return {
        "angle": largest_angle(basis, exact),
        "angle_of_half": largest_angle(basis, exact[:, : max(1, m // 2)].contiguous()),
        "explained": kept / (len(stack) * stack.d),
    }


def run(quick: bool, limit: float, scratch: Path | None) -> dict[str, Any]:
    """Every case: the record, as it is written to JSON."""
    started, cases = time.perf_counter(), []
    for n, d in QUICK if quick else SIZES:
        m = min(1000, n // 3)
        with tempfile.TemporaryDirectory(dir=scratch) as temporary:
            folder = Path(temporary, "population")
            print(f"{n} x {d}, m = {m}", file=sys.stderr, flush=True)
            write(folder, n, d)
            reference = alone("exact", folder, m, Path(temporary, "exact.npy"), 4 * limit)
            exact = torch.from_numpy(np.load(Path(temporary, "exact.npy")))
            lines = []
            for name in CONTENDERS:
                out = Path(temporary, "basis.npy")
                line = alone(name, folder, m, out, limit)
                if "seconds" in line:
                    line |= judge(folder, torch.from_numpy(np.load(out)), exact)
                print(f"  {line}", file=sys.stderr, flush=True)
                lines.append(line)
            best = judge(folder, exact.clone(), exact)["explained"]
            cases.append({"n": n, "d": d, "m": m, "exact": reference, "best": best, "lines": lines})
    return {
        "format": FORMAT,
        "version": VERSION,
        "quick": quick,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - started, 1),
        "machine": machine.describe("cpu"),
        "versions": machine.versions(),
        **machine.commit(),
        "cases": cases,
        "growth": growth(cases),
    }


# --- how it grows ---------------------------------------------------------------------------------


def bytes_held(way: str, n: int, d: int, m: int) -> float:
    """What a route holds by its formula: three blocks [d, l], or two squares and the basis."""
    if way == "gram":
        return 8 * 3 * n * n + 4 * d * m
    width = min(n, d, m + max(32, m // 4))
    return 3 * 4 * d * width + 8 * 3 * width**2


def growth(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """The two routes' points, counted operations against seconds; the power laws through them.

    A law is seconds = a * operations^b by least squares of the logarithms; the target is reached by
    the rate of the subspace route's largest point, and by its law.
    """
    found: dict[str, Any] = {}
    for way, name in (("gram", "w2w_fast"), ("subspace", "w2w_fast, subspace")):
        points = [
            {
                "n": case["n"], "d": case["d"], "m": case["m"], "seconds": line["seconds"],
                "work": work(way, case["n"], case["d"], case["m"]),
                "anonymous": line["peaks"].get("anonymous", 0),
                "held": bytes_held(way, case["n"], case["d"], case["m"]),
            }
            for case in cases for line in case["lines"]
            if line["name"] == name and "seconds" in line
        ]  # fmt: skip
        found[way] = {"points": points}
        if len(points) > 1:
            x, y = (np.log([p[key] for p in points]) for key in ("work", "seconds"))
            b, a = np.polyfit(x, y, 1)
            found[way] |= {"factor": float(np.exp(a)), "power": float(b)}
    points = found["subspace"]["points"]
    if points:
        n, d, m = TARGET
        last, total = points[-1], work("subspace", n, d, m)
        found["target"] = {
            "n": n, "d": d, "m": m, "work": total,
            "seconds": total * last["seconds"] / last["work"],
            "held": bytes_held("subspace", n, d, m),
        }  # fmt: skip
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it work?")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write every figure there")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds a contender may take")
    parser.add_argument("--scratch", type=Path, help="where the populations are written")
    for name, kind in (("alone", str), ("folder", Path), ("m", int)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone is not None:
        work_alone(args.alone, args.folder, args.m, args.out)
        return 0
    try:
        if args.out is not None and args.out.suffix != ".json":
            raise InputError(f"--out: wanted a .json file, got {args.out}")
        found = run(args.quick, args.limit, args.scratch)
    except InputError as error:
        print(f"fit.py: {error}", file=sys.stderr)
        return 2
    if args.out is not None:
        write_json(args.out, found)
    print(json.dumps(found["growth"], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
