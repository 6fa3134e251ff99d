"""What the tests and benchmarks share: a comparison that says where, and a small timer."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


def allowed(plain: Any, want: Any, terms: Any = None, factor: float = 2.0) -> float:
    """The error a kernel may make: ``factor`` x plain torch's own, plus one rounding of the data.

    plain: what plain torch computes in the dtype under test; want: the float64 oracle's; terms:
    the magnitudes that were summed to make want, where these may cancel (want's own by default).
    """
    rounding = torch.finfo(plain.dtype).eps
    plain, want = _array(plain), _array(want)
    if not want.size:
        return 0.0
    size = np.abs(want if terms is None else _array(terms)).max()
    return float(factor * np.abs(plain - want).max() + rounding * size)


def assert_close(name: str, got: Any, want: Any, allowed: float) -> None:
    """got equals want to ``allowed`` in every entry; NaN and infinities must be where want's are.

    Fails with the name, the worst index, both values, and the error as a share of the allowed.
    """
    got, want = _array(got), _array(want)
    assert got.shape == want.shape, f"{name}: shape {got.shape}, wanted {want.shape}"
    with np.errstate(invalid="ignore"):
        error = np.where(got == want, 0.0, np.abs(got - want))
    error = np.where(np.isnan(got) & np.isnan(want), 0.0, error)
    error = np.where(np.isnan(error), np.inf, error)
    if not error.size or error.max() <= allowed:
        return
    at = np.unravel_index(int(error.argmax()), error.shape)
    where, share = tuple(int(i) for i in at), error[at] / allowed if allowed else np.inf
    raise AssertionError(
        f"{name}{list(where)}: got {got[at]!r}, wanted {want[at]!r}: error {error[at]:.3e} is "
        f"{share:.2f} of the allowed {allowed:.3e}; {int((error > allowed).sum())} of "
        f"{error.size} entries are outside"
    )


def _array(value: Any) -> np.ndarray:
    if isinstance(value, Tensor):
        value = value.detach().cpu().double().numpy()
    return np.asarray(value, dtype=np.float64)


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the least, the median, and how many calls were timed."""

    best: float
    median: float
    calls: int


def timer(call: Callable[[], object], seconds: float = 0.2, calls: int = 5) -> Timing:
    """Time ``call`` alone: a ``race`` of one."""
    return race({"": call}, seconds, calls)[""]


def race(
    calls: Mapping[str, Callable[[], object]],
    seconds: float = 0.2,
    rounds: int = 5,
    *,
    before: Callable[[], object] | None = None,
    on_device: bool = False,
    warm: bool = True,
) -> dict[str, Timing]:
    """Time several calls in turns, so that whatever else the machine does hits all of them alike.

    After one call each to warm up (``warm``), each gets at least ``rounds`` turns and ``seconds``,
    at most 20 x ``rounds`` turns, and two once these took eight times as long as was asked.
    ``before`` runs untimed before each. ``on_device`` takes the GPU's own clock, which leaves out
    what the host spends on a launch as long as ``before`` keeps the GPU busy meanwhile.
    """
    clock = _device_seconds if on_device else _wall_seconds
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values() if warm else ():
        clock(call)

    def wants(spent: list[float]) -> bool:
        slow = len(spent) >= 2 and sum(spent) > 8 * seconds > 0
        if slow or len(spent) >= 20 * rounds:
            return False
        return len(spent) < rounds or sum(spent) < seconds

    while any(map(wants, times.values())):
        for name, call in calls.items():
            if wants(times[name]):
                if before is not None:
                    before()
                times[name].append(clock(call))
    return {name: Timing(min(t), statistics.median(t), len(t)) for name, t in times.items()}


def _wall_seconds(call: Callable[[], object]) -> float:
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def _device_seconds(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
