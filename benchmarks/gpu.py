"""All that a machine with a GPU is needed for, in one script: build, test, sanitize, measure.

    python benchmarks/gpu.py --out FOLDER [--stages build,tests,sanitizer,bench,verbs] [--minutes N]

Needs a checkout, nvcc, and in this Python torch with CUDA, diffusers, peft, pytest and the build
tools (scikit-build-core, pybind11, cmake, ninja); no network. `build` installs the checkout in
place into this Python (where that is the system's own, set PIP_BREAK_SYSTEM_PACKAGES=1, or use an
environment). Without git, name the checkout's commit in W2W_COMMIT. A stage that fails does not
stop the next. Copy FOLDER's benchmarks-*.json to benchmarks/results and run report.py to put the
figures into docs/benchmarks.md; those of the stage verbs likewise, as cuda-NAME.json.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("build", "tests", "sanitizer", "bench", "verbs")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
BENCHES = {
    "ops": ("reconstruct", "project", "merge", "edit"),
    "linear": ("adapted_linear",),
    "unet": ("unet",),
}
VERBS = {
    "populate": ("populate.py",),
    "generate-world-steps": ("generate.py", "--base", "world", "--what", "steps"),
    "generate-world-images": ("generate.py", "--base", "world", "--what", "images"),
    "generate-sd15-steps": ("generate.py", "--base", "sd15", "--what", "steps"),
    "invert-world": ("invert.py", "--what", "world"),
    "invert-sd15": ("invert.py", "--what", "sd15"),
    "invert-memory": ("invert.py", "--what", "memory", "--rounds", "1"),
    "swaps": ("swaps.py",),
}
Stage = dict[str, Any]


class Session:
    """The output folder, the time left, and how a command is run into a log."""

    def __init__(self, out: Path, minutes: float | None) -> None:
        self.out = out
        self.end = None if minutes is None else time.monotonic() + 60 * minutes

    def run(self, command: list[str], log: str, limit: float, **env: str) -> tuple[int, str]:
        """(exit status, its output), which is appended to FOLDER/log; 124 where time ran out."""
        if self.end is not None:
            limit = min(limit, self.end - time.monotonic())
        if limit < 5:
            return 124, "no time left"
        with (self.out / log).open("a", encoding="utf-8") as file:
            file.write(f"$ {' '.join(command)}\n")
            try:
                done = subprocess.run(
                    command, cwd=ROOT, env={**os.environ, **env}, timeout=limit, text=True,
                    errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                )  # fmt: skip
                status, text = done.returncode, done.stdout
            except subprocess.TimeoutExpired as error:
                text = error.stdout or b""
                text = text if isinstance(text, str) else text.decode(errors="replace")
                status, text = 124, f"{text}\nstopped after {limit:.0f} s"
            except OSError as error:
                status, text = 127, str(error)
            file.write(f"{text}\n[exit {status}]\n\n")
        return status, text


def build(session: Session) -> Stage:
    """Compile and install the checkout in place; what is chosen for each op afterwards."""
    status, text = session.run(
        [
            sys.executable, "-m", "pip", "install", "--no-index", "--no-deps",
            "--no-build-isolation", "-v", "-C", "cmake.define.W2W_CUDA=ON", "-e", ".",
        ],
        "build.log", 900, W2W_REQUIRE_NATIVE="1",
    )  # fmt: skip
    _, doctor = session.run(
        [sys.executable, "-c", "from w2w_fast.cli import main; main()", "doctor"], "build.log", 120
    )
    chosen = [line for line in doctor.splitlines() if line.startswith(("op ", "native", "cuda"))]
    return {"ok": status == 0, "say": _last(text), "doctor": chosen}


def tests(session: Session) -> Stage:
    """The tests marked gpu."""
    status, text = session.run(
        [
            sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rfEs", "-p", "no:cacheprovider",
        ],
        "tests.log", 1200,
    )  # fmt: skip
    counts = {
        what: int(n)
        for n, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)", _last(text))
    }
    # A run that collected nothing, or skipped everything, has shown nothing.
    return {"ok": status == 0 and counts.get("passed", 0) > 0, "say": _last(text), **counts}


def sanitizer(session: Session) -> Stage:
    """compute-sanitizer's tools over sanitize.py."""
    found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(found).is_file():
        return {"ok": False, "say": "compute-sanitizer not found"}
    stage: Stage = {"ok": True, "say": ""}
    for tool in TOOLS:
        status, text = session.run(
            [found, "--tool", tool, sys.executable, str(ROOT / "benchmarks" / "sanitize.py")],
            "sanitizer.log", 600, PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )  # fmt: skip
        errors = _errors(text)
        # Libraries read what they never wrote, harmlessly: initcheck counts in our kernels alone.
        ours = len(re.findall(r"^=========\s+at .*(?:w2w|_kernel)", text, re.MULTILINE))
        bad = ours if tool == "initcheck" else errors
        right = "all right" in text
        stage[tool] = {"ok": right and bad == 0, "errors": errors, "ours": ours, "status": status}
        stage["ok"] = stage["ok"] and stage[tool]["ok"]
    stage["say"] = ", ".join(
        f"{tool} {'clean' if stage[tool]['ok'] else 'NOT CLEAN'} ({stage[tool]['errors']} errors, "
        f"{stage[tool]['ours']} in our kernels)"
        for tool in TOOLS
    )
    return stage


