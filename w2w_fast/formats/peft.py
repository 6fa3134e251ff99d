"""PEFT: a directory with adapter_model.safetensors and adapter_config.json.

    base_model.model.<module>.lora_A[.<adapter name>].weight   A [rank, in]
    base_model.model.<module>.lora_B[.<adapter name>].weight   B [out, rank]

The scale is lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora (Kalajdzievski 2023,
arXiv 2312.03732), per module where rank_pattern and alpha_pattern say so. PEFT reads the scale from
the config; diffusers' `load_lora_adapter` ignores the config and takes 1: what is written here has
lora_alpha = r, so both agree.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import InputError
from .adapter import Adapter, Scale, collect

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model"
WANTED = f"wanted '{PREFIX}.<module>.lora_A.weight' and '.lora_B.weight'"

_KEY = re.compile(r"base_model\.model\.(?P<module>[\w.]+?)\.lora_(?P<half>[AB])(?:\.\w+)?\.weight")

# Options that change what the adapter computes, and the values under which it is a plain LoRA.
_PLAIN: dict[str, tuple[object, ...]] = {
    "peft_type": (None, "LORA"),
    "use_dora": (None, False),
    "bias": (None, "none"),
    "lora_bias": (None, False),
    "fan_in_fan_out": (None, False),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (None, False),
}


def matches(keys: Mapping[str, object]) -> bool:
    return any(key.startswith(f"{PREFIX}.") for key in keys)


def read(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], config: Any
) -> Adapter:
    """An Adapter from the tensors and the parsed adapter_config.json beside them.

    Besides what `collect` refuses: a config that is not a plain LoRA's, one that disagrees with
    the tensors about ranks or modules.
    """
    where = f"{path.parent / CONFIG}"
    if not isinstance(config, dict):
        raise InputError(f"{where}: wanted a JSON object, got {type(config).__name__}")
    adapter = collect(
        path,
        tensors,
        metadata,
        format="peft",
        wanted=WANTED,
        parse=_parse,
        scale=scaling(where, config),
    )
    _check_targets(where, config.get("target_modules"), adapter.modules)
    return adapter


def encode(
    modules: Mapping[str, tuple[Tensor, Tensor]], rank: int, base: str | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of the directory's weights file."""
    tensors = {}
    for module, (a, b) in modules.items():
        tensors[f"{PREFIX}.{module}.lora_A.weight"] = a
        tensors[f"{PREFIX}.{module}.lora_B.weight"] = b
    return tensors, {"format": "pt"}


def config(modules: Iterable[str], rank: int, base: str | None) -> dict[str, object]:
    """The fields of a LoraConfig with scale 1: lora_alpha = r."""
    return {
        "base_model_name_or_path": base,
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted(modules),
        "use_rslora": False,
    }


def scaling(where: str, config: Mapping[str, Any]) -> Scale:
    """The scale of each module as a LoraConfig's fields define it; InputError for a bad config."""
    for option, plain in _PLAIN.items():
        if config.get(option) not in plain:
            raise InputError(
                f"{where}: {option} = {reprlib.repr(config[option])} is not a plain LoRA; "
                f"wanted {plain[-1]!r} (merge it with PEFT first)"
            )
    r, lora_alpha = (_number(where, name, config.get(name)) for name in ("r", "lora_alpha"))
    rslora = config.get("use_rslora") or False
    if not isinstance(rslora, bool):
        raise InputError(f"{where}: use_rslora = {reprlib.repr(rslora)}; wanted true or false")
    ranks = _pattern(where, "rank_pattern", config.get("rank_pattern"))
    alphas = _pattern(where, "alpha_pattern", config.get("alpha_pattern"))

    def scale(module: str, rank: int, alpha: float | None) -> float:
        said = _lookup(ranks, module, r)
        if said != rank:
            raise InputError(f"{where}: says rank {said:g} for {module}, the tensors have {rank}")
        return _lookup(alphas, module, lora_alpha) / (math.sqrt(rank) if rslora else rank)

    return scale


def _number(where: str, name: str, value: object) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value < 1e9:  # type: ignore[operator]
        raise InputError(f"{where}: {name} = {reprlib.repr(value)}; wanted a positive number")
    return float(value)  # type: ignore[arg-type]


def _pattern(where: str, name: str, value: object) -> dict[str, float]:
    """PEFT's keys are regular expressions; from a file only plain names are taken."""
    if value is not None and not isinstance(value, dict):
        raise InputError(f"{where}: {name} is not a JSON object")
    for key in value or {}:
        if not re.fullmatch(r"\^?[\w.]+", key):
            raise InputError(
                f"{where}: {name} has the regular expression {key[:200]!r}; wanted a module's name"
            )
    return {key: _number(where, f"{name}[{key!r}]", v) for key, v in (value or {}).items()}


def _lookup(pattern: Mapping[str, float], module: str, default: float) -> float:
    """First key that is the module's name or its last components ("^" in front: the whole name)."""
    for key, value in pattern.items():
        if module == key.removeprefix("^") or module.endswith(f".{key}"):
            return value
    return default


def _check_targets(where: str, targets: object, modules: Iterable[str]) -> None:
    """A list of targets must name each module (as PEFT does: the whole name or its end)."""
    if targets is None or isinstance(targets, str):
        return
    if not (isinstance(targets, list) and all(isinstance(name, str) for name in targets)):
        raise InputError(
            f"{where}: target_modules = {reprlib.repr(targets)}; wanted a list of names"
        )
    ends = set(targets)
    for module in modules:
        parts = module.split(".")
        if not any(".".join(parts[i:]) in ends for i in range(len(parts))):
            raise InputError(f"{where}: target_modules does not name {module}, the tensors do")


def _parse(key: str) -> tuple[str, str] | None:
    match = _KEY.fullmatch(key)
    return (match["module"], match["half"]) if match else None
