"""A judge for spaces of real photographs: a CLIP model on disk (Radford et al., 2021).

Attributes are read zero-shot: how much nearer a picture is to "a photo of WHO with WORDS" than to
"a photo of WHO". Identity is the image embedding, which sees clothes and light too: a model made
for faces tells people apart better, and can be given as a judge of your own (`study.Judge`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..denoise import centre_mask, device_of
from ..errors import InputError
from ..sources import Subject
from ..space import WeightSpace
from .study import FULL, HeldOut, Sight, Size, Study

BATCH = 32
_NOBODY = "an abstract pattern"


class ClipJudge:
    """CLIP in folder `folder` (transformers' format); words: attribute -> how it is said."""

    def __init__(
        self, folder: str | Path, words: Mapping[str, str], who: str, device: Any = "cpu"
    ) -> None:
        from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

        if not (Path(folder) / "config.json").is_file():
            raise InputError(f"judge: {folder}: wanted the folder of a CLIP model")
        known = {"local_files_only": True}
        self.model = CLIPModel.from_pretrained(folder, **known).to(device).eval()
        self.processor = CLIPImageProcessor.from_pretrained(folder, **known)
        tokenizer = AutoTokenizer.from_pretrained(folder, **known)
        self.attributes: Sequence[str] = list(words)
        texts = [f"a photo of {who}", _NOBODY]
        texts += [f"a photo of {who} with {words[name]}" for name in words]
        with torch.no_grad():
            tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(device)
            hidden = self.model.text_model(**tokens).pooler_output
            self.texts = F.normalize(self.model.text_projection(hidden), dim=1)

    @torch.no_grad()
    def read(self, images: Tensor) -> Sight:
        parts = [self._read(part) for part in images.split(BATCH)]
        return Sight(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _read(self, images: Tensor) -> tuple[Tensor, ...]:
        pictures = [image.permute(1, 2, 0).numpy() for image in images]
        x = self.processor(pictures, return_tensors="pt").pixel_values
        seen = self.model.vision_model(x.to(self.texts.device))
        identity = F.normalize(self.model.visual_projection(seen.pooler_output), dim=1)
        likeness = self.model.logit_scale.exp() * identity @ self.texts.T
        person, nobody, having = likeness[:, :1], likeness[:, 1:2], likeness[:, 2:]
        patches = F.normalize(seen.last_hidden_state[:, 1:], dim=2)
        features = patches.flatten(1) / patches.shape[1] ** 0.5
        whole = (person - nobody).sigmoid()[:, 0]
        answers = ((having - person).sigmoid(), identity, whole, features)
        return tuple(answer.float().cpu() for answer in answers)


def held_out_of(
    subjects: Sequence[Subject], labels: Tensor, n: int, photos: int, seed: int
) -> HeldOut:
    """n of the subjects, drawn by `seed`: half of the photos to learn from, at most `photos`.

    labels [k, a], a row a subject, columns as the judge's. InputError for fewer subjects than n,
    and for one with a single photo.
    """
    if not 1 <= n <= len(subjects):
        raise InputError(f"evaluate: wanted {n} people of the photos, there are {len(subjects)}")
    order = torch.randperm(len(subjects), generator=torch.Generator().manual_seed(seed))[:n]
    chosen = [subjects[i] for i in order.tolist()]
    least = min(len(subject.prompts) for subject in chosen)
    if least < 2:
        alone = next(s.name for s in chosen if len(s.prompts) < 2)
        raise InputError(f"{alone}: one photo; evaluate compares with others: wanted two or more")
    p = min(photos, least // 2)
    masks = [
        centre_mask(s.images.shape[-1]).expand(p, -1, -1, -1) if s.masks is None else s.masks[:p]
        for s in chosen
    ]
    return HeldOut(
        labels=labels[order],
        photos=torch.stack([s.images[:p] for s in chosen]),
        masks=torch.stack(masks),
        captions=chosen[0].prompts[:p],
        others=torch.stack([s.images[p:least] for s in chosen]),
    )


def clip_study(
    space: WeightSpace,
    pipe: Any,
    judge: str | Path,
    prompts: Sequence[str],
    *,
    who: str,
    settings: Mapping[str, Any],
    inversion: Mapping[str, Any],
    photos: Sequence[Subject] = (),
    labels: Tensor | None = None,
    size: Size = FULL,
    seed: int = 0,
) -> Study:
    """A space of real photographs to be evaluated, with CLIP in folder `judge`.

    prompts: with the space's subject `who` in each. photos: people that the space never saw, with
    their labels [k, a], columns as the space's attributes; without them nothing is inverted.
    """
    if not prompts or any(who not in prompt for prompt in prompts):
        raise InputError(f"prompts: wanted {who!r} in each, so that edits can be said in words")
    templates = [prompt.replace("{", "(").replace("}", ")").replace(who, "{who}")
                 for prompt in prompts]  # fmt: skip
    words = {name: name.replace("_", " ") for name in space.attributes}

    def drawn(n: int, number: int) -> list[str]:
        generator = torch.Generator().manual_seed(1000 * seed + number)
        return [templates[i] for i in torch.randint(len(templates), (n,), generator=generator)]

    def people(n: int, number: int) -> HeldOut:
        return held_out_of(photos, labels, min(n, len(photos)), size.photos, number)

    return Study(
        space=space, pipe=pipe, judge=ClipJudge(judge, words, "a person", device_of(pipe)),
        prompts=drawn, who=who, words=words, settings=dict(settings), inversion=dict(inversion),
        held_out=people if len(photos) else None, size=size, seed=seed,
    )  # fmt: skip
