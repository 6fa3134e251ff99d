"""cloneofsimo/lora: the oldest LoRA files still in circulation. Read only, SD1.5 only.

    unet:<i>:down            A [rank, in]
    unet:<i>:up              B [out, rank]
    metadata "unet"          JSON list of the classes whose Linears were trained
    metadata "unet:<i>:rank" rank

The scale is 1. Index i counts the Linears inside modules of those classes, in the order in which
the UNet of that time (diffusers 0.10) registered them: down blocks, up blocks, then the mid block;
in each transformer block attn1, ff, attn2. The shapes of a file fit no other order of blocks, and
are checked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from ..errors import InputError
from .adapter import TEXT_ENCODER, Adapter, collect

WANTED = "wanted 'unet:<i>:down' and 'unet:<i>:up'"

_KEY = re.compile(r"(?P<model>unet|text_encoder):(?P<index>\d{1,4}):(?P<part>up|down)")
_ATTENTION = {"CrossAttention", "Attention"}
_TEXT_FEATURES = 768


def matches(keys: Mapping[str, object]) -> bool:
    return any(_KEY.fullmatch(key) for key in keys)


def read(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Adapter:
    """An Adapter with the modules' names; InputError when count or shapes are not SD1.5's."""
    classes = _classes(path, metadata)
    order = list(sd15_modules(geglu="GEGLU" in classes))
    count = len({key for key in tensors if key.startswith("unet:") and key.endswith(":up")})
    if count != len(order):
        raise InputError(
            f"{path}: {count} adapted modules of {sorted(classes)}; an SD1.5 UNet has {len(order)}"
        )

    def parse(key: str) -> tuple[str, str] | None:
        match = _KEY.fullmatch(key)
        if not match:
            return None
        if match["model"] == "text_encoder":
            return TEXT_ENCODER, "A"
        index = int(match["index"])
        half = "A" if match["part"] == "down" else "B"
        return (order[index][0], half) if index < len(order) else None

    adapter = collect(path, tensors, metadata, format="cloneofsimo", wanted=WANTED, parse=parse)
    for index, (name, in_features, out_features) in enumerate(order):
        a, b = adapter.modules[name]
        if (a.shape[1], b.shape[0]) != (in_features, out_features):
            raise InputError(
                f"{path}: unet:{index} maps {a.shape[1]} -> {b.shape[0]}; {name} of SD1.5 maps "
                f"{in_features} -> {out_features}"
            )
        if (said := metadata.get(f"unet:{index}:rank", str(a.shape[0]))) != str(a.shape[0]):
            raise InputError(
                f"{path}: unet:{index} has rank {a.shape[0]}, metadata says {said[:20]!r}"
            )
    return adapter


def sd15_modules(*, geglu: bool = True) -> Iterator[tuple[str, int, int]]:
    """(name, in, out) of index 0, 1, ...: the Linears of attention and GEGLU in an SD1.5 UNet."""
    blocks = [(f"down_blocks.{i}.attentions.{j}", 320 << i) for i in range(3) for j in range(2)]
    blocks += [
        (f"up_blocks.{i}.attentions.{j}", 1280 >> i - 1) for i in (1, 2, 3) for j in range(3)
    ]
    blocks += [("mid_block.attentions.0", 1280)]
    for block, width in blocks:
        prefix = f"{block}.transformer_blocks.0"
        for attention, read_from in (("attn1", width), ("attn2", _TEXT_FEATURES)):
            if attention == "attn2" and geglu:
                yield f"{prefix}.ff.net.0.proj", width, 8 * width
            yield f"{prefix}.{attention}.to_q", width, width
            yield f"{prefix}.{attention}.to_k", read_from, width
            yield f"{prefix}.{attention}.to_v", read_from, width
            yield f"{prefix}.{attention}.to_out.0", width, width


def _classes(path: Path, metadata: Mapping[str, str]) -> set[str]:
    try:
        classes = set(json.loads(metadata.get("unet", "")))
    except (ValueError, TypeError, RecursionError):
        classes = set()
    if not classes & _ATTENTION or not classes <= _ATTENTION | {"GEGLU"}:
        raise InputError(
            f"{path}: metadata 'unet' is {metadata.get('unet', 'missing')[:100]!r}; wanted a JSON "
            f"list of {sorted(_ATTENTION)} and 'GEGLU'"
        )
    return classes
