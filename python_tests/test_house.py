"""The structure of the house, read from the tree: what CONTRIBUTING.md promises, held."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import w2w_fast
from w2w_fast.ops import _dispatch

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "w2w_fast"
SOURCES = sorted(PACKAGE.rglob("*.py"))
OPS = sorted(path.stem for path in (PACKAGE / "ops").glob("[!_]*.py"))

# Data flows one way: a file imports from lines above its own, or from its own package.
# The last three are leaves: nobody above may need them.
LAYERS = [
    {"errors"},
    {"files", "labels", "linear", "ranks", "testing", "text_cache"},
    {"layout", "sharing"},
    {"canonical", "population"},
    {"kernels"},  # Triton, at the top of the repository
    {"ops"},
    {"components", "start"},
    {"choice", "readers"},
    {"space"},
    {"attach"},
    {"attributes", "coefficients", "denoise", "explore", "pictures", "whereabouts"},
    {"formats", "gallery", "sources", "prepared"},
    {"encoding", "recipe"},
    {"training"},
    {"inversion", "memory"},
    {"verbs"},
    {"evaluate"},
    {"demo"},
    {"benchmarks"},
    {"cli"},
    {"__main__"},
]


def part(module: str) -> str:
    """The name in LAYERS of a dotted module: w2w_fast.cli.info -> cli"""
    return module.split(".")[1]


def rank(name: str) -> int:
    ranks = [i for i, layer in enumerate(LAYERS) if name in layer]
    assert ranks, f"w2w_fast/{name} has no place yet: add it to LAYERS in {Path(__file__).name}"
    return ranks[0]


def module_name(path: Path) -> str:
    names = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def imported(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Every dotted name that an import statement anywhere in the file refers to."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = module.split(".")
            home = names[: len(names) + is_package - node.level] if node.level else []
            home += [node.module] if node.module else []
            yield from (".".join([*home, alias.name]) for alias in node.names)


def upward(source: str, module: str, is_package: bool = False) -> list[str]:
    """Imports of the package that go against the order of LAYERS."""
    mine, found = part(module), []
    for name in imported(ast.parse(source), module, is_package):
        if not name.startswith("w2w_fast.") or name == "w2w_fast.__version__":
            continue
        other = part(name)
        if other != mine and rank(other) >= rank(mine):
            found.append(name)
    return found


def swallowed(source: str) -> list[int]:
    """Lines that catch a failed import, or everything, and go on as if nothing had happened."""
    broad = {"ImportError", "ModuleNotFoundError", "Exception", "BaseException"}

    def names(*nodes: ast.AST) -> set[str]:
        return {n.id for node in nodes for n in ast.walk(node) if isinstance(n, ast.Name)}

    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler):
            caught = node.type is None or names(node.type) & broad
            found = caught and not any(isinstance(n, ast.Raise) for n in ast.walk(node))
        else:
            found = isinstance(node, ast.Call) and names(*node.args) & broad
            found = found and ast.unparse(node.func).endswith("suppress")
        if found:
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_go_one_way(path):
    module = module_name(path)
    if module == "w2w_fast":
        return  # the facade names everything, and imports at first use
    assert upward(path.read_text(), module, path.name == "__init__.py") == []


def test_the_rule_of_imports_sees():
    assert upward("from .verbs.edit import edit", "w2w_fast.attach") == ["w2w_fast.verbs.edit.edit"]
    assert upward("def f():\n    from .. import demo", "w2w_fast.verbs.fit")
    assert upward("import w2w_fast.cli.info", "w2w_fast.demo.run") == ["w2w_fast.cli.info"]
    assert upward("from . import demo", "w2w_fast.formats", is_package=False)
    assert upward("from ..space import x\nfrom .fit import y", "w2w_fast.verbs.edit") == []
    assert upward("from ..ops import edit", "w2w_fast.formats", is_package=True) == []
    with pytest.raises(AssertionError, match="no place"):
        upward("from .attic import x", "w2w_fast.attach")


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_no_import_error_is_swallowed(path):
    assert swallowed(path.read_text()) == []


def test_the_rule_of_exceptions_sees():
    assert swallowed("try:\n    import x\nexcept ImportError:\n    x = None") == [3]
    assert swallowed("try:\n    f()\nexcept (KeyError, Exception):\n    pass") == [3]
    assert swallowed("try:\n    f()\nexcept:\n    pass") == [3]
    assert swallowed("with contextlib.suppress(ModuleNotFoundError):\n    import x") == [1]
    assert swallowed("try:\n    f()\nexcept Exception as e:\n    raise InputError() from e") == []
    assert swallowed("try:\n    f()\nexcept KeyError:\n    pass") == []


@pytest.mark.parametrize("op", OPS)
def test_each_op_has_its_files(op):
    assert op in _dispatch.OPS, "w2w doctor must list it"
    wanted = [
        f"csrc/{op}.h",
        f"csrc/cpu/{op}.cpp",
        f"csrc/cuda/{op}.cu",
        f"kernels/{op}.py",
        f"python_tests/ops/test_{op}.py",
        f"benchmarks/cases/{op}.py",
    ]
    assert [name for name in wanted if not (ROOT / name).is_file()] == []
    source = (PACKAGE / "ops" / f"{op}.py").read_text()
    assert f"def {op}(" in source, "the public function has the file's name"
    assert re.search(r"def \w+_reference\(", source), "the torch definition"
    assert ast.get_docstring(ast.parse(source)), "the formula"


def test_each_kernel_has_its_op():
    assert sorted(_dispatch.OPS) == OPS
    for folder in ("csrc/cpu/*.cpp", "csrc/cuda/*.cu", "kernels/*.py"):
        stems = {path.stem for path in ROOT.glob(folder) if not path.stem.startswith("_")}
        assert stems - {"dispatch", "parallel"} == set(OPS), folder


def test_only_the_bindings_know_python_and_nothing_knows_torch():
    for path in (ROOT / "csrc").rglob("*.*"):
        includes = set(re.findall(r'#include\s+[<"]([^>"/]+)', path.read_text()))
        assert not includes & {"torch", "ATen", "c10"}, path
        assert ("pybind11" in includes) == (path.name == "bindings.cpp"), path
        assert "Python.h" not in includes, path


def test_only_dispatch_loads_the_extension():
    users = [
        p.name for p in SOURCES if re.search(r"_native\b(?=[\"'])|import _native", p.read_text())
    ]
    assert users == ["_dispatch.py"]


def test_top_folders_are_no_packages():
    """With an __init__.py, other libraries would import one as the package named `kernels`."""
    for folder in ("kernels", "benchmarks", "benchmarks/cases"):
        assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("folder", ["w2w_fast", "python_tests", "csrc", "kernels", "benchmarks"])
def test_files_are_short(folder):
    kinds = {".py", ".cpp", ".h", ".cu", ".cuh"}
    files = [path for path in (ROOT / folder).rglob("*") if path.suffix in kinds]
    lengths = {str(path): len(path.read_text().splitlines()) for path in files}
    assert {name: n for name, n in lengths.items() if n > 500} == {}


def test_one_version():
    assert importlib.metadata.version("w2w_fast") == w2w_fast.__version__
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {w2w_fast.__version__}\n" in citation


def test_import_is_light():
    code = "import sys, w2w_fast; print(sorted({'torch', 'numpy', 'diffusers'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
