"""Python in a process of its own: for what must be settled before torch or triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def python(*args: str, **variables: str) -> str:
    """What ``python args`` prints, run in the repository; fails with its last words if it does."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env |= {"OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, *args]
    done = subprocess.run(command, cwd=HERE.parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def tests_of_ops(backend: str, **variables: str) -> None:
    """Run the tests of ops/ that take ``backend``, on the CPU; all of them must have run."""
    options = ["-q", "-x", "-n0", "-p", "no:cacheprovider", "-k", backend]
    files = [str(path) for path in (HERE / "ops").glob("test_*.py") if path.stem != "test_native"]
    variables |= {"W2W_TEST_BACKENDS": backend, "CUDA_VISIBLE_DEVICES": ""}
    text = python("-m", "pytest", *options, *files, **variables)
    assert " passed" in text and "skipped" not in text, text[-2000:]
