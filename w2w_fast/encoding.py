"""Photographs to latents and prompts to text states, each computed once and kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from .denoise import Photos, check_trains, encode_images, encode_prompts, shrink_masks
from .errors import InputError
from .files import read_tensors, write_tensors

if TYPE_CHECKING:
    from .sources import Subject


@dataclass(frozen=True)
class Encoded:
    """A subject's photographs: latents [p, c, h, w] f32, a text state [s, e] of each, masks.

    Equal prompts share one tensor. masks [p, 1, h, w] with mean one: ones where none were given.
    """

    latents: Tensor
    text: list[Tensor]
    masks: Tensor | None = None

    def __len__(self) -> int:
        return len(self.text)

    def photo(self, i: int) -> Photos:
        """Photo i, as a batch of one."""
        masks = self.latents.new_ones(1, 1, *self.latents.shape[2:])
        return Photos(
            self.latents[i : i + 1],
            self.text[i][None],
            masks if self.masks is None else self.masks[i : i + 1],
        )


class Encoder:
    """Encodes subjects with a pipeline's VAE and text encoder.

    folder: what was encoded is kept there, a file for each subject's photographs and each prompt,
        named by the hash of its content and of the encoder's weights, so that nothing stale is
        ever used. Another run on the same photographs may share it.

    InputError for a pipeline that people are not trained on.
    """

    def __init__(self, pipe: Any, folder: str | Path | None = None) -> None:
        check_trains(pipe)
        self.pipe = pipe
        self.folder = None if folder is None else Path(folder)
        self._texts: WeakValueDictionary[str, Tensor] = WeakValueDictionary()
        self._keys: dict[str, str] = {}

    def __call__(self, subject: Subject) -> Encoded:
        images = subject.images.contiguous()
        latents = self._kept(
            "latents", images.numpy().tobytes() + str(tuple(images.shape)).encode(),
            self.pipe.vae, lambda: encode_images(self.pipe, images),
        )  # fmt: skip
        masks = None if subject.masks is None else shrink_masks(subject.masks, latents)
        return Encoded(latents, [self.text(prompt) for prompt in subject.prompts], masks)

    def text(self, prompt: str) -> Tensor:
        """The text state [s, e] of a prompt."""
        state = self._texts.get(prompt)
        if state is None:
            state = self._kept(
                "text", prompt.encode(), self.pipe.text_encoder,
                lambda: encode_prompts(self.pipe, [prompt])[0],
            )  # fmt: skip
            self._texts[prompt] = state
        return state

    def _kept(self, kind: str, content: bytes, model: nn.Module, make: Any) -> Tensor:
        """What is on disk under the content's hash; else made, and put there."""
        if self.folder is None:
            return make().contiguous()
        key = self._keys.setdefault(kind, fingerprint(model))
        name = hashlib.sha256(key.encode() + content).hexdigest()[:40]
        path = self.folder / f"{kind}-{name}.safetensors"
        if path.exists():
            try:
                tensor = read_tensors(path, mmap=False)[0][kind]
                return tensor.to(self.pipe.unet.device)
            except (InputError, KeyError):  # damaged: it is only a copy
                path.unlink(missing_ok=True)
        tensor = make().contiguous()
        write_tensors(path, {kind: tensor})
        return tensor


def fingerprint(model: nn.Module | Mapping[str, Tensor]) -> str:
    """The sha256 of tensors, a model's weights or others, and of their names, in hex."""
    tensors = model.state_dict() if isinstance(model, nn.Module) else model
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        data = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(memoryview(data.view(torch.uint8).numpy()))
    return digest.hexdigest()
