"""LoRA files of other tools, read and written, and the published weights2weights files.

adapter = read_adapter("someone.safetensors")          # kohya, diffusers, PEFT, cloneofsimo
export(space, c, "me.safetensors")                     # kohya, diffusers or PEFT
verify("me.safetensors", pipe, w, space.layout)        # diffusers' own loader agrees
space = import_published("files/", "celeba", allow_pickle=True)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import files
from ..attach import attach
from ..canonical import align, canonical
from ..errors import InputError
from ..layout import Layout, Module, _some
from ..space import WeightSpace
from . import cloneofsimo, diffusers, kohya, peft
from .adapter import Adapter
from .published import import_published

__all__ = [
    "Adapter",
    "Verification",
    "export",
    "import_published",
    "for_space",
    "layout_of",
    "read_adapter",
    "to_layout",
    "verify",
]

_ENCODE = {"kohya": kohya.encode, "diffusers": diffusers.encode, "peft": peft.encode}


def read_adapter(path: str | Path) -> Adapter:
    """Read a LoRA file (.safetensors) or a PEFT directory; the format is told by its keys.

    Raises InputError naming the key: unknown keys, half of a pair missing, unequal ranks in a pair,
    NaN or infinite values, anything that is not safetensors.
    """
    path = Path(path)
    if path.is_dir():
        path = path / peft.WEIGHTS
        if not path.is_file():
            raise InputError(f"{path.parent}: a PEFT directory has {peft.WEIGHTS}; not found")
    tensors, metadata = files.read_tensors(path)
    if kohya.matches(tensors):
        return kohya.read(path, tensors, metadata)
    if cloneofsimo.matches(tensors):
        return cloneofsimo.read(path, tensors, metadata)
    if peft.matches(tensors):
        return peft.read(path, tensors, metadata, files.read_json(path.parent / peft.CONFIG))
    return diffusers.read(path, tensors, metadata)


def to_layout(adapter: Adapter, layout: Layout) -> Tensor:
    """Flatten an adapter: w [d] float32 in the layout's order, B divided by the layout's scale.

    The adapter must have exactly the layout's modules, widths and rank; InputError with counts.
    """
    wanted = {m.name: (m.in_features, m.out_features) for m in layout.modules}
    missing = [name for name in wanted if name not in adapter.modules]
    extra = [name for name in adapter.modules if name not in wanted]
    wrong = []
    for name in wanted.keys() & adapter.modules.keys():
        a, b = adapter.modules[name]
        if (got := (a.shape[1], b.shape[0])) != wanted[name] or a.shape[0] != layout.rank:
            wrong.append(
                f"{name}: wanted {wanted[name][0]}->{wanted[name][1]} of rank {layout.rank}, "
                f"got {got[0]}->{got[1]} of rank {a.shape[0]}"
            )
    if missing or extra or wrong:
        fit = len(wanted) - len(missing) - len(wrong)
        parts = [f"{len(missing)} missing: {_some(missing)}"] if missing else []
        parts += [f"{len(extra)} not in the layout: {_some(extra)}"] if extra else []
        parts += [f"{len(wrong)} of another shape: {_some(sorted(wrong))}"] if wrong else []
        raise InputError(f"adapter: {fit}/{len(wanted)} modules fit; {'; '.join(parts)}")
    return layout.flatten({name: (a, b / layout.scale) for name, (a, b) in adapter.modules.items()})


def for_space(adapter: Adapter, space: WeightSpace) -> Tensor:
    """An adapter in the form that a space's people have, w [1, d] float32.

    In a space of collected adapters the canonical one, whatever the adapter's rank; in any other
    its factors as they are, which must have exactly the layout's shapes. InputError with counts.
    """
    layout, made_by = space.layout, space.meta.get("fit", {})
    if not isinstance(made_by, dict) or made_by.get("made_by") != "collect":
        return to_layout(adapter, layout)[None]
    missing = [name for name in layout.names if name not in adapter.modules]
    if missing:
        raise InputError(
            f"adapter: {len(layout.names) - len(missing)} of {len(layout.names)} modules fit; "
            f"missing: {_some(missing)}"
        )
    w = canonical(adapter.modules, layout).w[None]
    align(w, layout, space.mean.cpu())
    return w


def layout_of(adapter: Adapter) -> Layout:
    """The layout of a LoRA with one rank for all modules: scale 1, modules in the adapter's order.

    `attach(model, layout_of(a), adapters=to_layout(a, layout_of(a))[None])` puts any LoRA on a
    model. InputError when ranks differ.
    """
    if len(adapter.ranks) != 1:
        raise InputError(f"adapter: ranks {list(adapter.ranks)}; a layout has one rank")
    modules = tuple(
        Module(name, a.shape[1], b.shape[0]) for name, (a, b) in adapter.modules.items()
    )
    (rank,) = adapter.ranks
    return Layout(modules, rank=rank, alpha=float(rank))


def export(
    space_or_layout: WeightSpace | Layout,
    c_or_w: Tensor,
    path: str | Path,
    *,
    format: str = "kohya",
    strength: float = 1.0,
    dtype: torch.dtype = torch.float32,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Write one identity as a LoRA that other tools load; returns the path.

    space_or_layout: a WeightSpace with c [m] or [1, m], or a Layout with w [d] or [1, d].
    format: "kohya" (one file; diffusers, A1111/Forge, ComfyUI), "diffusers" (one file; a DiT's too)
        or "peft" (a directory).
    The file says alpha = rank; the layout's scale and the strength are in B, so every tool that
    takes alpha / rank, and every tool that ignores it, computes the same. Written atomically; a
    file is replaced, a PEFT directory must be new or empty.
    InputError: more than one identity, wrong length, values that `dtype` cannot hold.
    """
    if format not in _ENCODE:
        raise InputError(f"format = {format!r}; wanted one of {sorted(_ENCODE)}")
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise InputError(f"dtype = {dtype}; wanted float32, float16 or bfloat16")
    if any(not isinstance(item, str) for pair in (metadata or {}).items() for item in pair):
        raise InputError("metadata: keys and values must be strings")
    path = Path(path)
    if format != "peft" and path.suffix != ".safetensors":  # other tools go by the suffix
        raise InputError(f"path = {path}; wanted a name that ends in .safetensors")
    layout, w, base = _flat(space_or_layout, c_or_w)
    modules = {
        name: (_cast(name, a, dtype), _cast(name, b * (layout.scale * strength), dtype))
        for name, (a, b) in layout.split(w).items()
    }
    tensors, header = _ENCODE[format](modules, layout.rank, base)
    header = {**(metadata or {}), **header}
    if format == "peft":
        with files.atomic_dir(path) as folder:
            files.write_tensors(folder / peft.WEIGHTS, tensors, header)
            files.write_json(folder / peft.CONFIG, peft.config(modules, layout.rank, base))
    else:
        files.write_tensors(path, tensors, header)
    return path


