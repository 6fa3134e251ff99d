"""A whole UNet of SD1.5's size: one identity a sample, against the base and against PEFT.

All contenders share one set of weights: each is a copy of the modules around the same tensors.
On a GPU the line-up runs eagerly, under torch.compile, and as one CUDA graph. What a change of
identity costs is in swap.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

import w2w_fast as w2w
from w2w_fast import Layout

from ..bench import Case, Contender, Setting, Work
from . import _inputs, swap

_SIZES = {
    True: {
        "sample_size": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": 24,
        "attention_head_dim": 4,
    },
    False: {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
}


def cases(setting: Setting) -> list[Case]:
    name = str(setting.model_dtype).removeprefix("torch.")
    modes = ["eager"]
    if setting.is_cuda:
        modes += ["graph"] + ["compile"] * setting.compile
    side = 8 if setting.quick else 64 if setting.is_cuda else 32
    batches = (1, 8, 16) if setting.is_cuda and not setting.quick else (4,)
    forward = [
        Case(
            "unet",
            f"{mode} {name} b={b} {side}x{side}",
            partial(build, setting, mode, b, side),
            {"b": b, "side": side, "mode": mode, "dtype": name},
            flops=flops(setting.quick, b, side),
            floor=f"gemm {name}",
            seconds=0.0 if setting.quick else 2.5,
        )
        for mode in modes
        for b in (batches if mode != "compile" else batches[-2:-1] or batches)
    ]
    return forward + swap.cases(setting, partial(unet, setting))


def _new(quick: bool, dtype: torch.dtype) -> Any:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        model = UNet2DConditionModel(**_SIZES[quick])
    # nn.Module's own: diffusers' warns about layers to keep in float32, of which there are none.
    return nn.Module.to(model, dtype).eval().requires_grad_(False)


@lru_cache(maxsize=8)
def flops(quick: bool, b: int, side: int) -> int:
    """Of one call, counted on a model without numbers."""
    from torch.utils.flop_counter import FlopCounterMode

    model = _new(quick, torch.float32)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.device("meta"):
        text = torch.empty(b, 77, _SIZES[quick]["cross_attention_dim"])
        model(torch.empty(b, 4, side, side), torch.empty(()), text)
    return counter.get_total_flops()


@lru_cache(maxsize=1)
def unet(setting: Setting) -> Any:
    """The base with random weights; whoever adapts it works on a ``twin``."""
    model = _new(setting.quick, setting.model_dtype).to_empty(device=setting.device)
    pool = _inputs.normal(1 << 25, seed=12, device=setting.device)
    with torch.no_grad():
        for i, (name, weight) in enumerate(model.named_parameters()):
            if weight.ndim == 1:
                weight.fill_(1.0 if name.endswith("weight") else 0.0)
                continue
            start = 7919 * i % (pool.numel() - weight.numel() + 1)
            window = pool[start : start + weight.numel()].view_as(weight)
            weight.copy_(window * weight[0].numel() ** -0.5)
    return model


def layout_of(model: nn.Module) -> Layout:
    return Layout.discover(model, alpha=_inputs.SD15.alpha)


def twin(model: nn.Module, own: tuple[str, ...] = ()) -> Any:
    """A copy of the modules around the same weights, but for those of the modules named in own."""
    keep = {id(t): t for t in (*model.parameters(), *model.buffers())}
    for name in own:
        keep.pop(id(model.get_submodule(name).weight))
    return copy.deepcopy(model, keep)


def build(setting: Setting, mode: str, b: int, side: int) -> Work:
    base = unet(setting)
    lay = layout_of(base)
    place = {"device": setting.device, "dtype": setting.model_dtype}
    args = (
        _inputs.normal(b, 4, side, side, seed=13, **place),
        torch.tensor(500, device=setting.device),
        _inputs.normal(b, 77, base.config.cross_attention_dim, seed=14, **place),
    )
    w = _inputs.adapters(lay, b, seed=15, device=setting.device)
    # Weaker than in the linear cases: 64 modules' effects add up.
    for _, rows in lay.slices():
        w[:, rows] *= 0.25
    with torch.no_grad():
        hooked = _hooks(twin(base), lay, w)
        plain = base(*args).sample
        want = hooked(*args).sample
    effect = (want.float() - plain.float()).square().mean().sqrt()
    assert bool(effect > 0.01 * plain.float().square().mean().sqrt()), "the adapters do too little"
    room = 0.25 if setting.model_dtype.itemsize < 4 else 1e-3

    def check(contender: Contender, got: Tensor) -> None:
        truth = plain if contender.kind == "base" else want
        error = (got.float() - truth.float()).square().mean().sqrt()
        share = float(error / effect)
        assert share <= room, f"{contender.name}: off by {share:.3g} of the adapters' effect"

    ours = twin(base)
    live = w2w.attach(ours, lay, adapters=w)

    def run(model: Callable) -> Callable[[], Tensor]:
        return _runner(model, args, mode)

    contenders = [
        Contender("base", "base", run(base)),
        Contender("ours, one identity a sample", "ours", run(ours)),
    ]
    if mode != "compile":  # a minute or more each to compile; PEFT again for each list of names
        contenders += [
            Contender("plain hooks with bmm", "eager", run(hooked)),
            Contender("PEFT adapter_names", "rival", run(_peft(twin(base), lay, w))),
        ]

    def facts() -> dict[str, int]:
        if mode != "compile":
            return {}
        return {"recompiles in 100 swaps": _recompiles(contenders[1], live, w)}

    return Work(contenders, check, facts)


def _runner(model: Callable, args: tuple, mode: str) -> Callable[[], Tensor]:
    """The call; compiled, or captured in a CUDA graph, at its first use."""
    call = torch.compile(model) if mode == "compile" else model
    state: dict[str, Any] = {}

    def eager() -> Tensor:
        return call(*args).sample

    def graphed() -> Tensor:
        if not state:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    eager()
            torch.cuda.current_stream().wait_stream(side)
            state["graph"] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(state["graph"]):
                state["out"] = eager()
        state["graph"].replay()
        return state["out"]

    return graphed if mode == "graph" else eager


def _hooks(model: nn.Module, lay: Layout, w: Tensor) -> nn.Module:
    """What a user writes: a forward hook with two batched products on each module."""
    for name, (A, B) in lay.split(w).items():
        module = model.get_submodule(name)
        down = A.mT.to(module.weight.dtype).contiguous()
        up = (B.mT * lay.scale).to(module.weight.dtype).contiguous()

        def hook(_: nn.Module, inputs: tuple, out: Tensor, down: Tensor = down, up: Tensor = up):
            return torch.baddbmm(out, torch.bmm(inputs[0], down), up)

        module.register_forward_hook(hook)
    return model


def _peft(model: nn.Module, lay: Layout, w: Tensor) -> Callable:
    """PEFT around the same weights, with an adapter a sample named at each call."""
    from peft import LoraConfig, get_peft_model

    names = [f"person{i}" for i in range(len(w))]
    config = LoraConfig(
        r=lay.rank, lora_alpha=lay.rank, target_modules=list(lay.names), init_lora_weights=False
    )
    wrapped = None
    for name in names:
        if wrapped is None:
            wrapped = get_peft_model(model, config, adapter_name=name, autocast_adapter_dtype=False)
        else:
            wrapped.add_adapter(name, config, autocast_adapter_dtype=False)
    for module, (A, B) in lay.split(w).items():
        layer = model.get_submodule(module)
        like = layer.base_layer.weight
        for i, name in enumerate(names):
            layer.lora_A[name].weight.data = A[i].to(like)
            layer.lora_B[name].weight.data = (B[i] * lay.scale).to(like)
    wrapped.eval()
    return partial(wrapped, adapter_names=names)


def _recompiles(line: Contender, live: Any, w: Tensor) -> int:
    from torch._dynamo.utils import counters

    before = counters["stats"]["unique_graphs"]
    for _ in range(100):
        live.adapters = w.flip(0)
        line.call()
    return counters["stats"]["unique_graphs"] - before
