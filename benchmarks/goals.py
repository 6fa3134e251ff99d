"""What was aimed at, line by line, and how a run answers: met, short by how much, or not run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Run = dict[str, Any]


class NotRun(Exception):
    """The run does not hold the figure; the text says what is missing."""


@dataclass(frozen=True)
class Goal:
    """``value`` of a run, wanted at least (or ``at_most``) ``want``.

    bound: what keeps the figure from the goal, where that was found out; shown when it is short.
    """

    text: str
    value: Callable[[Run], float]
    want: float
    show: Callable[[float], str]
    at_most: bool = False
    bound: str = ""

    def judge(self, run: Run) -> tuple[str, str]:
        """(measured, verdict) as texts."""
        try:
            got = self.value(run)
        except NotRun as reason:
            return "", f"not run: {reason}"
        met = got <= self.want if self.at_most else got >= self.want
        if met:
            return self.show(got), "met"
        short = f"short by {self.show(abs(got - self.want))}"
        return self.show(got), f"{short}; {self.bound}" if self.bound else short


# --- reading a run --------------------------------------------------------------------------------


def record(run: Run, op: str, name: str) -> dict[str, Any]:
    for found in run["cases"]:
        if (found["op"], found["name"]) == (op, name):
            return found
    raise NotRun(f"no case {op}: {name}")


def line(found: dict[str, Any], name: str) -> dict[str, Any]:
    """The timed line of that name."""
    for got in found["lines"]:
        if got["name"] == name:
            if "median" in got:
                return got
            raise NotRun(f"{name}: {got['state']}: {got['note']}")
    raise NotRun(f"no line {name!r}")


def best(found: dict[str, Any]) -> dict[str, Any]:
    """The fastest of our own backends."""
    ours = [got for got in found["lines"] if got["kind"] == "ours"]
    timed = [got for got in ours if "median" in got]
    if not timed:
        why = "; ".join(f"{got['name']}: {got['state']}: {got['note']}" for got in ours)
        raise NotRun(why or "no backend of ours")
    return min(timed, key=lambda got: got["median"])


def _share(op: str, name: str) -> Callable[[Run], float]:
    def value(run: Run) -> float:
        got = best(record(run, op, name))
        if "share" not in got:
            raise NotRun("no floor")
        return got["share"]

    return value


def _rate(op: str, name: str) -> Callable[[Run], float]:
    return lambda run: best(record(run, op, name))["rate"]


def _time(op: str, name: str) -> Callable[[Run], float]:
    return lambda run: best(record(run, op, name))["median"]


def _over(op: str, name: str, rival: str) -> Callable[[Run], float]:
    """How many times as fast as that line."""

    def value(run: Run) -> float:
        found = record(run, op, name)
        return line(found, rival)["median"] / best(found)["median"]

    return value


def _between(op: str, name: str, other: str) -> Callable[[Run], float]:
    """Our time of one case over that of another."""
    return lambda run: _time(op, name)(run) / _time(op, other)(run)


def _named(run: Run, op: str, start: str) -> dict[str, Any]:
    """The case whose name begins so: the model's dtype in it depends on the machine."""
    found = [case for case in run["cases"] if case["op"] == op and case["name"].startswith(start)]
    if not found:
        raise NotRun(f"no case {op}: {start} ...")
    return found[0]


def _swap(seen: int) -> Callable[[Run], float]:
    """Seconds that a swap takes beyond its reconstruct."""

    def value(run: Run) -> float:
        for found in run["cases"]:
            if found["op"] == "unet" and found["shape"].get("seen") == seen:
                live = line(found, "ours, hooks")["median"]
                return live - line(found, "reconstruct alone")["median"]
        raise NotRun(f"no swap after {seen} seen")

    return value


def _overhead(mode: str, b: int, name: str = "ours, one identity a sample") -> Callable:
    """The share of the base UNet's time that the adapters add."""

    def value(run: Run) -> float:
        for found in run["cases"]:
            shape = found["shape"]
            if found["op"] == "unet" and (shape.get("mode"), shape.get("b")) == (mode, b):
                return line(found, name)["median"] / line(found, "base")["median"] - 1
        raise NotRun(f"no UNet case {mode}, batch {b}")

    return value


def _fact(op: str, start: str, fact: str) -> Callable[[Run], float]:
    def value(run: Run) -> float:
        facts = _named(run, op, start)["facts"]
        for name, number in facts.items():
            if name.startswith(fact):
                return number
        raise NotRun(f"{op}: {fact}")

    return value


def _elsewhere(where: str) -> Callable[[Run], float]:
    def value(run: Run) -> float:
        raise NotRun(where)

    return value


def percent(x: float) -> str:
    return f"{x:.1%}"


def times(x: float) -> str:
    return f"{x:.2f}x"


def milliseconds(x: float) -> str:
    return f"{x * 1e3:.2f} ms"


def microseconds(x: float) -> str:
    return f"{x * 1e6:.1f} us"


def terabytes(x: float) -> str:
    return f"{x / 1e12:.2f} TB/s"


def number(x: float) -> str:
    return f"{x:.3g}"


# --- the goals ------------------------------------------------------------------------------------

