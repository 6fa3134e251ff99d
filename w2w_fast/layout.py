"""Which modules an adapter touches, in which order, and which slice of w each A and B is.

The order is a fact of a weight space and is stored with it (DESIGN: never taken from
``named_modules()`` when a file is read). One flattened adapter is, module by module,
A ``[rank, in]`` row-major and then B ``[out, rank]`` row-major; its effect on a module is
``(alpha / rank) * (x A^T) B^T`` (Hu et al., LoRA, 2021).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError

# diffusers registers a UNet's mid block after its up blocks; published spaces run down, mid, up.
_STAGES = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
_MAX_FEATURES = 1 << 24
_MAX_MODULES = 20_000


@dataclass(frozen=True)
class Module:
    """One adapted Linear: its dotted name in the model and its two widths."""

    name: str
    in_features: int
    out_features: int


@dataclass(frozen=True)
class Layout:
    """The modules of an adapter in order, its rank and alpha. Immutable; compares by value."""

    modules: tuple[Module, ...]
    rank: int = 1
    alpha: float = 27.0

    def __post_init__(self) -> None:
        wanted = {
            "at least one module": 0 < len(self.modules) <= _MAX_MODULES,
            "rank a positive integer": type(self.rank) is int and self.rank > 0,
            "alpha a positive finite number": _is_number(self.alpha) and self.alpha > 0,
        }
        for what, holds in wanted.items():
            if not holds:
                raise InputError(
                    f"layout: wanted {what}; got {len(self.modules)} modules, "
                    f"rank {self.rank!r}, alpha {self.alpha!r}"
                )
        seen: set[str] = set()
        for module in self.modules:
            widths = (module.in_features, module.out_features)
            if not isinstance(module.name, str) or not module.name or module.name in seen:
                raise InputError(f"layout: wanted distinct module names, got {module.name!r}")
            if not all(type(width) is int and 0 < width <= _MAX_FEATURES for width in widths):
                raise InputError(f"layout: {module.name}: wanted positive widths, got {widths}")
            seen.add(module.name)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(module.name for module in self.modules)

    @property
    def scale(self) -> float:
        """alpha / rank, the factor before B A."""
        return self.alpha / self.rank

    @cached_property
    def size(self) -> int:
        """d, the numbers in one flattened adapter."""
        return sum(self._sizes)

    @cached_property
    def _sizes(self) -> list[int]:
        return [
            self.rank * width
            for module in self.modules
            for width in (module.in_features, module.out_features)
        ]

    def slices(self) -> tuple[tuple[slice, slice], ...]:
        """(slice of A, slice of B) of w, one pair a module."""
        ends = [0]
        for size in self._sizes:
            ends.append(ends[-1] + size)
        parts = [slice(start, end) for start, end in zip(ends, ends[1:], strict=False)]
        return tuple(zip(parts[::2], parts[1::2], strict=True))

    def split(self, w: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """w ``[..., d]`` -> name -> (A ``[..., rank, in]``, B ``[..., out, rank]``), views of w.

        One ``torch.split``, so that the backward is one concatenation, not 2 x 64 additions.
        """
        if w.shape[-1:] != (self.size,):
            raise InputError(f"w: wanted [..., {self.size}], got {list(w.shape)}")
        parts = iter(w.split(self._sizes, dim=-1))
        return {
            module.name: (
                next(parts).unflatten(-1, (self.rank, module.in_features)),
                next(parts).unflatten(-1, (module.out_features, self.rank)),
            )
            for module in self.modules
        }

    def flatten(self, adapters: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
        """The inverse of ``split``: name -> (A, B) -> w ``[..., d]``, in this layout's order."""
        missing = [name for name in self.names if name not in adapters]
        extra = [name for name in adapters if name not in set(self.names)]
        if missing or extra:
            raise InputError(
                f"adapters: {len(self.modules) - len(missing)} of {len(self.modules)} modules "
                f"match; missing: {_some(missing)}; not in the layout: {_some(extra)}"
            )
        parts: list[Tensor] = []
        for module in self.modules:
            shapes = ((self.rank, module.in_features), (module.out_features, self.rank))
            for letter, tensor, shape in zip("AB", adapters[module.name], shapes, strict=True):
                if tuple(tensor.shape[-2:]) != shape:
                    raise InputError(
                        f"{module.name}: {letter}: wanted [..., {shape[0]}, {shape[1]}], "
                        f"got {list(tensor.shape)}"
                    )
                parts.append(tensor.flatten(-2))
        return torch.cat(parts, dim=-1)

    @classmethod
    def sd15(cls) -> Layout:
        """The published SD1.5 space's layout: 64 modules, d = 99,648, rank 1, alpha 27.

        to_q and to_v of attn1 and attn2 in every transformer block (Dravid et al., 2024,
        and their released ``weight_dimensions.pt``); attn2's to_v reads 768 text features.
        """
        blocks = [
            (f"{block}.attentions.{i}", width)
            for block, width, count in (
                ("down_blocks.0", 320, 2),
                ("down_blocks.1", 640, 2),
                ("down_blocks.2", 1280, 2),
                ("mid_block", 1280, 1),
                ("up_blocks.1", 1280, 3),
                ("up_blocks.2", 640, 3),
                ("up_blocks.3", 320, 3),
            )
            for i in range(count)
        ]
        return cls(
            tuple(
                Module(
                    f"{block}.transformer_blocks.0.{attention}.{target}",
                    768 if (attention, target) == ("attn2", "to_v") else width,
                    width,
                )
                for block, width in blocks
                for attention in ("attn1", "attn2")
                for target in ("to_q", "to_v")
            )
        )

    @classmethod
    def discover(
        cls,
        model: nn.Module,
        targets: Sequence[str] = ("to_q", "to_v"),
        rank: int = 1,
        alpha: float = 27.0,
    ) -> Layout:
        """The layout of every Linear of ``model`` whose name ends in one of ``targets``.

        ``"to_q"`` matches every attention, ``"attn2.to_q"`` cross-attention only. Parents come in
        ``named_modules()`` order, a UNet's as down, mid, up; targets of one parent as given.
        """
        if isinstance(targets, str) or not all(isinstance(t, str) and t for t in targets):
            raise InputError(f"targets: wanted names such as ('to_q', 'to_v'), got {targets!r}")
        parents: dict[str, int] = {}
        found: list[tuple[tuple[int, int, int], Module]] = []
        for name, module in model.named_modules():
            for position, target in enumerate(targets):
                if f".{name}".endswith(f".{target}") and _is_linear(module):
                    parent = name[: -len(target)]
                    order = parents.setdefault(parent, len(parents))
                    stage = _STAGES.get(name.split(".", 1)[0], 0)
                    entry = Module(name, int(module.in_features), int(module.out_features))
                    found.append(((stage, order, position), entry))
                    break
        if not found:
            raise InputError(
                f"targets: no Linear of {type(model).__name__} is named {' or '.join(targets)}; "
                "name the last part(s) of its attention projections"
            )
        found.sort(key=lambda pair: pair[0])
        return cls(tuple(module for _, module in found), rank, float(alpha))

    def check(self, model: nn.Module) -> dict[str, nn.Module]:
        """name -> the model's module, every one present with the right widths, or InputError."""
        present = dict(model.named_modules())
        missing = [name for name in self.names if not _is_linear(present.get(name))]
        wrong = [
            f"{m.name}: wanted {m.in_features}->{m.out_features}, got {got[0]}->{got[1]}"
            for m in self.modules
            if m.name not in missing
            and (got := _widths(present[m.name])) != (m.in_features, m.out_features)
        ]
        if missing or wrong:
            matched = len(self.modules) - len(missing) - len(wrong)
            raise InputError(
                f"model: {matched} of {len(self.modules)} modules of the layout match "
                f"{type(model).__name__}; missing: {_some(missing)}; wrong shape: {_some(wrong)}"
            )
        return {name: present[name] for name in self.names}

    def to_json(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "alpha": self.alpha,
            "modules": [[m.name, m.in_features, m.out_features] for m in self.modules],
        }

    @classmethod
    def from_json(cls, obj: Any) -> Layout:
        """The inverse of ``to_json``; anything else is an InputError."""
        if not isinstance(obj, dict) or set(obj) != {"rank", "alpha", "modules"}:
            raise InputError("layout: wanted an object with rank, alpha and modules")
        rows = obj["modules"]
        if not isinstance(rows, list) or not all(isinstance(r, list) and len(r) == 3 for r in rows):
            raise InputError("layout: modules: wanted a list of [name, in_features, out_features]")
        if not _is_number(obj["alpha"]):
            raise InputError(f"layout: alpha: wanted a finite number, got {obj['alpha']!r}")
        return cls(tuple(Module(*row) for row in rows), obj["rank"], float(obj["alpha"]))


def _widths(module: Any) -> tuple[int, int]:
    return int(module.in_features), int(module.out_features)


def _is_linear(module: Any) -> bool:
    """Linear-like: quantised and wrapped Linears count, a convolution does not."""
    weight = getattr(module, "weight", None)
    return (
        hasattr(module, "in_features")
        and hasattr(module, "out_features")
        and (not isinstance(weight, Tensor) or weight.ndim == 2)
    )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _some(names: Sequence[str], limit: int = 3) -> str:
    shown = ", ".join(names[:limit]) or "none"
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")
