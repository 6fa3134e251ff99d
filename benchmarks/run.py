"""Run the declared cases and print what they took: ``python benchmarks/run.py [OP ...]``.

The floors are measured before and after, in the same process. The JSON has every figure; the
table shows medians. Exit code 1 if a result was wrong (no figure is printed for it).
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from w2w_fast.benchmarks import machine
from w2w_fast.benchmarks.bench import KINDS, Case, Setting, check_device, is_red, measure, rates
from w2w_fast.errors import InputError
from w2w_fast.files import write_json

OPS = ("reconstruct", "project", "merge", "edit", "adapted_linear", "unet")
FORMAT, VERSION = "w2w_fast.benchmark", 1


def cases(op: str, setting: Setting) -> list[Case]:
    """The cases of one op."""
    if op not in OPS:
        raise InputError(f"{op!r}: no such op to measure; wanted some of {', '.join(OPS)}")
    return import_module(f"w2w_fast.benchmarks.cases.{op}").cases(setting)


def run(
    ops: Sequence[str], setting: Setting, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Measure the cases of ops: the whole record, as it is written to JSON."""
    started = time.perf_counter()
    seconds = 0.005 if setting.quick else 0.3
    lists = [cases(op, setting) for op in ops]
    say("floors of this machine")
    floors = machine.floors(setting)
    evict = machine.evictor(setting)
    before = machine.floor_rates(floors, setting)
    records = []
    for declared in lists:
        for case in declared:
            records.append(measure(case, setting, floors, seconds, evict, say))
            gc.collect()
        clear(setting)
    after = machine.floor_rates(floors, setting)
    # The faster of the two: no share is flattered by a floor that was measured in a bad moment.
    best = {name: max(before[name], after[name], key=lambda r: r["median"]) for name in floors}
    for record in records:
        rates(record, best)
    return {
        "format": FORMAT,
        "version": VERSION,
        "quick": setting.quick,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - started, 1),
        "device": "cuda" if setting.is_cuda else "cpu",
        "machine": machine.describe(setting.device),
        "versions": machine.versions(),
        **machine.commit(),
        "floors": best,
        "cases": records,
    }


def clear(setting: Setting) -> None:
    """Give back the memory of the inputs that cases share."""
    for module, name in (("_inputs", "space"), ("unet", "unet"), ("swap", "_swaps")):
        loaded = sys.modules.get(f"w2w_fast.benchmarks.cases.{module}")
        if loaded is not None:
            getattr(loaded, name).cache_clear()
    gc.collect()
    if setting.is_cuda:
        torch.cuda.empty_cache()


# --- the table ------------------------------------------------------------------------------------

_HEAD = ("contender", "time", "rate", "of floor", *(f"x {kind}" for kind in KINDS[1:]))


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds < 100 * size else (
                f"{seconds / size:.0f} {unit}"
            )  # fmt: skip
    return f"{seconds * 1e9:.0f} ns"


def speed(rate: float, floor: str) -> str:
    unit = "FLOP/s" if floor.startswith("gemm") else "B/s"
    return f"{rate / 1e12:.2f} T{unit}" if rate >= 1e12 else f"{rate / 1e9:.3g} G{unit}"


def cells(line: dict[str, Any], record: dict[str, Any]) -> tuple[str, ...]:
    """One line's columns, as ``_HEAD`` names them; no figure where there is none."""
    if "median" not in line:
        return (line["name"], f"{line['state']}: {line['note']}")
    ratios = line.get("ratios", {})
    return (
        line["name"],
        duration(line["median"]),
        speed(line["rate"], record["floor"]) if "rate" in line else "",
        f"{line['share']:.0%}" if "share" in line else "",
        *(f"{ratios[kind]:.2f}" if kind in ratios else "" for kind in KINDS[1:]),
    )


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows as text; columns in which nobody has a figure are left out, as is what has none."""
    full = [row for row in rows if len(row) == len(_HEAD)]
    used = [i for i in range(1, len(_HEAD)) if any(row[i] for row in full[1:])]
    first = max(len(row[0]) for row in rows)
    lines = []
    for row in rows:
        rest = row[1:]
        if len(row) == len(_HEAD):
            rest = [row[i].rjust(max(len(other[i]) for other in full)) for i in used]
        lines.append("  ".join([f"  {row[0]:<{first}}", *rest]).rstrip())
    return lines


def table(found: dict[str, Any]) -> str:
    """Everything a run found, as aligned text."""
    box, versions = found["machine"], found["versions"]
    dirty = " with changes" if found["dirty"] else ""
    head = [
        f"{box['device']}, {box['threads']} of {box['cores']} CPU threads, torch "
        f"{versions['torch']}, w2w_fast {versions['w2w_fast']}, "
        f"commit {found['commit'][:12]}{dirty}"
    ]
    if found["quick"]:
        head.append("quick sizes: these figures say nothing about speed")
    floors = ", ".join(
        f"{name} {speed(rate['median'], name)}" for name, rate in found["floors"].items()
    )
    head.append(f"floors: {floors} (copy counts bytes read and written)")
    lines: list[str] = []
    for record in found["cases"]:
        lines += ["", f"{record['op']}: {record['name']}"]
        lines += _aligned([_HEAD, *(cells(line, record) for line in record["lines"])])
        lines += [f"  {name}: {value:.4g}" for name, value in record["facts"].items()]
    return "\n".join([*head, *lines])


# --- the command ----------------------------------------------------------------------------------


def go(
    ops: Sequence[str],
    device: str | None,
    quick: bool,
    compile: bool,
    out: Path | None,
    only_list: bool,
) -> int:
    """What `run.py` and `w2w bench` do; the exit code. InputError for what cannot be measured."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    if out is not None and out.suffix != ".json":
        raise InputError(f"--out: wanted a .json file, got {out}")
    setting = Setting(device, quick, compile, machine.model_dtype(device))
    ops = list(dict.fromkeys(ops)) or list(OPS)
    if only_list:
        for op in ops:
            print("\n".join(f"{case.op}: {case.name}" for case in cases(op, setting)))
        return 0
    found = run(ops, setting, lambda text: print(text, file=sys.stderr, flush=True))
    print(table(found))
    red = [record for record in found["cases"] if is_red(record)]
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, found)
        print(f"\nwritten: {out}")
    for record in red:
        print(f"RED: {record['op']}: {record['name']}: a wrong result, or none: see above")
    return 1 if red else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(OPS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it work?")
    parser.add_argument("--device", help="cpu or cuda; default: a GPU if there is one")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write every figure there")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    args = parser.parse_args()
    try:
        return go(args.ops, args.device, args.quick, not args.no_compile, args.out, args.list)
    except InputError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