_BF16 = "torch bfloat16 matmul"

CPU = [
    goal
    for m in (1000, 10_000)
    for goal in (
        Goal(
            f"reconstruct, m = {m:,}, bfloat16: at least 85% of the stream rate",
            _share("reconstruct", f"m={m} bfloat16 k=1"), 0.85, percent,
        ),
        Goal(
            f"reconstruct, m = {m:,}, bfloat16: at least 2x torch's bfloat16 matmul",
            _over("reconstruct", f"m={m} bfloat16 k=1", _BF16), 2.0, times,
            bound="twice what torch does is all that memory gives",
        ),
        Goal(
            f"reconstruct, m = {m:,}: int8 at least 1.7x the bfloat16 kernel",
            _between("reconstruct", f"m={m} bfloat16 k=1", f"m={m} int8 k=1"), 1.7, times,
            bound="half the bytes, and AVX2 needs three instructions to widen eight numbers",
        ),
        Goal(
            f"reconstruct, m = {m:,}, bfloat16: 16 identities in at most 2x the time of one",
            _between("reconstruct", f"m={m} bfloat16 k=16", f"m={m} bfloat16 k=1"), 2.0, times,
            at_most=True,
            bound="16 multiply-adds a number: at AVX2's rate these alone take longer than 2x one's "
            "reading",
        ),
    )
] + [
    Goal(
        f"merge of 64 modules, {dtype}: within 1.3x of reading and writing them",
        lambda run, dtype=dtype: 1 / _share("merge", f"64 modules {dtype}")(run), 1.3, times,
        at_most=True,
    )
    for dtype in ("bfloat16", "float32")
] + [
    Goal(
        f"merge, {dtype}: drift 0 after 10,000 swaps",
        _fact("merge", f"64 modules {dtype}", "drift after 10,000 swaps, ours"), 0.0, number,
        at_most=True,
    )
    for dtype in ("bfloat16", "float32")
] + [
    Goal(
        f"a new identity in a live UNet, {seen} seen before: at most 1 ms over its reconstruct",
        _swap(seen), 1e-3, milliseconds, at_most=True,
    )
    for seen in (1, 10, 100)
] + [
    Goal(
        "UNet, batch 4, 4 identities: over the base no more than PEFT adapter_names adds",
        lambda run: _overhead("eager", 4)(run) - _overhead("eager", 4, "PEFT adapter_names")(run),
        0.0, percent, at_most=True,
    ),
]  # fmt: skip

CUDA = [
    Goal(
        "reconstruct, m = 10,000, bfloat16: at least 95% of the copy rate",
        _share("reconstruct", "m=10000 bfloat16 k=1"), 0.95, percent,
    ),
    Goal(
        "... 16 identities within 1.1x of one",
        _between("reconstruct", "m=10000 bfloat16 k=16", "m=10000 bfloat16 k=1"), 1.1, times,
        at_most=True,
    ),
    Goal(
        "... int8: 3.8 TB/s (an H200's; copy rate there 4.2)",
        _rate("reconstruct", "m=10000 int8 k=1"), 3.8e12, terabytes,
    ),
    Goal(
        "... int4: 3.4 TB/s (an H200's)",
        _rate("reconstruct", "m=10000 int4 k=1"), 3.4e12, terabytes,
    ),
    Goal(
        "project and backward, m = 10,000, bfloat16: at least 90% of the copy rate",
        _share("project", "m=10000 bfloat16 k=1"), 0.9, percent,
    ),
    Goal(
        "edit, one identity: microseconds (10 at most)",
        _time("edit", "float32 k=1"), 1e-5, microseconds, at_most=True,
    ),
    Goal(
        "merge of 64 modules, bfloat16: at most 70 us",
        _time("merge", "64 modules bfloat16"), 70e-6, microseconds, at_most=True,
    ),
    Goal(
        "merge: drift 0 after 10,000 swaps",
        _fact("merge", "64 modules bfloat16", "drift after 10,000 swaps, ours"), 0.0, number,
        at_most=True,
    ),
    *(
        Goal(
            f"UNet in one CUDA graph, batch {b}: at most {most:.0%} over the base",
            _overhead("graph", b), most, percent, at_most=True,
        )
        for b, most in ((1, 0.02), (8, 0.01), (16, 0.01))
    ),
    Goal(
        "UNet, compiled: no recompile in 100 swaps",
        _fact("unet", "compile", "recompiles"), 0.0, number, at_most=True,
    ),
    Goal(
        "attn2 to_k, to_v once an image: 48 of 64 modules left a step",
        _elsewhere("the published layout adapts to_q and to_v; no case yet"), 48, number,
    ),
    Goal(
        "invert: 10x identities an hour side by side",
        _elsewhere("a verb, not an op: no case here"), 10, times,
    ),
    Goal(
        "populate: 10x identities an hour over PEFT one by one",
        _elsewhere("a verb, not an op: no case here"), 10, times,
    ),
    Goal(
        "fit, 64,974 x 99,648, m = 10,000: at most 60 s",
        _elsewhere("a verb, not an op: no case here"), 60, number, at_most=True,
    ),
]  # fmt: skip

GOALS = {"cpu": CPU, "cuda": CUDA}
