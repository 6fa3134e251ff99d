"""Each kind of contender of every case, under pytest-benchmark: `python -m pytest benchmarks`.

For those who know its tables and comparisons; run.py times all contenders, in turns, and measures
the machine's floors. Not part of the tests: pytest collects it only when asked to.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from w2w_fast.benchmarks import machine
from w2w_fast.benchmarks.bench import KINDS, Case, Setting
from w2w_fast.benchmarks.run import OPS, cases, clear


@pytest.fixture(scope="session")
def setting(pytestconfig: pytest.Config) -> Setting:
    return _setting(pytestconfig)


def _setting(config: pytest.Config) -> Setting:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    quick = config.getoption("--quick")
    return Setting(device, quick, not quick, machine.model_dtype(device))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    setting = _setting(metafunc.config)
    declared = [case for op in OPS for case in cases(op, setting)]
    ids = [f"{case.op}: {case.name}" for case in declared]
    metafunc.parametrize("case", declared, ids=ids, scope="module")


@pytest.fixture(scope="module")
def work(case: Case, setting: Setting) -> Any:
    """The case's inputs, gone before the next case's are made."""
    yield case.build()
    clear(setting)


@pytest.mark.parametrize("kind", KINDS)
def test_contender(case: Case, kind: str, work: Any, setting: Setting, benchmark: Any) -> None:
    """The first contender of a kind that can run here, once its result is right."""
    found = next((c for c in work.contenders if c.kind == kind and not c.absent), None)
    if found is None:
        pytest.skip(f"no contender of the kind {kind} here")
    wait = torch.cuda.synchronize if setting.is_cuda else lambda: None
    benchmark.group = f"{case.op}: {case.name}"
    benchmark.extra_info.update(case.shape, contender=found.name)

    def call() -> None:
        found.call()
        wait()

    with torch.no_grad():
        work.check(found, found.call())
        benchmark.pedantic(call, rounds=3 if setting.quick else 7, warmup_rounds=1)
