"""A new identity put into a live UNet, after 1, 10 and 100 others were: part of the unet cases.

Ours starts from coefficients; "reconstruct alone" is that part of it. The rivals are given the
finished adapter in memory, which favours them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import w2w_fast as w2w
from w2w_fast import Layout, WeightSpace, ops

from ..bench import Case, Contender, Setting, Work
from . import _inputs

_PEOPLE = 16
_LOADED = 10  # adapters that a rival is brought to hold


def cases(setting: Setting, base: Callable[[], nn.Module]) -> list[Case]:
    name = str(setting.model_dtype).removeprefix("torch.")
    m = 64 if setting.quick else 1000
    return [
        Case(
            "unet",
            f"swap {name} m={m}, {seen} seen before",
            partial(build, setting, base, seen, m),
            {"seen": seen, "m": m, "dtype": name},
            wall=True,
        )
        for seen in ((1, 3) if setting.quick else (1, 10, 100))
    ]


def build(setting: Setting, base: Callable[[], nn.Module], seen: int, m: int) -> Work:
    swaps = _swaps(setting, base, m)
    swaps.see(seen)
    space, pristine = swaps.space, swaps.base
    eps = torch.finfo(setting.model_dtype).eps

    def check(contender: Contender, got: tuple[nn.Module, Tensor] | Tensor) -> None:
        if isinstance(got, Tensor):
            return  # reconstruct alone, which has cases of its own
        model, w = got
        adapters = space.layout.split(w)
        for name in (space.layout.names[0], space.layout.names[-1]):
            linear = pristine.get_submodule(name)
            place = {"device": setting.device, "dtype": setting.model_dtype}
            x = _inputs.normal(1, 3, linear.in_features, seed=16, **place)
            A, B = (t.double() for t in adapters[name])
            plain = functional.linear(x.double(), linear.weight.double())
            term = space.layout.scale * (x.double() @ A.mT) @ B.mT
            error = float((model.get_submodule(name)(x).double() - plain - term).abs().max())
            factor = 64 if eps < 1e-6 else 4
            most = factor * eps * float(plain.abs().max() + term.abs().max())
            assert error <= most, f"{contender.name}: {name}: error {error:.2e}, of {most:.2e}"

    # Each load takes longer than the last: a hundred of them take minutes.
    many = "see after 10: loading so many takes minutes" if seen > _LOADED else ""
    contenders = [
        Contender("reconstruct alone", "base", swaps.reconstruct),
        Contender("ours, hooks", "ours", swaps.hooks),
        Contender("ours, merged", "ours", swaps.merge),
        Contender("diffusers load_lora_adapter", "rival", swaps.load, absent=many),
        Contender("PEFT set_adapter, loaded before", "rival", swaps.choose, absent=many),
        Contender("PEFT hotswap", "rival", swaps.hotswap),
        Contender("diffusers unfuse, fuse, loaded before", "rival", swaps.fuse),
    ]
    return Work(contenders, check, swaps.drift)


@lru_cache(maxsize=1)
def _swaps(setting: Setting, base: Callable[[], nn.Module], m: int) -> _Swaps:
    return _Swaps(setting, base(), m)


class _Swaps:
    """A twin of the UNet for each way, and how many identities they have seen.

    Each way is a call that puts the next identity in and returns (model, w it now carries).
    """

    def __init__(self, setting: Setting, base: nn.Module, m: int) -> None:
        from .unet import layout_of, twin

        lay = layout_of(base)
        stored = _inputs.space(lay.size, m, "bfloat16", setting.device)
        place = {"device": setting.device}
        self.base = base
        self.space = WeightSpace(
            layout=lay,
            mean=_inputs.adapters(lay, 1, seed=17, **place)[0],
            std=0.1 * _inputs.adapters(lay, 1, seed=18, **place)[0].abs(),
            basis=stored.basis,
            mu=torch.zeros(m, **place),
            sigma=torch.ones(m, **place),
        )
        self.c = _inputs.normal(_PEOPLE, m, seed=19, **place) * m**-0.5
        self.w = self.space.reconstruct(self.c)
        self.states = [_state_dict(lay, w) for w in self.w]
        self.turn = self.seen = 0
        self.hooked, self.merged = twin(base), twin(base, lay.names)
        self.loaded, self.hot, self.fused = twin(base), twin(base), twin(base, lay.names)
        self.live = w2w.attach(self.hooked, self.space)
        self.live_merged = w2w.attach(self.merged, self.space, merged=True)
        self._load(self.hot, "hot", 0)
        for i in range(2):
            self._load(self.fused, f"person{i}", i)
        self.fused.fuse_lora(adapter_names=["person0"])

    def see(self, seen: int) -> None:
        """Bring every way to so many identities put in before."""
        while self.seen < seen:
            self.hooks()
            if self.seen < _LOADED:
                self.load()
            self.seen += 1

    def _next(self) -> int:
        self.turn += 1
        return self.turn % _PEOPLE

    def reconstruct(self) -> Tensor:
        space, i = self.space, self._next()
        return ops.reconstruct(self.c[i : i + 1], space.basis, space.mean, space.std)

    def hooks(self) -> tuple[nn.Module, Tensor]:
        i = self._next()
        self.live.identities = self.c[i : i + 1]
        return self.hooked, self.w[i]

    def merge(self) -> tuple[nn.Module, Tensor]:
        i = self._next()
        self.live_merged.identities = self.c[i : i + 1]
        return self.merged, self.w[i]

    def _load(self, model: Any, name: str, i: int, **options: Any) -> None:
        model.load_lora_adapter(
            self.states[i], prefix=None, adapter_name=name, low_cpu_mem_usage=False, **options
        )

    def load(self) -> tuple[nn.Module, Tensor]:
        i = self._next()
        self._load(self.loaded, f"person{self.turn}", i)
        return self.loaded, self.w[i]

    def choose(self) -> tuple[nn.Module, Tensor]:
        names = list(self.loaded.peft_config)
        name = names[self._next() % len(names)]
        self.loaded.set_adapter(name)
        return self.loaded, self.w[int(name.removeprefix("person")) % _PEOPLE]

    def hotswap(self) -> tuple[nn.Module, Tensor]:
        i = self._next()
        self._load(self.hot, "hot", i, hotswap=True)
        return self.hot, self.w[i]

    def fuse(self) -> tuple[nn.Module, Tensor]:
        i = self._next() % 2
        self.fused.unfuse_lora()
        self.fused.fuse_lora(adapter_names=[f"person{i}"])
        return self.fused, self.w[i]

    def drift(self) -> dict[str, float]:
        """How far each merged twin's weights are from the base's once the adapter is taken out."""
        self.fused.unfuse_lora()
        self.live_merged.detach()
        name = self.space.layout.names[0]
        weight = self.base.get_submodule(name).weight
        theirs = self.fused.get_submodule(name).base_layer.weight
        drifts = {
            "drift of diffusers' fused weights": float((theirs - weight).abs().max()),
            "drift of ours": float((self.merged.get_submodule(name).weight - weight).abs().max()),
        }
        self.live_merged = w2w.attach(self.merged, self.space, merged=True)
        self.fused.fuse_lora(adapter_names=["person0"])
        return drifts


def _state_dict(lay: Layout, w: Tensor) -> dict[str, Tensor]:
    """The adapter as diffusers takes it: alpha is the rank, the scale in B."""
    state = {}
    for name, (A, B) in lay.split(w).items():
        state[f"{name}.lora_A.weight"] = A.contiguous()
        state[f"{name}.lora_B.weight"] = (B * lay.scale).contiguous()
    return state
