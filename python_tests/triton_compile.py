"""Compile what the Triton launchers would launch, for GPUs this machine need not have.

    python triton_compile.py 90    one JSON line a kernel: name, registers, spills, shared memory

The launchers run on meta tensors of real sizes; instead of a launch, the arguments are compiled
as the runtime would specialise them.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from w2w_fast.kernels import adapted_linear, edit, merge, project, reconstruct

D, M = 99_648, 10_000  # a published space
SD15 = ((4096, 320), (1024, 640), (256, 1280))  # tokens and width of its attention layers
empty = partial(torch.empty, device="meta")


def stored(bits: int) -> tuple[Tensor, Tensor | None]:
    """A basis of ``bits`` and its scales."""
    dtype = {32: torch.float32, 16: torch.bfloat16, 8: torch.int8, 4: torch.uint8}[bits]
    return empty(D, M if bits > 4 else M // 2, dtype=dtype), empty(D) if bits < 16 else None


def calls() -> Iterator[tuple[str, Any]]:
    """(label, a call that launches) of every kernel, in the variants that real sizes meet."""
    mean, std = empty(D), empty(D)
    for bits, k in [*itertools.product((32, 16, 8, 4), (1, 16)), (16, 64), (8, 64)]:
        basis, row_scale = stored(bits)
        space = (basis, mean, std, row_scale)
        c, w = empty(k, M), empty(k, D, dtype=torch.bfloat16)
        label = f"{bits} bits, k {k}"
        yield label, partial(reconstruct.reconstruct, c, *space, w)
        for divide in (True, False) if bits == 16 else (True,):
            yield f"divide {divide}, {label}", partial(project.project, w, *space, divide, c)
    for dtype, r in (
        (torch.bfloat16, 1),
        (torch.bfloat16, 4),
        (torch.float16, 16),
        (torch.float32, 1),
        (torch.float32, 4),
    ):
        label = f"{str(dtype)[6:]}, r {r}"
        t, width = SD15[0]
        x, A, B = (empty(8, *s, dtype=dtype) for s in ((t, width), (r, width), (width, r)))
        index, scale = (None, 1.0) if r > 1 else (empty(8, dtype=torch.int64), empty(8))
        s = empty(8, t, r)
        yield label, partial(adapted_linear.low_rank, x, x, A, B, index, scale, x, s)
        yield label, partial(adapted_linear.low_rank, None, x, B.mT, A.mT, index, scale, x, s)
        yield label, partial(adapted_linear.low_rank, None, x, B.mT, A.mT, index, scale, None, s)
        yield label, partial(adapted_linear.outer, s, x, index, scale, A)
        yield label, partial(adapted_linear.outer, s, x, index, scale, B.mT)
        table, first = empty(64, 8, dtype=torch.int64), (x, x, empty(r, width), empty(width, r))
        for aligned in (True, False):
            yield label, partial(merge.merge, first, table, 1000, r, 1.0, aligned)
    for dtype in (torch.float32, torch.bfloat16):
        w = empty(8, D, dtype=dtype)
        yield str(dtype)[6:], partial(edit.edit, w, empty(D), empty(8), w)


def compile_all(capability: int) -> Iterator[dict[str, Any]]:
    """Compile each distinct launch once; ptxas's own words for registers and spills."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile, make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    target, launches, seen = GPUTarget("cuda", capability, 32), [], set()
    backend = make_backend(target)

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, extra = bind(*args, **options)
        packed = kernel._pack_args(backend, options, bound, specialization, extra)
        launches.append((kernel, *packed))

    with mock.patch.object(JITFunction, "run", record):
        for label, call in calls():
            launches.clear()
            call()
            assert launches, f"{label} launched nothing"
            for kernel, options, signature, constexprs, attributes in launches:
                key = f"{kernel.__name__} {signature} {constexprs} {attributes} {options}"
                if key in seen:
                    continue
                seen.add(key)
                source = ASTSource(kernel, signature, constexprs, attributes)
                built = compile(source, target=target, options=options.__dict__)
                name = {"kernel": kernel.__name__, "case": label}
                yield {**name, "shared": built.metadata.shared, **usage(built.asm["cubin"])}


def usage(cubin: bytes) -> dict[str, int]:
    """Registers a thread and bytes of local memory (spills) of a compiled kernel."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    fields = dict(item.split(":", 1) for item in text.split() if item.count(":") == 1)
    return {"registers": int(fields["REG"]), "stack": int(fields["STACK"])}


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET", "0") != "1", "the interpreter compiles nothing"
    for line in compile_all(int(sys.argv[1])):
        print(json.dumps(line), flush=True)
