"""kohya: the layout of sd-scripts, A1111/Forge and ComfyUI; diffusers reads it too.

lora_unet_<module, dots to _>.lora_down.weight   A [rank, in]
lora_unet_<module, dots to _>.lora_up.weight     B [out, rank]
lora_unet_<module, dots to _>.alpha              scalar; absent: alpha = rank
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError
from .adapter import TEXT_ENCODER, Adapter, collect, of_unet

WANTED = "wanted 'lora_unet_<module, dots to _>.lora_down.weight', '.lora_up.weight' or '.alpha'"

_KEY = re.compile(r"lora_unet_(?P<flat>\w+)\.(?P<part>lora_down\.weight|lora_up\.weight|alpha)")
_PARTS = {"lora_down.weight": "A", "lora_up.weight": "B", "alpha": "alpha"}

# The words of a diffusers UNet's module names that contain an underscore themselves.
_TOKEN = re.compile(
    r"(?:(?:down|up|transformer)_blocks|mid_block|to_(?:q|k|v|out)|proj_(?:in|out)|time_emb_proj"
    r"|(?:time|add)_embedding|linear_[12]|conv_(?:in|out|shortcut)|[^_]+)(?=_|$)"
)


def flat_name(module: str) -> str:
    """Module name with dots as underscores; InputError where that could not be read back."""
    flat = module.replace(".", "_")
    if module_name(flat) != module:
        raise InputError(
            f"module {module!r} cannot be told from its kohya name {flat!r}; "
            "export it as format='diffusers'"
        )
    return flat


def module_name(flat: str) -> str:
    """The diffusers module name of a kohya name: "mid_block_attentions_0" -> "mid_block..."."""
    return ".".join(_TOKEN.findall(flat))


def matches(keys: Mapping[str, object]) -> bool:
    return any(key.startswith(("lora_unet_", "lora_te")) for key in keys)


def read(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Adapter:
    """An Adapter from the file's tensors; see `collect` for what is refused."""
    return collect(path, tensors, metadata, format="kohya", wanted=WANTED, parse=_parse)


def encode(
    modules: Mapping[str, tuple[Tensor, Tensor]], rank: int, base: str | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file whose scale is 1 (alpha = rank).

    The strength lies in B: loaders disagree about files without alpha only when told another one.
    """
    if not of_unet(modules):
        raise InputError(
            f"format: kohya's names are a UNet's, and {next(iter(modules))!r} is a transformer's; "
            "export it as format='diffusers'"
        )
    tensors = {}
    for module, (a, b) in modules.items():
        name = f"lora_unet_{flat_name(module)}"
        tensors[f"{name}.lora_down.weight"] = a
        tensors[f"{name}.lora_up.weight"] = b
        tensors[f"{name}.alpha"] = torch.tensor(float(rank), dtype=a.dtype)
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(rank)),
    }
    if base:
        metadata["ss_sd_model_name"] = str(base)
    return tensors, metadata


def _parse(key: str) -> tuple[str, str] | None:
    if key.startswith(("lora_te_", "lora_te1_", "lora_te2_")):
        return TEXT_ENCODER, "A"
    match = _KEY.fullmatch(key)
    return (module_name(match["flat"]), _PARTS[match["part"]]) if match else None
