"""diffusers: three spellings of one layout; the first is the one written.

    unet.<module>.lora_A.weight, .lora_B.weight            scale from metadata, else 1
    unet.<module>.lora.down.weight, .lora.up.weight        scale 1
    [unet.]<attention>.processor.to_q_lora.down.weight     scale 1; to_out_lora is to_out.0

The metadata's `lora_adapter_metadata` is JSON: the fields of a PEFT LoraConfig, each with "unet."
in front. A DiT's file has "transformer." for "unet." in both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..errors import InputError
from . import peft
from .adapter import TEXT_ENCODER, Adapter, alpha_over_rank, collect, of_unet

WANTED = "wanted 'unet.<module>.lora_A.weight' and '.lora_B.weight' (or '.lora.down.weight', '.up')"

_METADATA = "lora_adapter_metadata"
_KEY = re.compile(
    r"(?:unet\.|transformer\.)?(?P<module>[\w.]+?)(?:\.lora_(?P<new>[AB])|\.lora\.(?P<old>down|up)"
    r"|\.processor\.(?P<to>to_q|to_k|to_v|to_out)_lora\.(?P<legacy>down|up))\.weight"
)
_MODEL = re.compile(r"(?:unet|transformer)\.")
_HALF = {"A": "A", "B": "B", "down": "A", "up": "B"}


def read(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Adapter:
    """An Adapter from the file's tensors; see `collect` for what is refused."""
    config = _config(path, metadata)
    scale = peft.scaling(f"{path}: {_METADATA}", config) if config else alpha_over_rank
    return collect(
        path, tensors, metadata, format="diffusers", wanted=WANTED, parse=_parse, scale=scale
    )


def encode(
    modules: Mapping[str, tuple[Tensor, Tensor]], rank: int, base: str | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file whose scale is 1 (lora_alpha = r)."""
    model = "unet" if of_unet(modules) else "transformer"
    tensors = {}
    for module, (a, b) in modules.items():
        tensors[f"{model}.{module}.lora_A.weight"] = a
        tensors[f"{model}.{module}.lora_B.weight"] = b
    config = peft.config(modules, rank, base)
    fields = {f"{model}.{key}": value for key, value in config.items()}
    return tensors, {_METADATA: json.dumps(fields, sort_keys=True)}


def _config(path: Path, metadata: Mapping[str, str]) -> dict[str, object]:
    try:
        fields = json.loads(metadata.get(_METADATA, "{}"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: metadata {_METADATA!r} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise InputError(f"{path}: metadata {_METADATA!r} is not a JSON object")
    return {_MODEL.sub("", key, 1): v for key, v in fields.items() if _MODEL.match(key)}


def _parse(key: str) -> tuple[str, str] | None:
    if key.startswith(("text_encoder.", "text_encoder_2.")):
        return TEXT_ENCODER, "A"
    match = _KEY.fullmatch(key)
    if not match:
        return None
    half = _HALF[match["new"] or match["old"] or match["legacy"]]
    if not match["to"]:
        return match["module"], half
    to = "to_out.0" if match["to"] == "to_out" else match["to"]
    return f"{match['module']}.{to}", half
