"""A Linear with one adapter a sample, at the shapes of SD1.5, by every route to it.

linear alone            the base, without an adapter: what the others are compared with
ours, two kernels       the base's GEMM, then low_rank, added
ours, one call          adapted_linear with that backend for the low-rank term
ours, by shape          adapted_linear as users call it: ops.adapted_linear.route decides
A in the GEMM           all identities' A as rows of W: s comes out of the base's GEMM
merged weights          W + scale B A of each identity written once an image, a batched GEMM
plain torch, PEFT adapter_names, torch.compile
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from w2w_fast import ops

from ..bench import Case, Contender, Setting, Work, close, compiled, our_contenders
from . import _inputs

_STEPS = 50  # of an image, over which merged weights are written once


def cases(setting: Setting) -> list[Case]:
    if setting.quick:
        sizes = [(2, 16, 32, 32), (2, 5, 24, 32)]
    else:
        # 64 x 64 latents on a GPU, 32 x 32 on a CPU; the last: attn2.to_v, which reads the text.
        tokens, batches = ((4096, 1024, 256, 64), (1, 8, 16)) if setting.is_cuda else (
            (1024, 256, 64, 16), (4,)
        )  # fmt: skip
        widths = (320, 640, 1280, 1280)
        shapes = [(t, n, n) for t, n in zip(tokens, widths, strict=True)]
        shapes += [(77, 768, n) for n in (320, 640, 1280)]
        sizes = [(b, *shape) for b in batches for shape in shapes]
    name = str(setting.model_dtype).removeprefix("torch.")
    return [
        Case(
            "adapted_linear",
            f"{name} b={b} t={t} {n_in}->{n_out}",
            partial(build, setting, b, t, n_in, n_out),
            {"b": b, "t": t, "in": n_in, "out": n_out, "rank": 1, "dtype": name},
            bytes=setting.model_dtype.itemsize * (b * t * (n_in + n_out) + n_in * n_out),
            flops=2 * b * t * (n_in * n_out + n_in + n_out),
            floor=f"gemm {name}",
        )
        for b, t, n_in, n_out in sizes
    ]


def build(setting: Setting, b: int, t: int, n_in: int, n_out: int) -> Work:
    dtype, scale = setting.model_dtype, 27.0
    place = {"device": setting.device, "dtype": dtype}
    x = _inputs.normal(b, t, n_in, seed=8, **place)
    weight = (_inputs.normal(n_out, n_in, seed=9, device=setting.device) * n_in**-0.5).to(dtype)
    A = (_inputs.normal(b, 1, n_in, seed=10, device=setting.device) * n_in**-0.5).to(dtype)
    B = (_inputs.normal(b, n_out, 1, seed=11, device=setting.device) * 0.4 / scale).to(dtype)
    scaled = (B.float() * scale).to(dtype)
    wide = [v.double() for v in (x, weight, A, B)]
    base = wide[0] @ wide[1].mT
    term = scale * (wide[0] @ wide[2].mT) @ wide[3].mT
    sizes = (
        wide[0].abs() @ wide[1].abs().mT
        + scale * (wide[0].abs() @ wide[2].abs().mT) @ wide[3].abs().mT
    )
    # Routes in the model's dtype round s, the term and the sum; merged weights round W too.
    roomy = base.abs().max() + 4 * term.abs().max()

    def check(contender: Contender, y: Tensor) -> None:
        want = base if contender.kind == "base" else base + term
        terms = torch.maximum(sizes, roomy) if dtype == torch.float32 else None
        if dtype == torch.float32:
            close(contender, y, want, terms)
        else:
            # Twice the room of one rounding: several are made on the way.
            error = (y.double() - want).abs().max()
            most = 4 * torch.finfo(dtype).eps * roomy
            assert bool(error <= most), f"{contender.name}: error {error:.2e}, allowed {most:.2e}"

    def two_kernels(backend: str) -> Callable[[], Tensor]:
        def call() -> Tensor:
            y = functional.linear(x, weight)
            return y.add_(ops.low_rank(x, A, B, scale, backend=backend))

        return call

    def one_call(backend: str) -> Callable[[], Tensor]:
        return lambda: ops.adapted_linear(x, weight, None, A, B, scale, backend=backend)

    users = (x, weight, None, A, B, scale)
    merged = torch.baddbmm(weight.expand(b, -1, -1), scaled, A).mT
    stacked = torch.cat([weight, A.flatten(0, 1)])
    own = torch.arange(b, device=x.device)[:, None, None].expand(b, t, 1)
    row = scaled.mT.contiguous()

    def inside() -> Tensor:
        both = functional.linear(x, stacked)
        return torch.addcmul(both[..., :n_out], both[..., n_out:].gather(2, own), row)

    contenders = [
        Contender("linear alone", "base", lambda: functional.linear(x, weight)),
        *our_contenders("adapted_linear", setting, two_kernels, "two kernels"),
        *our_contenders("adapted_linear", setting, one_call, "one call"),
        Contender("one call, by shape", "ours", lambda: ops.adapted_linear(*users)),
        Contender("A in the GEMM", "eager", inside),
        Contender("merged weights, batched GEMM", "eager", lambda: torch.bmm(x, merged)),
        Contender("torch, as written", "eager", lambda: _written(x, weight, A, scaled)),
        compiled(setting, _written, x, weight, A, scaled),
        _peft(x, weight, A, scaled),
    ]

    def facts() -> dict[str, float]:
        """What writing the merged weights costs, an image's share of it a call."""
        from w2w_fast.testing import timer

        write = timer(lambda: torch.baddbmm(weight.expand(b, -1, -1), scaled, A), 0.05, 3)
        return {f"merged weights: writing them, a {_STEPS}th, s": write.median / _STEPS}

    return Work(contenders, check, facts)


def _written(x: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return functional.linear(x, weight) + (x @ A.mT) @ B.mT


def _peft(x: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> Contender:
    """PEFT's own layer with an adapter a sample, named in ``adapter_names``."""
    from peft import LoraConfig, inject_adapter_in_model

    model = nn.Module()
    model.linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    model.linear.weight = nn.Parameter(weight, requires_grad=False)
    names = [f"person{i}" for i in range(len(x))]
    for i, name in enumerate(names):
        config = LoraConfig(r=1, lora_alpha=1, target_modules=["linear"])
        inject_adapter_in_model(config, model, adapter_name=name)
        model.linear.lora_A[name].weight.data = A[i]
        model.linear.lora_B[name].weight.data = B[i]
    model.eval()
    return Contender("PEFT adapter_names", "rival", lambda: model.linear(x, adapter_names=names))