@dataclass(frozen=True)
class Verification:
    """How far the UNet's output with the file, loaded by diffusers, is from the output meant.

    max_error: largest absolute difference; scale: largest absolute output; relative: their ratio.
    modules: how many modules diffusers adapted.
    """

    max_error: float
    scale: float
    modules: int

    @property
    def relative(self) -> float:
        return self.max_error / self.scale if self.scale else self.max_error

    def __float__(self) -> float:
        return self.max_error


@torch.no_grad()
def verify(
    path: str | Path, pipe: Any, expected_w: Tensor, layout: Layout, *, strength: float = 1.0
) -> Verification:
    """Load an exported LoRA with diffusers' own loader and compare with `attach`.

    expected_w [d] or [1, d]: the adapter that was exported, at `strength`. The UNet runs on two
    fixed random latents, once with expected_w attached and once with the file loaded into
    `pipe`; the file is unloaded again. InputError when the pipe already has a LoRA loaded, or when
    diffusers loads another number of modules than the layout has.
    """
    path, unet = Path(path), getattr(pipe, "unet", None)
    if unet is None or getattr(unet.config, "addition_embed_type", None):
        raise InputError("pipe: wanted a pipeline with the UNet of Stable Diffusion 1 or 2")
    read_adapter(path)  # diffusers would look for a missing file on the network
    if getattr(unet, "peft_config", None):
        raise InputError(
            f"pipe: it has LoRAs loaded ({_some(list(unet.peft_config))}); call "
            "pipe.unload_lora_weights() first"
        )
    inputs = _fixed_inputs(unet)
    with attach(pipe, layout, adapters=expected_w.reshape(1, -1), strength=strength):
        wanted = unet(**inputs).sample.float()
    with _loaded_by_diffusers(path, pipe) as modules:
        if modules != len(layout.modules):
            raise InputError(f"{path}: diffusers adapted {modules}/{len(layout.modules)} modules")
        got = unet(**inputs).sample.float()
    return Verification((got - wanted).abs().max().item(), wanted.abs().max().item(), modules)


@contextlib.contextmanager
def _loaded_by_diffusers(path: Path, pipe: Any) -> Iterator[int]:
    """The pipe with the LoRA loaded, by the loader that its users would call; number of modules."""
    try:
        if path.is_dir():
            pipe.unet.load_lora_adapter(path, weight_name=peft.WEIGHTS, prefix=peft.PREFIX)
        else:
            pipe.load_lora_weights(path.parent, weight_name=path.name)
        yield sum(hasattr(module, "lora_A") for module in pipe.unet.modules())
    finally:
        pipe.unload_lora_weights()


def _fixed_inputs(unet: Any) -> dict[str, Tensor]:
    """Two latents, a timestep and text states for a UNet2DConditionModel, always the same."""
    size = max(8, 2 ** (len(unet.config.block_out_channels) - 1))
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "sample": (2, unet.config.in_channels, size, size),
        "encoder_hidden_states": (2, 7, unet.config.cross_attention_dim),
    }
    inputs = {
        name: torch.randn(shape, generator=generator).to(unet.device, unet.dtype)
        for name, shape in shapes.items()
    }
    return {**inputs, "timestep": torch.tensor([500, 500], device=unet.device)}


def _flat(
    space_or_layout: WeightSpace | Layout, c_or_w: Tensor
) -> tuple[Layout, Tensor, str | None]:
    """(layout, w [d] float32 on the CPU, base model's id) of one identity."""
    is_space = isinstance(space_or_layout, WeightSpace)
    name, length = ("c", space_or_layout.m) if is_space else ("w", space_or_layout.size)
    if tuple(c_or_w.shape) not in ((length,), (1, length)):
        raise InputError(
            f"{name}: wanted one identity, [{length}] or [1, {length}], got {list(c_or_w.shape)}"
        )
    row = c_or_w.detach().reshape(1, length).float()
    if not is_space:
        return space_or_layout, row[0].cpu(), None
    w = space_or_layout.reconstruct(row.to(space_or_layout.mean.device))[0].cpu()
    return space_or_layout.layout, w, space_or_layout.meta.get("base")


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.to(dtype).contiguous()
    if not torch.isfinite(cast).all():
        raise InputError(
            f"{name}: values up to {tensor.abs().max():.3g} are not finite in {dtype}; "
            "wanted finite weights, and a dtype that holds them"
        )
    return cast