def _errors(text: str) -> int | None:
    """Of the tool's last summary; None where it wrote none."""
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", text)
    return int(found[-1]) if found else None


def bench(session: Session) -> Stage:
    """run.py on the GPU, each group of ops in a process and a file of its own."""
    stage: Stage = {"ok": True, "files": []}
    says = []
    for name, ops in BENCHES.items():
        out = session.out / f"benchmarks-{name}.json"
        status, text = session.run(
            [
                sys.executable, str(ROOT / "benchmarks" / "run.py"), *ops, "--device", "cuda",
                "--out", str(out),
            ],
            "bench.log", 1800,
        )  # fmt: skip
        stage["ok"] = stage["ok"] and status == 0
        if out.is_file():
            stage["files"].append(out.name)
        says.append(f"{name}: exit {status}" + (f" ({_last(text)})" if status else ""))
    stage["say"] = ", ".join(says)
    return stage


def verbs(session: Session) -> Stage:
    """The benchmarks of whole verbs, each a script of its own."""
    stage: Stage = {"ok": True, "files": []}
    says = []
    for name, (script, *options) in VERBS.items():
        out = session.out / f"{name}.json"
        command = [sys.executable, str(ROOT / "benchmarks" / script), *options]
        status, text = session.run(
            [*command, "--device", "cuda", "--out", str(out)], "verbs.log", 1800
        )
        stage["ok"] = stage["ok"] and status == 0 and out.is_file()
        if out.is_file():
            stage["files"].append(out.name)
        says.append(f"{name}: exit {status}" + (f" ({_last(text)})" if status else ""))
    stage["say"] = ", ".join(says)
    return stage


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def device() -> dict[str, Any] | None:
    """What torch and nvcc say of this machine; None without a CUDA device."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    said = ""
    if Path(nvcc).is_file():
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "nvcc": (re.findall(r"release ([\d.]+)", said) or ["none"])[0],
    }


def goals(out: Path, files: list[str]) -> list[str]:
    """The goals for a GPU, one line each."""
    from w2w_fast.benchmarks.goals import GOALS
    from w2w_fast.files import read_json

    cases = [case for name in files for case in read_json(out / name)["cases"]]
    lines = []
    for goal in GOALS["cuda"]:
        measured, verdict = goal.judge({"cases": cases})
        lines.append(f"  {goal.text}: {measured + ': ' if measured else ''}{verdict}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT") or "gpu-results"),
        help="folder for logs and JSON; default: $OUT, or gpu-results",
    )  # fmt: skip
    parser.add_argument("--stages", default=",".join(STAGES), help=f"default: {','.join(STAGES)}")
    parser.add_argument("--minutes", type=float, help="stop everything after so long")
    args = parser.parse_args()
    stages = args.stages.split(",")
    if not set(stages) <= set(STAGES):
        parser.error(f"--stages: wanted some of {', '.join(STAGES)}, got {args.stages}")
    box = device()
    if box is None:
        print("not run: no CUDA device")
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    session = Session(args.out.resolve(), args.minutes)
    calls: dict[str, Callable[[Session], Stage]] = {
        "build": build, "tests": tests, "sanitizer": sanitizer, "bench": bench,
        "verbs": verbs,
    }  # fmt: skip
    found: dict[str, Any] = {"machine": box, "stages": {}}
    for name in (stage for stage in STAGES if stage in stages):
        start = time.monotonic()
        try:
            stage = calls[name](session)
        except Exception as error:  # the next stage may still tell something
            stage = {"ok": False, "say": f"{type(error).__name__}: {error}"}
        stage["seconds"] = round(time.monotonic() - start, 1)
        found["stages"][name] = stage
        # Written after each stage: a machine that is taken away leaves what was found.
        _write(session.out / f"summary-{'-'.join(stages)}.json", found)
        print(
            f"{name}: {'ok' if stage['ok'] else 'FAILED'} in {stage['seconds']} s: {stage['say']}"
        )
    print(", ".join(f"{key} {value}" for key, value in box.items()))
    for line in found["stages"].get("build", {}).get("doctor", []):
        print(f"  {line}")
    files = found["stages"].get("bench", {}).get("files", [])
    if files:
        print("goals:", *goals(session.out, files), sep="\n")
    return 0 if all(stage["ok"] for stage in found["stages"].values()) else 1


def _write(path: Path, found: dict[str, Any]) -> None:
    import json

    path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
