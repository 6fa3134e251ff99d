"""What every LoRA file is read into, and the checks that all formats share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError
from ..layout import _STAGES

TEXT_ENCODER = ""
"""What a format's `parse` returns as the module of a text encoder's key."""

Parse = Callable[[str], "tuple[str, str] | None"]
"""key -> (module, "A" | "B" | "alpha"); None for a key that the format does not know."""

Scale = Callable[[str, int, "float | None"], float]
"""(module, rank, alpha of that module) -> the factor in front of B A."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA, read: for each module (A [r, in], B [out, r]) in float32.

    The scale (alpha / rank) is already folded into B, so the weight change is B A. Names are those
    of the diffusers model ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"). Ranks may
    differ between modules. `text_encoder_keys` counts tensors that were seen and not read.
    """

    modules: dict[str, tuple[Tensor, Tensor]]
    format: str
    metadata: dict[str, str]
    text_encoder_keys: int = 0

    @property
    def ranks(self) -> tuple[int, ...]:
        """The distinct ranks, ascending."""
        return tuple(sorted({a.shape[0] for a, _ in self.modules.values()}))


def of_unet(modules: Iterable[str]) -> bool:
    """Whether modules are a UNet's (its attentions stand in down, mid and up blocks) or a DiT's."""
    return any(name.split(".", 1)[0] in _STAGES for name in modules)


def alpha_over_rank(module: str, rank: int, alpha: float | None) -> float:
    """alpha / rank; a file without alpha means alpha = rank to every loader."""
    return 1.0 if alpha is None else alpha / rank


def collect(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    format: str,
    wanted: str,
    parse: Parse,
    scale: Scale = alpha_over_rank,
) -> Adapter:
    """Pair the tensors of a file by module, check each pair and fold the scale into B.

    `wanted` shows the format's key in messages. Raises InputError naming the key: a key the format
    does not know, half of a pair missing, two keys for one half, unequal ranks, not 2-D.
    """
    keys: dict[str, dict[str, str]] = {}
    text = 0
    for key in sorted(tensors):
        known = parse(key)
        if known is None:
            raise InputError(f"{path}: unknown key {key[:200]!r} in a {format} file; {wanted}")
        module, part = known
        if module == TEXT_ENCODER:
            text += 1
        elif (other := keys.setdefault(module, {}).setdefault(part, key)) != key:
            raise InputError(f"{path}: keys {other!r} and {key!r} are the same {part} of {module}")
    if not keys:
        raise InputError(
            f"{path}: no LoRA of a UNet or transformer in it ({text} text encoder keys); {wanted}"
        )

    modules = {}
    for module, parts in keys.items():
        for half, other in (("A", "B"), ("B", "A")):
            if half not in parts:
                have = parts.get(other) or parts["alpha"]
                raise InputError(f"{path}: {have!r} has no {half}; each module needs A and B")
        a, b = (_matrix(path, parts[half], tensors[parts[half]]) for half in "AB")
        rank = a.shape[0]
        if rank < 1 or b.shape[1] != rank:
            raise InputError(
                f"{path}: unequal ranks: {parts['A']!r} is {list(a.shape)}, {parts['B']!r} is "
                f"{list(b.shape)}; wanted [rank, in] and [out, rank]"
            )
        alpha = _alpha(path, parts["alpha"], tensors) if "alpha" in parts else None
        b = b * scale(module, rank, alpha)
        if not torch.isfinite(b).all():
            raise InputError(f"{path}: {parts['B']!r} times its scale overflows float32")
        modules[module] = (a, b)
    return Adapter(modules, format, dict(metadata), text)


def _matrix(path: Path, key: str, tensor: Tensor) -> Tensor:
    if tensor.ndim != 2 or not tensor.is_floating_point():
        raise InputError(
            f"{path}: {key!r} is {tensor.dtype} {list(tensor.shape)}; wanted a 2-D floating point "
            "matrix (adapters of Linear modules; convolutions are not supported)"
        )
    return tensor.float()


def _alpha(path: Path, key: str, tensors: Mapping[str, Tensor]) -> float:
    tensor = tensors[key]
    alpha = float(tensor) if tensor.numel() == 1 else math.nan
    if not (math.isfinite(alpha) and alpha > 0):
        got = tensor.item() if tensor.numel() == 1 else list(tensor.shape)
        raise InputError(f"{path}: {key!r} is {got}; wanted one positive number")
    return alpha
