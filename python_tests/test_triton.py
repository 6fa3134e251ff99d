"""The Triton kernels: right under the interpreter, and compiled for GPUs that need not be here.

Each half needs triton imported its own way, so each runs in a process of its own: the tests of
ops/ that take a backend, and triton_compile.py. On a machine with a GPU the tests of ops/ run on
it without this file.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

if importlib.util.find_spec("triton") is None:
    pytest.skip(f"triton is not installed (none for {sys.platform}?)", allow_module_level=True)


def run(*args: str, interpret: bool) -> str:
    """What a Python process prints; fails with its last words if it does."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env |= {"TRITON_INTERPRET": "1" if interpret else "0", "OMP_NUM_THREADS": "1"}
    if interpret:
        env["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, *args]
    done = subprocess.run(command, cwd=HERE.parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def test_interpreted_kernels_equal_oracle(monkeypatch):
    monkeypatch.setenv("W2W_TEST_BACKENDS", "triton")
    select = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "triton"]
    text = run(*select, str(HERE / "ops"), interpret=True)
    assert " passed" in text and "skipped" not in text, text[-2000:]


@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles_and_spills_nothing(capability):
    text = run(str(HERE / "triton_compile.py"), str(capability), interpret=False)
    built = [json.loads(line) for line in text.splitlines()]
    for line in built:
        print(f"sm_{capability} {line}")
    names = {name for file in Path(HERE.parent, "kernels").glob("*.py") for name in kernels(file)}
    assert {line["kernel"] for line in built} == names, "every kernel of the folder is compiled"
    assert [line for line in built if line["stack"]] == [], "registers spilled to memory"


def kernels(file: Path) -> list[str]:
    """The launched kernels of a file, by their names."""
    starts = [line.split("(")[0] for line in file.read_text().splitlines()]
    return [
        s.removeprefix("def ") for s in starts if s.startswith("def ") and s.endswith("_kernel")
    ]
