"""What is evaluated, who judges it, and on how many people."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from ..attach import attach
from ..denoise import denoiser, device_of
from ..errors import InputError
from ..pictures import contact_sheet, stack
from ..space import WeightSpace

BATCH = 64


@dataclass(frozen=True)
class Sight:
    """What a judge saw on n pictures, all float32 on the CPU.

    attributes [n, a], columns as the judge's: probabilities of those of two values, numbers in the
    labels' units of the others; identity [n, e], unit vectors, whose cosine compares people; whole
    [n], the probability of one whole subject; features [n, f], whose squared distance compares
    pictures as LPIPS does (layers with unit channels, averaged over places; no learnt weights).
    """

    attributes: Tensor
    identity: Tensor
    whole: Tensor
    features: Tensor


class Judge(Protocol):
    """Reads pictures; must never have seen a generated one."""

    attributes: Sequence[str]

    def read(self, images: Tensor) -> Sight:
        """uint8 [n, 3, h, w]."""


@dataclass(frozen=True)
class HeldOut:
    """Subjects that the space never saw.

    labels [n, a], columns as the judge's; photos uint8 [n, p, 3, h, w] to learn from, the first
    being the one of those who get one, with captions (p) and masks [n, p, 1, h, w]; others
    uint8 [n, q, 3, h, w]: further photos, to compare with.
    """

    labels: Tensor
    photos: Tensor
    masks: Tensor
    captions: tuple[str, ...]
    others: Tensor


@dataclass(frozen=True)
class Size:
    """How much is measured. `FULL` is the report's; `SHORT` shows directions in minutes."""

    people: int = 24
    """For each attribute or arm, one at a time compared with themselves."""
    images: int = 3
    """Of each person, in different prompts and with different seeds."""
    attributes: int = 8
    strengths: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0, 6.0)
    """Of edits, in population standard deviations."""
    inverted: int = 24
    steps: int = 400
    """Of an inversion, and of its rivals."""
    photos: int = 16
    """That the many-photo rival has."""
    slider_steps: int = 150
    twins: int = 6
    """Pairs of people who differ in one attribute, of each change."""
    trained: int = 120
    """People of a population that is made for the report."""
    permutations: int = 20


FULL = Size()
SHORT = Size(
    people=6, images=1, attributes=2, strengths=(2.0, 4.0), inverted=4, steps=30, photos=4,
    slider_steps=10, twins=2, trained=12, permutations=3,
)  # fmt: skip


@dataclass
class Study:
    """A space, its pipeline, a judge, and what to say to them.

    prompts: (n, seed) -> n templates with "{who}" in them; who: the space's own subject; words: how
    a prompt says that somebody has an attribute of two values; settings: of `generate`;
    inversion: of `invert`; held_out: n -> so many subjects, None where there are none; identities:
    mean identity [n, e] of the population's own subjects on photos, None where those are lost;
    photos_of: rows -> one photo of each of the population's subjects, uint8, None likewise; more:
    sections of its own by name, modules or alike with a TITLE and a `run`.
    """

    space: WeightSpace
    pipe: Any
    judge: Judge
    prompts: Callable[[int, int], list[str]]
    who: str
    words: dict[str, str]
    settings: dict[str, Any]
    inversion: dict[str, Any]
    held_out: Callable[[int, int], HeldOut] | None = None
    identities: Callable[[], Tensor] | None = None
    photos_of: Callable[[Tensor], Tensor] | None = None
    more: Mapping[str, Any] = field(default_factory=dict)
    size: Size = FULL
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("coefficients", "labels", "classifiers"):
            if getattr(self.space, name) is None:
                raise InputError(
                    f"evaluate: this space holds no {name}: fit it with labels, on this machine"
                )
        missing = [name for name in self.space.attributes if name not in self.judge.attributes]
        if missing:
            raise InputError(f"evaluate: the judge does not read {', '.join(missing)}")

    @property
    def binary(self) -> list[str]:
        """The space's attributes of two values, as many as the size wants."""
        two = [
            name
            for name, column in zip(self.space.attributes, self.space.labels.T, strict=True)
            if len(column.unique()) == 2 and name in self.words
        ]
        return two[: self.size.attributes]

    def column(self, name: str) -> int:
        """Where the judge answers for an attribute."""
        return list(self.judge.attributes).index(name)

    def texts(self, n: int, seed: int) -> list[str]:
        """n prompts of the space's subject."""
        return [template.format(who=self.who) for template in self.prompts(n, seed)]

    def generator(self, seed: int) -> torch.Generator:
        """Random numbers of one purpose: `seed` names it, the study's own seed moves all."""
        return torch.Generator().manual_seed(1_000_003 * self.seed + seed)

    def some_people(self, seed: int) -> Tensor:
        """Rows of the population, as many people as the size wants, drawn by `seed`."""
        return torch.randperm(self.space.n, generator=self.generator(seed))[: self.size.people]


def draw(
    study: Study,
    people: Tensor,
    texts: Sequence[str],
    seeds: Sequence[int],
    *,
    towards: Sequence[str] | None = None,
    amount: float = 1.0,
) -> Tensor:
    """Pictures of people, coefficients [k, m] or adapters [k, d]: uint8 [k, 3, h, w].

    towards: other prompts; the text states go `amount` of the way to theirs, 1 being there.
    """
    return pictures(
        study.space, study.pipe, study.settings, people, texts, seeds, towards=towards,
        amount=amount,
    )  # fmt: skip


def pictures(
    space: WeightSpace,
    pipe: Any,
    own: Mapping[str, Any],
    people: Tensor,
    texts: Sequence[str],
    seeds: Sequence[int],
    *,
    towards: Sequence[str] | None = None,
    amount: float = 1.0,
) -> Tensor:
    """The same without a study; own: its settings."""
    guided = bool(own.get("identity_guidance", False)) and own["guidance"] > 1
    kind = "identities" if people.shape[1] == space.m else "adapters"
    made = []
    with torch.no_grad(), attach(pipe, space, identity_guidance=guided) as live:
        for rows in torch.arange(len(people)).split(BATCH):
            setattr(live, kind, people[rows].to(device_of(pipe)))
            prompt: dict[str, Any] = {"prompt": [texts[i] for i in rows]}
            if towards is not None:
                start, end = (_states(pipe, [t[i] for i in rows]) for t in (texts, towards))
                prompt = {"prompt_embeds": start + amount * (end - start)}
            made += pipe(
                **prompt,
                num_inference_steps=own["steps"],
                guidance_scale=own["guidance"],
                generator=[torch.Generator().manual_seed(int(seeds[i])) for i in rows],
            ).images
    return stack(made)


def _states(pipe: Any, texts: list[str]) -> Tensor:
    return pipe.encode_prompt(texts, device_of(pipe), 1, False)[0].to(denoiser(pipe).dtype)


def picture(images: Tensor, columns: int, labels: Sequence[str] | None = None) -> Image.Image:
    """A contact sheet of uint8 [n, 3, h, w]."""
    pils = [Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in images]
    return contact_sheet(pils, columns, labels)
