"""What a benchmark is: a case declares inputs, bytes, flops and contenders; ``measure`` runs it.

A contender is timed only after its result has passed the case's check; one that fails prints no
figure. All contenders of a case, and the floor they are held against, take turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from w2w_fast.errors import InputError
from w2w_fast.ops import _dispatch
from w2w_fast.testing import allowed, assert_close, race

KINDS = ("ours", "eager", "compile", "rival", "base")
"""ours; plain torch; torch.compile; what others do; the model without adapters."""

OURS = {"cpu": ("native",), "cuda": ("cuda", "triton")}
"""The backends of our own that serve each device, beside plain torch."""


@dataclass(frozen=True)
class Setting:
    """Where and how large: quick sizes are for tests, and no figure of theirs means anything."""

    device: str = "cpu"
    quick: bool = False
    compile: bool = True
    model_dtype: torch.dtype = torch.bfloat16  # the faster one for a model's GEMMs here

    @property
    def is_cuda(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def ours(self) -> tuple[str, ...]:
        return OURS["cuda" if self.is_cuda else "cpu"]


@dataclass
class Contender:
    """One way to do the work. ``absent`` says why it cannot run here; then it is not called."""

    name: str
    kind: str
    call: Callable[[], Any]
    dtype: torch.dtype = torch.float32  # the rounding its result is held to
    absent: str = ""


@dataclass
class Work:
    """A case with its inputs in memory. ``check`` raises AssertionError on a wrong result."""

    contenders: list[Contender]
    check: Callable[[Contender, Any], None]
    facts: Callable[[], dict[str, float | int | str]] = dict


@dataclass(frozen=True)
class Case:
    """One line-up: bytes moved and flops done by the least work that gives the result."""

    op: str
    name: str
    build: Callable[[], Work]
    shape: dict[str, Any] = field(default_factory=dict)
    bytes: int = 0
    flops: int = 0
    floor: str = ""  # read, copy, gemm float32, gemm bfloat16, or none
    wall: bool = False  # the host's clock on a GPU too: for what a user waits for
    seconds: float = 0.0  # at least so long for each contender, where differences are small


@dataclass(frozen=True)
class Floor:
    """What this machine can do at best: ``call`` moves or computes ``amount`` bytes or flops."""

    name: str
    call: Callable[[], object]
    amount: int


def our_contenders(
    op: str, setting: Setting, make: Callable[[str], Callable[[], Any]], name: str = "ours"
) -> list[Contender]:
    """One contender a backend of ours, with the reason where it is absent, and torch's."""
    found = {backend: (good, why) for backend, good, why in _dispatch.choices(op)}
    lines = []
    for backend in setting.ours:
        good, why = found.get(backend, (False, "no such backend in this version"))
        lines.append(
            Contender(f"{name}, {backend}", "ours", make(backend), absent="" if good else why)
        )
    return [*lines, Contender(f"{name}, plain torch", "eager", make("torch"))]


def compiled(setting: Setting, function: Callable, *args: Any) -> Contender:
    """``function(*args)`` under torch.compile, one graph for this shape alone."""
    absent = "" if setting.compile else "--no-compile"
    call = function if absent else torch.compile(function, fullgraph=True, dynamic=False)
    return Contender("torch.compile", "compile", lambda: call(*args), absent=absent)


def close(contender: Contender, got: Tensor, want: Tensor, terms: Tensor | None = None) -> None:
    """got equals want (float64) to twice the rounding of the contender's dtype, plus one.

    terms: the magnitudes summed; a sum in float32 may lose four roundings of them, in any order.
    """
    wide = terms is not None and contender.dtype.itemsize >= 4
    most = allowed(want.to(contender.dtype), want, 4 * terms if wide else None)
    assert_close(contender.name, got, want, most)


def measure(
    case: Case,
    setting: Setting,
    floors: dict[str, Floor],
    seconds: float,
    evict: Callable[[], object] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Build, check and time one case: the record that goes into the JSON, without ratios."""
    record: dict[str, Any] = {
        "op": case.op,
        "name": case.name,
        "shape": case.shape,
        "bytes": case.bytes,
        "flops": case.flops,
        "floor": case.floor,
        "facts": {},
        "lines": [],
    }
    say(f"{case.op}: {case.name}")
    work = case.build()
    ready: dict[str, Callable[[], Any]] = {}
    with torch.no_grad():
        for contender in work.contenders:
            line = {"name": contender.name, "kind": contender.kind, "state": "ok", "note": ""}
            record["lines"].append(line)
            if contender.absent:
                line |= {"state": "absent", "note": contender.absent}
                continue
            start = time.perf_counter()
            try:
                work.check(contender, contender.call())
            except AssertionError as error:
                line |= {"state": "red", "note": _first_line(error)}
            except Exception as error:  # a rival of another version, or out of memory: recorded
                line |= {"state": "failed", "note": f"{type(error).__name__}: {_first_line(error)}"}
            else:
                line["first_s"] = time.perf_counter() - start
                ready[contender.name] = contender.call
        floor = floors.get(case.floor)
        runners = dict(ready)
        if floor is not None and ready:
            runners["floor"] = floor.call
        timings = race(
            runners,
            max(seconds, case.seconds),
            rounds=3 if setting.quick else 7,
            before=evict if case.floor in ("read", "copy") else None,
            on_device=setting.is_cuda and not case.wall,
            warm=False,
        )
        record["facts"] = work.facts()
    for line in record["lines"]:
        if line["name"] in ready:
            timing = timings[line["name"]]
            line |= {"best": timing.best, "median": timing.median, "calls": timing.calls}
    if "floor" in timings:
        record["floor_rate"] = floor.amount / timings["floor"].median
    return record


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def rates(record: dict[str, Any], floors: dict[str, dict[str, float]]) -> None:
    """Add to every timed line its rate, its share of the floor, and the ratios over the others.

    The floor of a case is the faster of two medians: the run's, and the one that took turns with
    the contenders. A ratio is the time of the fastest of that kind over this line's.
    """
    timed = [line for line in record["lines"] if "median" in line]
    by_flops = record["floor"].startswith("gemm")
    amount = record["flops"] if by_flops else record["bytes"]
    known = floors.get(record["floor"], {}).get("median", 0.0)
    best = max(known, record.get("floor_rate", 0.0))
    fastest = {
        kind: min((x["median"] for x in timed if x["kind"] == kind), default=None) for kind in KINDS
    }
    for line in timed:
        if amount:
            line["rate"] = amount / line["median"]
            if best:
                line["share"] = line["rate"] / best
        line["ratios"] = {
            kind: least / line["median"]
            for kind, least in fastest.items()
            if least is not None and kind not in ("ours", line["kind"])
        }


def is_red(record: dict[str, Any]) -> bool:
    """A wrong result anywhere, or one of ours that raised."""
    return any(
        line["state"] == "red" or (line["state"] == "failed" and line["kind"] == "ours")
        for line in record["lines"]
    )


def check_device(name: str) -> None:
    """InputError unless tensors can be put on that device."""
    if name != "cpu" and not name.startswith("cuda"):
        raise InputError(f"--device: wanted cpu or cuda, got {name!r}")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {name}: no CUDA device here")
