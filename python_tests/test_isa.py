"""The AVX-512 kernels on a machine without it.

``isa_emulator`` has its own immintrin.h, which writes out the instructions that csrc/cpu uses, and
a cpuid.h that says a processor has them. So the arithmetic, the layouts and the choice at run time
are tested anywhere; what the compiler makes of the real instructions, and speed, are not.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

import elsewhere
import pytest
from cuda_cases import CSRC, compiled

EMULATOR = elsewhere.HERE / "isa_emulator"
FEATURES = ["-D__AVX512F__", "-D__AVX512VNNI__", "-D__AVX512BF16__"]
SETS = {"avx512": FEATURES[:1], "avx512_vnni": FEATURES[:2], "avx512_bf16": FEATURES}
STORED = [("avx512_vnni", "reconstruct"), ("avx512_bf16", "reconstruct")]
OTHERS = [("avx512", op) for op in ("reconstruct", "project", "adapted_linear", "merge", "edit")]


def built(out: Path, kernels: list[tuple[str, str]]) -> str:
    """The path of the extension with these kernels, (instruction set, op), and no others."""
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 compiles the bindings")
    cxx = os.environ.get("CXX") or shutil.which("c++")
    if cxx is None:
        pytest.skip("no C++ compiler")
    flags = [cxx, "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wno-psabi"]
    flags += [f"-I{EMULATOR}", f"-I{CSRC}"]
    python = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    cpu = CSRC / "cpu"
    jobs = [
        (CSRC / "bindings.cpp", [*python, '-DW2W_VERSION="0"']),
        *((cpu / f"{op}.cpp", ["-O1", f"-DW2W_ISA={isa}", *SETS[isa]]) for isa, op in kernels),
        (cpu / "dispatch.cpp", ["-DW2W_X86", "-DW2W_X86_STORED"]),
        (cpu / "parallel.cpp", []),
        (EMULATOR / "absent.cpp", []),
    ]
    objects = [str(out / f"{i}.o") for i in range(len(jobs))]
    compiled(
        [
            [*flags, *more, "-c", str(source), "-o", name]
            for (source, more), name in zip(jobs, objects, strict=True)
        ]
    )
    library = str(out / "_native.so")
    compiled([[*flags, "-shared", "-pthread", *objects, "-o", library]])
    return library


@pytest.fixture(scope="session")
def emulated(tmp_path_factory) -> str:
    return built(tmp_path_factory.mktemp("isa"), STORED)


def native_tests(library: str, which: str, *files: str) -> None:
    options = ["-q", "-x", "-n0", "-p", "no:cacheprovider", "-k", which]
    files = [str(elsewhere.HERE / "ops" / name) for name in files]
    text = elsewhere.python("-m", "pytest", *options, *files, W2W_EMULATED=library)
    assert " passed" in text and "skipped" not in text, text[-2000:]


def test_rows_of_reconstruct(emulated):
    native_tests(emulated, "avx512_", "test_native_rows.py")


@pytest.mark.parametrize("lack, best", [("", 0), ("bf16", 1), ("leaf", 1), ("vnni", 2), ("zmm", 3)])
def test_the_best_set_of_a_processor_is_chosen(emulated, lack, best):
    code = (
        "import importlib.util as u, sys; spec = u.spec_from_file_location('_native', sys.argv[1]);"
        "native = u.module_from_spec(spec); spec.loader.exec_module(native);"
        "features = native.cpu_features(); print(features['isa'], *features['supported'])"
    )
    isas = ["avx512_bf16", "avx512_vnni", "avx512", "avx2", "portable"][best:]
    names = elsewhere.python("-c", code, emulated, W2W_EMULATED_LACK=lack).split()
    assert names == [isas[0], *isas]


@pytest.mark.slow
def test_all_kernels(tmp_path):
    library = built(tmp_path, OTHERS + STORED)
    native_tests(library, "avx512", "test_native.py", "test_native_rows.py")
