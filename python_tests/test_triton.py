"""The Triton kernels: right under the interpreter, and compiled for GPUs that need not be here.

Each half needs triton imported its own way, so each runs in a process of its own: the tests of
ops/ that take a backend, and triton_compile.py. On a machine with a GPU the tests of ops/ run on
it without this file.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import elsewhere
import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip(f"triton is not installed (none for {sys.platform}?)", allow_module_level=True)


def test_interpreted_kernels_equal_oracle():
    elsewhere.tests_of_ops("triton", TRITON_INTERPRET="1")


@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles_and_spills_nothing(capability):
    file = str(elsewhere.HERE / "triton_compile.py")
    text = elsewhere.python(file, str(capability), TRITON_INTERPRET="0")
    built = [json.loads(line) for line in text.splitlines()]
    for line in built:
        print(f"sm_{capability} {line}")
    names = {
        name
        for file in Path(elsewhere.HERE.parent, "kernels").glob("*.py")
        for name in kernels(file)
    }
    assert {line["kernel"] for line in built} == names, "every kernel of the folder is compiled"
    assert [line for line in built if line["stack"]] == [], "registers spilled to memory"


def kernels(file: Path) -> list[str]:
    """The launched kernels of a file, by their names."""
    starts = [line.split("(")[0] for line in file.read_text().splitlines()]
    return [
        s.removeprefix("def ") for s in starts if s.startswith("def ") and s.endswith("_kernel")
    ]
